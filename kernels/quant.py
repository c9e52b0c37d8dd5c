"""Block quantisation to e4m3 and back."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK_SIZE = 128
"""Channels that share one scale."""
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which references compute: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize(x: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Quantise blocks of channels to e4m3 with power-of-two scales.

        s = 2^ceil(log2(max(amax(|block|), 1e-4) / 448)),  q = e4m3(x / s),  x ~ q s

    x: [..., D], any float dtype, D a multiple of block_size. An empty leading dimension gives empty results.
    Returns (q [..., D] float8_e4m3fn, s [..., D / block_size] float32). |x / s| is at most 448: nothing
    saturates. A NaN stays within its block.
    Raises ValueError if D is not a multiple of block_size.
    Source: DeepSeek-V3.2's activation quantiser with scale_fmt ue8m0.
    """
    channels = x.shape[-1]
    if channels % block_size:
        raise ValueError(f"x has {channels} channels; quantising needs a multiple of {block_size}")
    if x.is_cuda and x.dtype != torch.float64 and block_size >= 16 and not block_size & (block_size - 1):
        from seamount.kernels.triton import elementwise

        return elementwise.quantize(x, block_size)
    blocks = x.to(wide_dtype(x.dtype)).reshape(*x.shape[:-1], channels // block_size, block_size)
    scales = _power_of_two_at_least(blocks.abs().amax(dim=-1).clamp_min(AMAX_FLOOR) / E4M3_MAX)
    # Dividing by a power of two is exact, so the cast's is the only rounding.
    values = (blocks / scales.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return values, scales.to(torch.float32)


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of ``quantize`` up to rounding: q s.

    values: [..., D] float8_e4m3fn; scales: [..., G] float32, one for each D / G channels.
    Returns [..., D] in ``dtype``.
    """
    groups = scales.shape[-1]
    numbers = decode_e4m3(values.view(torch.uint8), dtype)
    blocks = numbers.view(*values.shape[:-1], groups, values.shape[-1] // groups)
    return (blocks * scales.unsqueeze(-1)).flatten(-2)


def decode_e4m3(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers behind e4m3 bytes: uint8 of any shape in, the same shape in ``dtype`` out."""
    if values.is_cuda:
        return values.view(torch.float8_e4m3fn).to(dtype)
    # On CPU a look-up is 5 times faster than torch's cast, and this is most of reading an fp8 cache.
    return _e4m3_table(dtype, values.device).index_select(0, values.flatten().to(torch.int32)).view(values.shape)


@cache
def _e4m3_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    # The first caller may be inside inference mode; the table is shared with callers outside.
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(dtype)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight to e4m3 with one power-of-two scale for each block of 128 rows and 128 columns.

        s = 2^ceil(log2(max(amax(|block|), 1e-4) / 448)),  q = e4m3(w / s),  w ~ q s

    weight: [out, in], any float dtype; the last block of either side may be partly filled.
    Returns (q [out, in] float8_e4m3fn, s [ceil(out / 128), ceil(in / 128)] float32), what ``dequantize_blocks`` takes.
    Peak memory is the result plus one block row. Raises ValueError for a weight that is no matrix.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be a matrix")
    rows, columns = weight.shape
    column_blocks = -(-columns // BLOCK_SIZE)
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty((-(-rows // BLOCK_SIZE), column_blocks), dtype=torch.float32, device=weight.device)
    for block, scale in enumerate(scales):
        band = weight[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].to(wide_dtype(weight.dtype))
        padded = torch.nn.functional.pad(band.abs(), (0, column_blocks * BLOCK_SIZE - columns))
        amax = padded.view(band.shape[0], column_blocks, BLOCK_SIZE).amax((0, 2))
        powers = _power_of_two_at_least(amax.clamp_min(AMAX_FLOOR) / E4M3_MAX)
        scale.copy_(powers)
        spread = powers.repeat_interleave(BLOCK_SIZE)[:columns]
        values[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = (band / spread).to(torch.float8_e4m3fn)
    return values, scales


def dequantize_blocks(
    weight: Tensor,
    scale_inv: Tensor,
    dtype: torch.dtype,
    block_size: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE),
    out: Tensor | None = None,
) -> Tensor:
    """A block-scaled FP8 weight in ``dtype``: w[i, j] * scale_inv[i // 128, j // 128].

    weight: [out, in] float8_e4m3fn; scale_inv: [ceil(out / 128), ceil(in / 128)] float32; despite its checkpoint name
    it is multiplied. The last block of either side may be partly filled. Peak memory is the result plus one block row.
    out: [out, in] of ``dtype``, on any device, to write into; None for a new tensor beside the weight.
    Raises ValueError if scale_inv's shape does not cover the weight.
    """
    rows, columns = weight.shape
    expected = (-(-rows // block_size[0]), -(-columns // block_size[1]))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(f"scale_inv has shape {tuple(scale_inv.shape)}; a weight {rows}x{columns} needs {expected}")
    if out is None:
        out = torch.empty((rows, columns), dtype=dtype, device=weight.device)
    wide = wide_dtype(dtype)
    for block in range(expected[0]):
        row_range = slice(block * block_size[0], min((block + 1) * block_size[0], rows))
        scales = scale_inv[block].to(wide).repeat_interleave(block_size[1])[:columns]
        out[row_range] = decode_e4m3(weight[row_range].view(torch.uint8), wide) * scales
    return out


def _power_of_two_at_least(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, mantissa in [1/2, 1)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    # ldexp(1, e) in x's dtype; adding 0 * x keeps a NaN a NaN.
    return torch.ldexp(torch.ones_like(x), exponent) + 0 * x
