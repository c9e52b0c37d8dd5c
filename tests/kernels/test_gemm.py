from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamount.kernels.gemm import (
    fp8_gemm,
    grouped_fp8_gemm,
    grouped_fp8_gemm_masked,
    grouped_fp8_gemm_swiglu,
    swiglu_quantize,
)
from seamount.kernels.quant import dequantize, dequantize_blocks, quantize


def operands(rows: int, experts: int, columns: int, channels: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x, x_scale = quantize(torch.randn((rows, channels), generator=generator) * 3)
    weight = torch.randn((experts, columns, channels), generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand((experts, -(-columns // 128), channels // 128), generator=generator)
    return x, x_scale, weight, scale


def exact(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return dequantize(x, x_scale, torch.float64) @ dequantize_blocks(weight, scale, torch.float64).T


@pytest.mark.parametrize(("rows", "columns", "channels"), [(0, 128, 128), (1, 1, 128), (65, 200, 384)])
def test_products_of_quantised_matrices(rows: int, columns: int, channels: int, generator: torch.Generator) -> None:
    x, x_scale, weight, scale = operands(rows, 1, columns, channels, generator)
    out = fp8_gemm(x, x_scale, weight[0], scale[0])
    assert out.dtype == torch.bfloat16
    assert out.shape == (rows, columns)
    expected = exact(x, x_scale, weight[0], scale[0])
    assert ((out.double() - expected).abs() <= expected.abs() / 200 + 1e-3).all()


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [0, 0, 8]])
def test_each_group_meets_its_own_weight(counts: list[int], generator: torch.Generator) -> None:
    x, x_scale, weight, scale = operands(9, 3, 256, 256, generator)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    contiguous = grouped_fp8_gemm(x, x_scale, weight, scale, offsets)
    slabs, slab_scale = x.expand(3, -1, -1).contiguous(), x_scale.expand(3, -1, -1).contiguous()
    masked = grouped_fp8_gemm_masked(slabs, slab_scale, weight, scale, torch.tensor(counts, dtype=torch.int32))
    for e, count in enumerate(counts):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        assert torch.equal(contiguous[rows], fp8_gemm(x[rows], x_scale[rows], weight[e], scale[e]))
        assert torch.equal(masked[e, :count], fp8_gemm(x[:count], x_scale[:count], weight[e], scale[e]))
    filled = int(offsets[-1])
    values, scales = grouped_fp8_gemm_swiglu(x, x_scale, weight, scale, offsets)
    then = swiglu_quantize(contiguous)
    assert torch.equal(values[:filled].view(torch.uint8), then[0][:filled].view(torch.uint8))
    assert torch.equal(scales[:filled], then[1][:filled])


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_swiglu(rows: int, generator: torch.Generator) -> None:
    x = torch.randn((rows, 512), generator=generator, dtype=torch.float64) * 3
    values, scales = swiglu_quantize(x)
    expected = x[:, :256] / (1 + (-x[:, :256]).exp()) * x[:, 256:]
    error = (dequantize(values, scales, torch.float64) - expected).abs()
    assert (error <= expected.abs() / 16 + scales.double().repeat_interleave(128, 1) / 512).all()
    with pytest.raises(ValueError, match="gate and up"):
        swiglu_quantize(torch.zeros(1, 384))


def test_bad_operands_are_refused(generator: torch.Generator) -> None:
    x, x_scale, weights, scales = operands(4, 3, 256, 256, generator)
    weight, scale = weights[0], scales[0]
    for bad, message in (
        ((x, x_scale[:, :1], weight, scale), "x_scale"),
        ((x, x_scale, weight, scale.double()), "weight_scale"),
        ((x, x_scale, weight[:, :128], scale), "channels"),
        ((x.float(), x_scale, weight, scale), "float8"),
        ((x, x_scale, weight.T.contiguous().T, scale), "contiguous"),
        ((x, x_scale, weights, scales), "matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_gemm(*bad)
    none = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="groups"):
        grouped_fp8_gemm(x, x_scale, weights, scales, none)
    with pytest.raises(ValueError, match="slabs"):
        grouped_fp8_gemm_masked(x[None], x_scale[None], weights, scales, none)
    with pytest.raises(ValueError, match="dimensions"):
        grouped_fp8_gemm_masked(x, x_scale, weights, scales, none)
    with pytest.raises(ValueError, match="gate and up"):
        grouped_fp8_gemm_swiglu(
            x, x_scale, weights[:, :128].contiguous(), scales[:, :1].contiguous(), torch.zeros(4, dtype=torch.int32)
        )
