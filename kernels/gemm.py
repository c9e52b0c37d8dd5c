"""Products of block-scaled e4m3 matrices: plain, grouped by expert, and with SwiGLU and quantisation after them.

    out[m, n] = sum over K blocks b of  xs[m, b] ws[n // 128, b]  sum over k in b of  x[m, k] w[n, k]

The inner sum is accumulated in float32 and the scales are applied to it once per block of 128. CUDA tensors run Triton
kernels; everything else runs the references here. Where many products meet one weight on a CPU, ``decode_weight`` once
spares decoding it each time: all functions take its result with ``weight_scale`` None.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from seamount.kernels.arguments import check_current
from seamount.kernels.quant import BLOCK_SIZE, decode_e4m3, dequantize, dequantize_blocks, quantize, wide_dtype


def decode_weight(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """A block-scaled weight as float32 numbers: the form that the functions here take with ``weight_scale`` None.

    weight: [.., N, K] float8_e4m3fn; weight_scale: [.., ceil(N / 128), K / 128] float32. Returns [.., N, K] float32.
    """
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    matrices = (part.view(-1, *part.shape[-2:]) for part in (weight, weight_scale, out))
    for values, scale, target in zip(*matrices, strict=True):
        dequantize_blocks(values, scale, torch.float32, out=target)
    return out


def fp8_gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """x W^T of quantised activations and a block-scaled weight.

    x: [M, K] float8_e4m3fn and x_scale: [M, K / 128] float32, as ``quantize`` makes them; M may be 0.
    weight: [N, K] float8_e4m3fn; weight_scale: [ceil(N / 128), K / 128] float32. K is a multiple of 128.
    On a CPU also: weight [N, K] float32 from ``decode_weight``, weight_scale None.
    Returns [M, N] bfloat16. Raises ValueError for other shapes, dtypes or devices.
    """
    check_gemm(x, x_scale, weight, weight_scale)
    if x.is_cuda and weight_scale is not None:
        from seamount.kernels.triton import fp8_gemm as triton_gemm

        return triton_gemm.fp8_gemm(x, x_scale, weight, weight_scale)
    return _product(x, x_scale, weight, weight_scale)


def grouped_fp8_gemm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None, offsets: Tensor
) -> Tensor:
    """One product for each group of consecutive rows: rows offsets[e] .. offsets[e + 1] meet weight[e].

    x: [R, K] and x_scale: [R, K / 128] as in ``fp8_gemm``.
    weight: [E, N, K]; weight_scale: [E, ceil(N / 128), K / 128].
    offsets: [E + 1] int32, ascending from 0, at most R; groups may be empty.
    Returns [R, N] bfloat16; rows from offsets[E] on are unspecified.
    """
    check_grouped(x, x_scale, weight, weight_scale, offsets, masked=False)
    if x.is_cuda and weight_scale is not None:
        from seamount.kernels.triton import grouped_gemm as triton_gemm

        return triton_gemm.grouped_gemm(x, x_scale, weight, weight_scale, offsets)
    out = torch.zeros((x.shape[0], weight.shape[1]), dtype=torch.bfloat16, device=x.device)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        rows = slice(begin, end)
        out[rows] = _product(x[rows], x_scale[rows], weight[expert], _of_expert(weight_scale, expert))
    return out


def grouped_fp8_gemm_masked(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None, counts: Tensor
) -> Tensor:
    """One product for each expert's slab, of which the first counts[e] rows are filled.

    x: [E, M, K]; x_scale: [E, M, K / 128]; weight: [E, N, K]; weight_scale: [E, ceil(N / 128), K / 128].
    counts: [E] int32, 0 .. M. Returns [E, M, N] bfloat16; rows from counts[e] on are unspecified.
    """
    check_grouped(x, x_scale, weight, weight_scale, counts, masked=True)
    if x.is_cuda and weight_scale is not None:
        from seamount.kernels.triton import grouped_gemm as triton_gemm

        return triton_gemm.grouped_gemm(x, x_scale, weight, weight_scale, counts)
    out = torch.zeros((*x.shape[:2], weight.shape[1]), dtype=torch.bfloat16, device=x.device)
    for expert, count in enumerate(counts.tolist()):
        rows = (expert, slice(count))
        out[rows] = _product(x[rows], x_scale[rows], weight[expert], _of_expert(weight_scale, expert))
    return out


def grouped_fp8_gemm_swiglu(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """A grouped product with merged gate and up weights, SwiGLU and quantisation: what the next product reads.

        q, s = swiglu_quantize(grouped product)

    x, weight, groups: as in ``grouped_fp8_gemm`` (x [R, K], groups = offsets) or ``grouped_fp8_gemm_masked``
    (x [E, M, K], groups = counts), with N = 2 I, gate rows first, I a multiple of 128.
    Returns (q [.., I] float8_e4m3fn, s [.., I / 128] float32); rows of no group are unspecified.
    """
    masked = x.dim() == 3
    check_grouped(x, x_scale, weight, weight_scale, groups, masked=masked)
    if weight.shape[1] % (2 * BLOCK_SIZE):
        raise ValueError(f"weight has {weight.shape[1]} rows; gate and up need a multiple of {BLOCK_SIZE} each")
    if x.is_cuda and weight_scale is not None:
        from seamount.kernels.triton import grouped_gemm as triton_gemm

        return triton_gemm.grouped_gemm_swiglu(x, x_scale, weight, weight_scale, groups)
    product = grouped_fp8_gemm_masked if masked else grouped_fp8_gemm
    return swiglu_quantize(product(x, x_scale, weight, weight_scale, groups))


def swiglu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, rounded to x's dtype and quantised by blocks of 128 channels.

    x: [..., 2 I], the gate's channels first; I a multiple of 128. The product is computed in at least float32.
    Returns (q [..., I] float8_e4m3fn, s [..., I / 128] float32). Raises ValueError for another I.
    """
    if x.shape[-1] % (2 * BLOCK_SIZE):
        raise ValueError(f"x has {x.shape[-1]} channels; gate and up need a multiple of {BLOCK_SIZE} each")
    if x.is_cuda and x.dtype != torch.float64:
        from seamount.kernels.triton import moe as triton_moe

        return triton_moe.swiglu_quantize(x)
    gate, up = x.to(wide_dtype(x.dtype)).chunk(2, dim=-1)
    return quantize((silu(gate) * up).to(x.dtype))


def check_gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None) -> None:
    """Raises ValueError for anything that ``fp8_gemm`` does not take."""
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)} and weight {list(weight.shape)}; both must be matrices")
    _check_operands(x, x_scale, weight, weight_scale)


def check_grouped(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None, groups: Tensor, *, masked: bool
) -> None:
    """Raises ValueError for anything that the grouped products do not take."""
    if x.dim() != 2 + masked or weight.dim() != 3:
        raise ValueError(f"x has {x.dim()} dimensions and weight {weight.dim()}; they must have {2 + masked} and 3")
    _check_operands(x, x_scale, weight, weight_scale)
    experts = weight.shape[0]
    if masked and x.shape[0] != experts:
        raise ValueError(f"x has {x.shape[0]} slabs; weight has {experts} experts")
    if tuple(groups.shape) != (experts + (not masked),) or groups.dtype != torch.int32 or groups.device != x.device:
        raise ValueError(
            f"groups is {groups.dtype} {list(groups.shape)} on {groups.device}; "
            f"it must be int32 [{experts + (not masked)}] on {x.device}"
        )


def _check_operands(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None) -> None:
    channels = x.shape[-1]
    if channels != weight.shape[-1] or channels % BLOCK_SIZE:
        raise ValueError(
            f"x has {channels} channels and weight {weight.shape[-1]}; they must be equal, a multiple of {BLOCK_SIZE}"
        )
    blocks = channels // BLOCK_SIZE
    check_current(x.device)
    _check_operand("x", x, x.shape, torch.float8_e4m3fn, x.device)
    _check_operand("x_scale", x_scale, (*x.shape[:-1], blocks), torch.float32, x.device)
    if weight_scale is None:
        if x.is_cuda:
            raise ValueError("weight_scale is None; decoded weights are for CPUs")
        _check_operand("weight", weight, weight.shape, torch.float32, x.device)
        return
    _check_operand("weight", weight, weight.shape, torch.float8_e4m3fn, x.device)
    scale_shape = (*weight.shape[:-2], -(-weight.shape[-2] // BLOCK_SIZE), blocks)
    _check_operand("weight_scale", weight_scale, scale_shape, torch.float32, x.device)


def _check_operand(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}; it must be {str(dtype).removeprefix('torch.')} {list(shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; x is on {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {list(x.stride())}")


def _of_expert(weight_scale: Tensor | None, expert: int) -> Tensor | None:
    return None if weight_scale is None else weight_scale[expert]


def _product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    if weight_scale is None:
        return (dequantize(x, x_scale) @ weight.T).to(torch.bfloat16)
    out = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    for block in range(x_scale.shape[1]):
        channels = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        left = decode_e4m3(x[:, channels].contiguous().view(torch.uint8))
        right = decode_e4m3(weight[:, channels].contiguous().view(torch.uint8))
        scale = weight_scale[:, block].repeat_interleave(BLOCK_SIZE)[: weight.shape[0]]
        out += left @ right.T * (x_scale[:, block, None] * scale)
    return out.to(torch.bfloat16)
