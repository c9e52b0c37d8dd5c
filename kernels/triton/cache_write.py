"""Cache writes in one pass each, and page checksums.

    write_latent     c' = c / sqrt(mean(c^2) + eps) w, rounded to c's dtype; k' = rope(k), pairs interleaved
                     fp8: e4m3(c' / s) of 512 B | 4 scales s float32 | k' bfloat16;  bf16: c' | k'
    write_index_key  y = H_D rope(layer_norm(k)) / sqrt(D), half-split rope on the first R channels
                     e4m3(y / s) at 128 o, s at 64 * 128 + 4 o of page p, slot = 64 p + o
    page_checksum    sum_i word_i (splitmix64(i) | 1) mod 2^64

Tiles: one program writes one token (latent: [groups, 128] values in registers; key: D values, the partner of each
rotated channel loaded beside it, so that rope moves nothing between threads). A checksum program keeps the multipliers
of 1024 words and applies them to 8 pages; partial sums meet in integer atomics, whose order cannot matter.
Bytes at V3.2's sizes: latent 1152 read + 656 written a token, key 256 + 132, both + 256 of cos and sin; the unfused
parts move the latent 5 times. A slot outside the plane writes nothing: a GPU can raise nothing without a wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE, CacheLayout
from seamount.kernels.quant import BLOCK_SIZE
from seamount.kernels.triton.arguments import FLOATS, check_tensor
from seamount.kernels.triton.elementwise import quantize_rows

_PAGE = tl.constexpr(PAGE_SIZE)
_CHECKSUM_WORDS = 1024
_CHECKSUM_PAGES = 8


@triton.jit
def _write_latent_kernel(
    plane_ptr, slot_ptr, latent_ptr, key_ptr, weight_ptr, cos_ptr, sin_ptr,
    num_slots, latent_stride, key_stride, eps,
    RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    FP8: tl.constexpr, TOKEN_BYTES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    writable = (slot >= 0) & (slot < num_slots)
    row_ptr = plane_ptr + slot * TOKEN_BYTES

    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = columns < RANK
    latent = tl.load(latent_ptr + token * latent_stride + columns, mask=inside, other=0.0)
    wide = latent.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    scale = 1.0 / tl.sqrt_rn(square / RANK + eps)
    # The norm's result has the latent's dtype before it is quantised.
    normed = (wide * scale * weight).to(latent_ptr.dtype.element_ty)

    pairs = tl.arange(0, HALF_PADDED)
    in_rope = pairs < HALF
    cos = tl.load(cos_ptr + token * HALF + pairs, mask=in_rope, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + pairs, mask=in_rope, other=0.0).to(tl.float32)
    key_row = key_ptr + token * key_stride + 2 * pairs
    even = tl.load(key_row, mask=in_rope, other=0.0).to(tl.float32)
    odd = tl.load(key_row + 1, mask=in_rope, other=0.0).to(tl.float32)
    first = (even * cos - odd * sin).to(key_ptr.dtype.element_ty)
    second = (even * sin + odd * cos).to(key_ptr.dtype.element_ty)

    if FP8:
        values, scales = quantize_rows(normed.to(tl.float32))
        tl.store(row_ptr + columns, values.to(tl.uint8, bitcast=True), mask=writable & inside)
        scale_ptr = (row_ptr + RANK).to(tl.pointer_type(tl.float32))
        tl.store(scale_ptr + groups, scales, mask=writable & (groups * GROUP < RANK))
        rope_ptr = (row_ptr + RANK + RANK // GROUP * 4).to(tl.pointer_type(tl.bfloat16))
    else:
        latent_row = row_ptr.to(tl.pointer_type(tl.bfloat16))
        tl.store(latent_row + columns, normed.to(tl.bfloat16), mask=writable & inside)
        rope_ptr = latent_row + RANK
    tl.store(rope_ptr + 2 * pairs, first.to(tl.bfloat16), mask=writable & in_rope)
    tl.store(rope_ptr + 2 * pairs + 1, second.to(tl.bfloat16), mask=writable & in_rope)


def write_latent(
    plane: Tensor, slots: Tensor, latent: Tensor, rope_key: Tensor, norm_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, layout: CacheLayout,
) -> None:  # fmt: skip
    """``seamount.kernels.cache_write.write_latent`` in the fp8 and bf16 layouts, one launch.

    latent and rope_key may be slices of one wider tensor. A slot outside the plane is skipped.
    """
    tokens, rank, half = slots.shape[0], layout.kv_lora_rank, layout.qk_rope_head_dim // 2
    if layout.name not in ("fp8", "bf16"):
        raise ValueError(f"layout is {layout.name!r}; the kernel writes 'fp8' and 'bf16'")
    check_tensor("latent", latent, shape=(tokens, rank), dtypes=FLOATS, like=plane)
    check_tensor("rope_key", rope_key, shape=(tokens, 2 * half), dtypes=FLOATS, like=plane)
    check_tensor("norm_weight", norm_weight, shape=(rank,), dtypes=FLOATS, like=plane)
    _check_write(plane, slots, cos, sin, half, PAGE_SIZE * layout.latent_bytes_per_token)
    if not tokens:
        return
    group = BLOCK_SIZE if layout.name == "fp8" else min(BLOCK_SIZE, triton.next_power_of_2(rank))
    _write_latent_kernel[(tokens,)](
        plane, slots, latent, rope_key, norm_weight, cos, sin,
        plane.shape[0] * PAGE_SIZE, latent.stride(0), rope_key.stride(0), eps,
        RANK=rank, GROUPS=triton.next_power_of_2(triton.cdiv(rank, group)), GROUP=group,
        HALF=half, HALF_PADDED=triton.next_power_of_2(max(half, 1)),
        FP8=layout.name == "fp8", TOKEN_BYTES=layout.latent_bytes_per_token,
        num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _hadamard(x, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """x: [ROWS, SIZE]. Multiplies each row by Sylvester's matrix / sqrt(SIZE)."""
    ROWS: tl.constexpr = x.shape[0]
    for _ in tl.static_range(STAGES):
        # One butterfly over the lowest index bit, which then becomes the highest: after all stages each bit has been
        # transformed and is back in its place.
        even, odd = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, SIZE))
    return x * (SIZE**-0.5)


@triton.jit
def _rotate(own, partner, cos_ptr, sin_ptr, columns, HALF: tl.constexpr):
    """Half-split rope of one token's channels [.., D]; partner: the other channel of each one's pair."""
    rotated = columns < 2 * HALF
    pair = columns % HALF
    cos = tl.load(cos_ptr + pair, mask=rotated, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + pair, mask=rotated, other=0.0).to(tl.float32)[None, :]
    turned = tl.where((columns < HALF)[None, :], own * cos - partner * sin, partner * sin + own * cos)
    return tl.where(rotated[None, :], turned, own)


@triton.jit
def _partner_columns(columns, HALF: tl.constexpr):
    return tl.where(columns < HALF, columns + HALF, tl.where(columns < 2 * HALF, columns - HALF, columns))


@triton.jit
def _write_index_key_kernel(
    plane_ptr, slot_ptr, key_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, num_slots, key_stride, eps,
    DIM: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    writable = (slot >= 0) & (slot < num_slots)
    columns = tl.arange(0, DIM)
    others = _partner_columns(columns, HALF)
    key_row = key_ptr + token * key_stride
    key = tl.load(key_row + columns).to(tl.float32)
    partner = tl.load(key_row + others).to(tl.float32)
    mean = tl.sum(key, axis=0) / DIM
    centred = key - mean
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / DIM + eps)
    own = centred * scale * tl.load(weight_ptr + columns).to(tl.float32) + tl.load(bias_ptr + columns).to(tl.float32)
    other = (partner - mean) * scale * tl.load(weight_ptr + others).to(tl.float32)
    other += tl.load(bias_ptr + others).to(tl.float32)
    turned = _rotate(own[None, :], other[None, :], cos_ptr + token * HALF, sin_ptr + token * HALF, columns, HALF)
    values, scales = quantize_rows(_hadamard(turned, DIM, STAGES))
    page_ptr = plane_ptr + slot // _PAGE * PAGE_BYTES
    offset = slot % _PAGE
    tl.store(page_ptr + offset * DIM + columns[None, :], values.to(tl.uint8, bitcast=True), mask=writable)
    scale_ptr = (page_ptr + _PAGE * DIM).to(tl.pointer_type(tl.float32)) + offset
    tl.store(scale_ptr + tl.arange(0, 1), scales, mask=writable)


def write_index_key(
    plane: Tensor, slots: Tensor, key: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    cos: Tensor, sin: Tensor, layout: CacheLayout,
) -> None:  # fmt: skip
    """``seamount.kernels.cache_write.write_index_key`` in the layouts with e4m3 keys, one launch.

    norm_weight is float32, as checkpoints have it: nothing is rounded before the quantiser.
    A slot outside the plane is skipped.
    """
    tokens, dim, half = slots.shape[0], layout.index_head_dim, cos.shape[-1]
    if not layout.quantizes_index:
        raise ValueError(f"layout is {layout.name!r}; the kernel writes 'fp8' and 'bf16'")
    if 2 * half > dim or dim < 16:
        raise ValueError(f"cos has {half} angles and keys {dim} channels; the kernel needs 16 channels and 2 an angle")
    check_tensor("key", key, shape=(tokens, dim), dtypes=FLOATS, like=plane)
    check_tensor("norm_weight", norm_weight, shape=(dim,), dtypes=(torch.float32,), like=plane)
    check_tensor("norm_bias", norm_bias, shape=(dim,), dtypes=FLOATS, like=plane)
    _check_write(plane, slots, cos, sin, half, PAGE_SIZE * layout.index_bytes_per_token)
    if not tokens:
        return
    _write_index_key_kernel[(tokens,)](
        plane, slots, key, norm_weight, norm_bias, cos, sin, plane.shape[0] * PAGE_SIZE, key.stride(0), eps,
        DIM=dim, STAGES=dim.bit_length() - 1, HALF=half, PAGE_BYTES=PAGE_SIZE * layout.index_bytes_per_token,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _rotate_vectors_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, num_heads, token_stride, head_stride,
    DIM: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, DIM)
    inside = (heads < num_heads)[:, None]
    source = x_ptr + token * token_stride + heads[:, None] * head_stride
    own = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + _partner_columns(columns, HALF)[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = _rotate(own, other, cos_ptr + token * HALF, sin_ptr + token * HALF, columns, HALF)
    if not QUANTIZE:
        # The rotation's result has x's dtype; on the way to the quantiser it stays float32.
        turned = turned.to(x_ptr.dtype.element_ty).to(tl.float32)
    out = _hadamard(turned, DIM, STAGES)
    rows = token * num_heads + heads
    target = out_ptr + rows[:, None] * DIM + columns[None, :]
    if QUANTIZE:
        values, scales = quantize_rows(out)
        tl.store(target, values, mask=inside)
        tl.store(scale_ptr + rows, scales, mask=heads < num_heads)
    else:
        tl.store(target, out.to(x_ptr.dtype.element_ty), mask=inside)


def rotate_index_vectors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``seamount.kernels.cache_write.rotate_index_vectors``: half-split rope, then Hadamard, in one launch."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate_vectors(x, cos, sin, out, None)
    return out


def rotate_quantize_index_vectors(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate_index_vectors``, then ``quantize`` with one scale a vector, in one launch: (q like x, s [..., 1])."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _rotate_vectors(x, cos, sin, values, scales)
    return values, scales


def _rotate_vectors(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, scales: Tensor | None) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {list(x.shape)}; it must be [tokens, channels] or [tokens, heads, channels]")
    dim, half = x.shape[-1], cos.shape[-1]
    if dim < 16 or dim & (dim - 1) or 2 * half > dim:
        raise ValueError(f"x has {dim} channels and cos {half} angles; the kernel needs a power of two, 2 an angle")
    check_tensor("x", x, shape=x.shape, dtypes=FLOATS, like=x)
    check_tensor("cos", cos, shape=(x.shape[0], half), dtypes=FLOATS, like=x, contiguous=True)
    check_tensor("sin", sin, shape=(x.shape[0], half), dtypes=FLOATS, like=x, contiguous=True)
    if not x.numel():
        return
    num_heads = x.shape[1] if x.dim() == 3 else 1
    heads = min(16, triton.next_power_of_2(num_heads))
    _rotate_vectors_kernel[(x.shape[0], triton.cdiv(num_heads, heads))](
        x, cos, sin, out, out if scales is None else scales, num_heads,
        x.stride(0), x.stride(1) if x.dim() == 3 else 0,
        DIM=dim, STAGES=dim.bit_length() - 1, HALF=half, HEADS=heads, QUANTIZE=scales is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _check_write(plane: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, half: int, page_bytes: int) -> None:
    tokens = slots.shape[0]
    check_tensor("plane", plane, shape=(None, page_bytes), dtypes=(torch.uint8,), like=plane, contiguous=True)
    if plane.data_ptr() % 16:
        raise ValueError("plane does not start at a multiple of 16 bytes; scales and rope are written as wider numbers")
    check_tensor("slots", slots, shape=(tokens,), dtypes=(torch.int64,), like=plane, contiguous=True)
    check_tensor("cos", cos, shape=(tokens, half), dtypes=FLOATS, like=plane, contiguous=True)
    check_tensor("sin", sin, shape=(tokens, half), dtypes=FLOATS, like=plane, contiguous=True)


@triton.jit
def _checksum_kernel(page_ptr, sum_ptr, num_pages, num_words, WORDS: tl.constexpr, PAGES: tl.constexpr):
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = words < num_words
    state = (words + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    multipliers = ((state ^ (state >> 31)) | 1).to(tl.int64, bitcast=True)
    for i in range(PAGES):
        page = tl.program_id(0).to(tl.int64) * PAGES + i
        values = tl.load(page_ptr + page * num_words + words, mask=inside & (page < num_pages), other=0)
        total = tl.sum(values.to(tl.int64) * multipliers, axis=0)
        tl.atomic_add(sum_ptr + page, total, mask=page < num_pages, sem="relaxed")


def page_checksum(pages: Tensor) -> Tensor:
    """``seamount.kernels.cache_write.page_checksum``, the same 64 bits."""
    check_tensor("pages", pages, shape=(None, None), dtypes=(torch.uint8,), like=pages, contiguous=True)
    if pages.shape[1] % 4:
        raise ValueError(f"pages have {pages.shape[1]} bytes; checksums need a multiple of 4")
    if pages.data_ptr() % 4:
        raise ValueError("pages do not start at a multiple of 4 bytes; they are read as words of 4")
    sums = torch.zeros(pages.shape[0], dtype=torch.int64, device=pages.device)
    words = pages.shape[1] // 4
    if pages.numel():
        # Few pages: one a program, for the sake of the idle multiprocessors.
        per_program = 1 if pages.shape[0] < 64 else _CHECKSUM_PAGES
        # Pages along the first axis: the others end at 65,535 programs.
        grid = (triton.cdiv(pages.shape[0], per_program), triton.cdiv(words, _CHECKSUM_WORDS))
        _checksum_kernel[grid](
            pages.view(torch.int32), sums, pages.shape[0], words,
            WORDS=_CHECKSUM_WORDS, PAGES=per_program, num_warps=4,
        )  # fmt: skip
    return sums
