"""Writing new tokens into the caches, and checksums of pages that travel."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from seamount.kernels.hadamard import hadamard_transform
from seamount.kernels.layout import CacheLayout, pack_index_key, pack_latent, scatter_slots
from seamount.kernels.norms import layer_norm, rms_norm
from seamount.kernels.quant import quantize, wide_dtype
from seamount.kernels.rope import apply_rope_half, apply_rope_interleaved


def write_latent(
    plane: Tensor,
    slots: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    layout: CacheLayout,
) -> None:
    """Normalise and rotate a step's latents, quantise them as the layout says, and write them into their slots.

    plane: a latent plane [num_pages, page bytes] uint8; slots: [T] int64, distinct; T may be 0.
    latent: [T, C] and rope_key: [T, R], the two parts of kv_a_proj's output; norm_weight: [C]; cos, sin: [T, R / 2].
    Raises IndexError for a slot outside the plane; on a GPU such a slot is skipped instead.
    """
    if plane.is_cuda and layout.name != "exact" and layout.dtype != torch.float64:
        from seamount.kernels.triton import cache_write

        return cache_write.write_latent(plane, slots, latent, rope_key, norm_weight, eps, cos, sin, layout)
    rows = pack_latent(rms_norm(latent, norm_weight, eps), apply_rope_interleaved(rope_key, cos, sin), layout)
    return scatter_slots(plane, slots, rows, layout, "latent")


def write_index_key(
    plane: Tensor,
    slots: Tensor,
    key: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    layout: CacheLayout,
) -> None:
    """Normalise (LayerNorm), rotate the first R channels of, Hadamard-transform and quantise a step's indexer keys.

    plane: an index plane [num_pages, page bytes] uint8; slots: [T] int64, distinct; T may be 0.
    key: [T, D], wk's output; norm_weight, norm_bias: [D]; cos, sin: [T, R / 2].
    Raises IndexError for a slot outside the plane; on a GPU such a slot is skipped instead.
    """
    if plane.is_cuda and layout.quantizes_index and norm_weight.dtype == torch.float32 and layout.index_head_dim >= 16:
        from seamount.kernels.triton import cache_write

        return cache_write.write_index_key(plane, slots, key, norm_weight, norm_bias, eps, cos, sin, layout)
    # From here on in the norm's dtype: nothing is rounded between the projection and the quantiser.
    normed = layer_norm(key.to(norm_weight.dtype), norm_weight, norm_bias, eps)
    rows = pack_index_key(rotate_index_vectors(normed, cos, sin), layout)
    return scatter_slots(plane, slots, rows, layout, "index")


def rotate_index_vectors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What indexer queries [T, H, D] and keys [T, D] share: half-split rope on the first R channels, then Hadamard."""
    rope_dim = 2 * cos.shape[-1]
    if x.is_cuda and torch.float64 not in (x.dtype, cos.dtype) and x.shape[-1] >= 16:
        from seamount.kernels.triton import cache_write

        return cache_write.rotate_index_vectors(x, cos, sin)
    rotated = apply_rope_half(x[..., :rope_dim], cos, sin)
    return hadamard_transform(torch.cat((rotated, x[..., rope_dim:]), dim=-1))


def rotate_quantize_index_vectors(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate_index_vectors``, then one scale a vector: what scoring e4m3 keys takes of the queries.

    x: [T, H, D]; nothing is rounded between x and the quantiser.
    Returns (q [T, H, D] float8_e4m3fn, s [T, H, 1] float32).
    """
    if x.is_cuda and torch.float64 not in (x.dtype, cos.dtype) and x.shape[-1] >= 16:
        from seamount.kernels.triton import cache_write

        return cache_write.rotate_quantize_index_vectors(x, cos, sin)
    return quantize(rotate_index_vectors(x.to(wide_dtype(x.dtype)), cos, sin), block_size=x.shape[-1])


def page_checksum(pages: Tensor) -> Tensor:
    """A 64-bit checksum of each row of bytes, sensitive to the order of its 32-bit words.

        sum_i word_i * m_i  mod 2^64,   m_i = splitmix64(i) | 1,   words signed, little-endian

    The multipliers are odd, so a change within any one word is always seen; it guards against damage, not malice.

    pages: [n, bytes] uint8, contiguous, bytes a multiple of 4; n may be 0.
    Returns [n] int64, the sum's bits. Raises ValueError for another byte count.
    """
    if pages.shape[1] % 4:
        raise ValueError(f"pages have {pages.shape[1]} bytes; checksums need a multiple of 4")
    if pages.is_cuda:
        from seamount.kernels.triton import cache_write

        return cache_write.page_checksum(pages)
    words = pages.view(torch.int32)
    multipliers = _multipliers(words.shape[1], pages.device)
    sums = torch.empty(pages.shape[0], dtype=torch.int64, device=pages.device)
    # In tiles: the widened words are twice the bytes.
    tile = max(1, (1 << 20) // max(1, words.shape[1]))
    for start in range(0, pages.shape[0], tile):
        sums[start : start + tile] = words[start : start + tile].to(torch.int64) @ multipliers
    return sums


@cache
def _multipliers(count: int, device: torch.device) -> Tensor:
    # The first caller may be inside inference mode; the table is shared with callers outside.
    with torch.inference_mode(False):
        state = (torch.arange(1, count + 1, dtype=torch.int64)) * _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
        return ((state ^ _shift_right(state, 31)) | 1).to(device)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
