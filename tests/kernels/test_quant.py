from __future__ import annotations

import math

import pytest
import torch

from seamount.kernels.quant import decode_e4m3, dequantize, dequantize_blocks, quantize, quantize_blocks


@pytest.mark.parametrize("rows", [0, 1, 63, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_are_the_least_power_of_two_that_fits(rows: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    magnitude = 10.0 ** torch.randint(-6, 5, (rows, 1), generator=generator)
    x = (torch.randn((rows, 384), generator=generator) * magnitude).to(dtype)
    values, scales = quantize(x)
    assert values.shape == (rows, 384)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (rows, 3)
    assert scales.dtype == torch.float32
    for row in range(rows):
        for block in range(3):
            amax = max(x[row, block * 128 : (block + 1) * 128].double().abs().max().item(), 1e-4)
            assert scales[row, block].item() == 2.0 ** math.ceil(math.log2(amax / 448))
    # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, or 2^-10 scales below the normal range.
    restored = dequantize(values, scales, torch.float64)
    bound = x.double().abs() / 16 + scales.double().repeat_interleave(128, dim=1) * 2**-10
    assert ((restored - x.double()).abs() <= bound).all()


def test_exact_powers_of_two_are_not_rounded_up() -> None:
    x = torch.zeros(1, 128)
    x[0, 5] = 448.0
    assert quantize(x)[1].item() == 1.0
    assert quantize(torch.full((1, 128), 448.01))[1].item() == 2.0


def test_small_blocks_use_the_floor_and_nan_stays_in_its_block() -> None:
    x = torch.zeros(1, 256)
    x[0, 200] = float("nan")
    values, scales = quantize(x)
    assert scales[0, 0].item() == 2.0 ** math.ceil(math.log2(1e-4 / 448))
    restored = dequantize(values, scales)
    assert not restored[0, :128].isnan().any()
    assert restored[0, 200].isnan()


def test_channels_must_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize(torch.zeros(2, 130))


def test_decoding_is_the_cast() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        cast = every.view(torch.float8_e4m3fn).to(dtype)
        assert torch.equal(decode_e4m3(every.view(4, 64), dtype).view(-1).nan_to_num(7), cast.nan_to_num(7))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (576, 256), (130, 200)])
def test_block_scaled_weights(rows: int, columns: int, generator: torch.Generator) -> None:
    weight = torch.randn((rows, columns), generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand((-(-rows // 128), -(-columns // 128)), generator=generator) + 0.5
    restored = dequantize_blocks(weight, scale, torch.float64)
    for i, j in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns - 1)):
        assert restored[i, j].item() == weight[i, j].double().item() * scale[i // 128, j // 128].double().item()
    with pytest.raises(ValueError, match="scale_inv has shape"):
        dequantize_blocks(weight, torch.ones(9, 9), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 257), (256, 128)])
def test_blocks_give_back_what_they_held(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = (torch.randn((rows, columns), generator=generator) * torch.logspace(-3, 3, columns)).to(dtype)
    values, scales = quantize_blocks(weight)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            amax = max(block.double().abs().max().item(), 1e-4)
            assert scales[i, j].item() == 2.0 ** math.ceil(math.log2(amax / 448))
    spread = scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    error = (dequantize_blocks(values, scales, torch.float64) - weight.double()).abs()
    assert (error <= weight.double().abs() / 16 + spread * 2**-10).all()


def test_only_matrices_have_blocks() -> None:
    with pytest.raises(ValueError, match="matrix"):
        quantize_blocks(torch.zeros(128))
