"""Multi-head latent attention of a chunk over all the tokens that it may see, in its two equal forms.

Absorbed (every head reads the same latent row, values are its first C channels):
    out[t, h] = sum_s p[t, h, s] kv[s, :C],   p = softmax_s(scale * q[t, h] . kv[s]),   s < lengths[t]
Plain (keys and values of each head expanded from the latent, the rotary part of a key shared by the heads):
    out[t, h] = sum_s p[t, h, s] v[s, h],     p = softmax_s(scale * q[t, h] . (k[s, h] | k_rope[s]))

lse[t, h] is the natural logarithm of the softmax's denominator. A row that sees no key has out 0 and lse +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.arguments import INTEGERS, check_current, check_tensor
from seamount.kernels.layout import CacheLayout, gather_slots, unpack_latent
from seamount.kernels.quant import wide_dtype
from seamount.kernels.softmax import masked_softmax
from seamount.kernels.sparse_mla import sparse_mla_prefill

# Elements of the [heads, rows, keys] scores that exist at one time; more where they are too few rows: every tile of
# rows reads all keys again.
_TILE_ELEMENTS = 1 << 21
_MIN_TILE_ROWS = 16


def dense_mla(
    q: Tensor, plane: Tensor, slots: Tensor, lengths: Tensor, layout: CacheLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Absorbed form, over the paged cache.

    q: [T, H, C + R] float32 or float64, latent part first; plane: a latent plane [num_pages, page bytes] uint8.
    slots: [L] int64, the context's physical slots in order; lengths: [T] int64: row t sees the first lengths[t] of
    them. T and L may be 0. Slots that no row sees may hold anything. Returns (out [T, H, C], lse [T, H]) in q's dtype.

    On CUDA with an fp8 or bf16 plane this is ``sparse_mla_prefill`` with every visible slot chosen: dtypes and errors
    as there.
    """
    if q.is_cuda and layout.name != "exact":
        check_tensor("slots", slots, (slots.numel(),), q.device, INTEGERS)
        check_tensor("lengths", lengths, q.shape[:1], q.device, INTEGERS)
        positions = torch.arange(slots.shape[0], device=slots.device)
        chosen = torch.where(_visible(lengths, slots.shape[0]), positions, -1)
        return sparse_mla_prefill(q, plane, slots, chosen, layout, scale)
    num_rows, heads, _ = q.shape
    # What lies in slots that no row sees must not reach the sums: 0 * NaN would.
    longest = int(lengths.max()) if num_rows else 0
    kv = unpack_latent(gather_slots(plane, slots[:longest], layout, "latent"), layout)
    unseen = ~_visible(lengths, kv.shape[0])
    out = q.new_empty((num_rows, heads, layout.kv_lora_rank))
    lse = q.new_empty((num_rows, heads))
    for rows in _tiles(num_rows, heads * kv.shape[0]):
        scores = (q[rows].flatten(0, 1) @ kv.T).view(*q[rows].shape[:2], kv.shape[0])
        probabilities, lse[rows] = masked_softmax(scores, unseen[rows].unsqueeze(1), scale)
        out[rows] = probabilities @ kv[:, : layout.kv_lora_rank]
    return out, lse


def dense_mha(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain form.

    q: [T, H, N + R]; k: [L, H, N]; k_rope: [L, R]; v: [L, H, V], one dtype, last dimensions dense; lengths: [T] int64:
    row t sees the first lengths[t] keys. T and L may be 0; keys and values that no row sees must be finite too.
    Returns (out [T, H, V] in q's dtype, lse [T, H] in float32, or float64 where q is).

    On CUDA with bfloat16 a kernel does this if N and V are powers of two from 16 to 256 and R is one to 128 or 0.
    Raises ValueError there for other shapes, dtypes, strides or devices, everywhere for other numbers of dimensions.
    """
    for name, x, dimensions in (("q", q, 3), ("k", k, 3), ("k_rope", k_rope, 2), ("v", v, 3)):
        if x.dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {dimensions} dimensions")
    if q.is_cuda and q.dtype == torch.bfloat16:
        from seamount.kernels.triton import dense_hopper
        from seamount.kernels.triton import dense_mla as dense_general

        if dense_general.is_supported(k.shape[2], k_rope.shape[1], v.shape[2]):
            _check(q, k, k_rope, v, lengths)
            if dense_hopper.is_supported(q, k, k_rope, v):
                return dense_hopper.dense_mha(q, k, k_rope, v, lengths, scale)
            return dense_general.dense_mha(q, k, k_rope, v, lengths, scale)
    num_rows, heads, _ = q.shape
    wide = wide_dtype(q.dtype)
    out = q.new_empty((num_rows, heads, v.shape[-1]))
    lse = q.new_empty((num_rows, heads), dtype=wide)
    k = torch.cat((k, k_rope.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
    keys, values = k.to(wide).permute(1, 2, 0), v.to(wide).transpose(0, 1)
    unseen = ~_visible(lengths, k.shape[0])
    for rows in _tiles(num_rows, heads * k.shape[0]):
        scores = torch.bmm(q[rows].to(wide).transpose(0, 1), keys)
        probabilities, tile_lse = masked_softmax(scores, unseen[rows], scale)
        out[rows] = torch.bmm(probabilities, values).transpose(0, 1)
        lse[rows] = tile_lse.transpose(0, 1)
    return out, lse


def _check(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, lengths: Tensor) -> None:
    check_current(q.device)
    num_keys, heads, nope = k.shape
    kind = (q.device, (torch.bfloat16,))
    check_tensor("q", q, (q.shape[0], heads, nope + k_rope.shape[1]), *kind)
    check_tensor("k", k, k.shape, *kind)
    check_tensor("k_rope", k_rope, (num_keys, k_rope.shape[1]), *kind)
    check_tensor("v", v, (num_keys, heads, v.shape[2]), *kind)
    check_tensor("lengths", lengths, q.shape[:1], q.device, INTEGERS)
    for name, x in (("q", q), ("k", k), ("k_rope", k_rope), ("v", v)):
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(f"{name} has strided channels; those of a head must be adjacent")


def _visible(lengths: Tensor, num_keys: int) -> Tensor:
    """[T, L] bool."""
    return torch.arange(num_keys, device=lengths.device) < lengths.unsqueeze(1)


def _tiles(num_rows: int, elements_per_row: int) -> list[slice]:
    tile = max(_MIN_TILE_ROWS, _TILE_ELEMENTS // max(1, elements_per_row))
    return [slice(start, start + tile) for start in range(0, num_rows, tile)]
