"""Block quantisation, norms and rope: one read and one write of device memory each.

    quantize            s = 2^ceil(log2(max(amax |block|, 1e-4) / 448)),  q = e4m3(x / s)
    rms_norm            x / sqrt(mean(x^2) + eps) w
    layer_norm          (x - mean) / sqrt(variance + eps) w + b
    apply_rope          (x_a, x_b) -> (x_a cos - x_b sin, x_a sin + x_b cos), pairs interleaved or half-split

Tiles: a program quantises [rows, block] tiles of one row band, normalises whole rows (kept in registers, so that x is
read once), rotates the heads of one token. Bytes: quantize D w + D + D / 32 a row (w: bytes of x's dtype), the others
2 D w. The power of two is found in the bits of amax, without division or logarithm: with amax = m 2^e, 1 <= m < 2, it
is 2^(e - 8) if m <= 1.75 (448 = 1.75 2^8), else 2^(e - 7). Multiplications and additions are not fused, so that rotated
and quantised values have the references' bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.triton.arguments import FLOATS, check_tensor

_FLOAT_BITS_OF_FLOOR = tl.constexpr(0x38D1B717)  # 1e-4
_FLOAT_BITS_OF_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def scale_of(amax_bits):
    """(scale, 1 / scale) float32 of blocks whose largest magnitude has these bits; NaN for a NaN or infinity."""
    bits = tl.maximum(amax_bits, _FLOAT_BITS_OF_FLOOR)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    finite = bits < _FLOAT_BITS_OF_INFINITY
    scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def quantize_rows(x):
    """x: [R, B] float32, a block a row. Returns (q [R, B] float8e4nv, scale [R] float32)."""
    # Magnitudes compare as integers, and a NaN then counts as the largest.
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale, inverse = scale_of(amax_bits)
    return (x * inverse[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["num_blocks"])
def _quantize_kernel(x_ptr, q_ptr, scale_ptr, num_blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_blocks
    offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    q, scale = quantize_rows(x)
    tl.store(q_ptr + offsets, q, mask=inside[:, None])
    tl.store(scale_ptr + rows, scale, mask=inside)


def quantize(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``seamount.kernels.quant.quantize`` for float32, bfloat16 and float16; bit for bit the reference's results."""
    check_tensor("x", x, shape=x.shape, dtypes=FLOATS, like=x)
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}; the kernel needs a power of two of at least 16")
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], x.shape[-1] // block_size), dtype=torch.float32, device=x.device)
    count = scales.numel()
    if count:
        rows = 4 if count <= 4096 else 16
        _quantize_kernel[(triton.cdiv(count, rows),)](
            x, values, scales, count, BLOCK=block_size, ROWS=rows, num_warps=4
        )
    return values, scales


@triton.jit
def rms_scale(x, size: tl.constexpr, eps):
    """1 / sqrt(mean(x^2) + eps) of one row; positions past the row's end hold 0."""
    return 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / size + eps)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, row_stride, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, x * rms_scale(x, SIZE, eps) * weight, mask=inside)


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, row_stride, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / SIZE, 0.0)
    tl.store(out_ptr + row * SIZE + columns, centred * rms_scale(centred, SIZE, eps) * weight + bias, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``seamount.kernels.norms.rms_norm`` for float32, bfloat16 and float16."""
    rows = _norm_rows(x, weight, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel():
        size, padded = x.shape[-1], triton.next_power_of_2(x.shape[-1])
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, rows.stride(0), eps, SIZE=size, PADDED=padded, num_warps=_row_warps(padded)
        )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``seamount.kernels.norms.layer_norm`` for float32, bfloat16 and float16."""
    rows = _norm_rows(x, weight, bias)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel():
        size, padded = x.shape[-1], triton.next_power_of_2(x.shape[-1])
        _layer_norm_kernel[(rows.shape[0],)](
            rows, weight, bias, out, rows.stride(0), eps, SIZE=size, PADDED=padded, num_warps=_row_warps(padded)
        )
    return out


def _norm_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    check_tensor("x", x, shape=x.shape, dtypes=FLOATS, like=x)
    if not 0 < x.shape[-1] <= 32768:
        raise ValueError(f"x has {x.shape[-1]} channels; the kernel keeps a row of 1 to 32768 in registers")
    check_tensor("weight", weight, shape=(x.shape[-1],), dtypes=FLOATS, like=x)
    check_tensor("bias", bias, shape=(x.shape[-1],), dtypes=FLOATS, like=x)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _row_warps(size: int) -> int:
    return min(16, max(1, size // 512))


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, num_heads, token_stride, head_stride,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF_PADDED)
    cos = tl.load(cos_ptr + token * HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        first, second = pairs * 2, pairs * 2 + 1
    else:
        first, second = pairs, pairs + HALF
    inside = (heads < num_heads)[:, None] & (pairs < HALF)[None, :]
    source = x_ptr + token * token_stride + heads[:, None] * head_stride
    a = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + (token * num_heads + heads[:, None]) * (2 * HALF)
    tl.store(target + first[None, :], a * cos - b * sin, mask=inside)
    tl.store(target + second[None, :], a * sin + b * cos, mask=inside)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Both layouts of ``seamount.kernels.rope`` for float32, bfloat16 and float16; bit for bit the references' results.

    x: [T, dim] or [T, H, dim], heads and tokens may be strided.
    """
    half = x.shape[-1] // 2
    if x.dim() not in (2, 3) or x.shape[-1] != 2 * half or not half:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [tokens, channels] or [tokens, heads, channels]")
    check_tensor("x", x, shape=x.shape, dtypes=FLOATS, like=x)
    check_tensor("cos", cos, shape=(x.shape[0], half), dtypes=FLOATS, like=x, contiguous=True)
    check_tensor("sin", sin, shape=(x.shape[0], half), dtypes=FLOATS, like=x, contiguous=True)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_heads = x.shape[1] if x.dim() == 3 else 1
    if out.numel():
        heads = min(16, triton.next_power_of_2(num_heads))
        _rope_kernel[(x.shape[0], triton.cdiv(num_heads, heads))](
            x, cos, sin, out, num_heads, x.stride(0), x.stride(1) if x.dim() == 3 else 0,
            HALF=half, HALF_PADDED=triton.next_power_of_2(half), HEADS=heads, INTERLEAVED=interleaved,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out
