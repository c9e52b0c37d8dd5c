"""Multi-head latent attention (absorbed form) over the tokens that the indexer selected.

    out[t, h] = sum_j p[t, h, j] kv[i_j, :C],   p = softmax_j(scale * q[t, h] . kv[i_j]),
    i = slots[t], or context[indices[t]]

-1 is no token, wherever it stands. A row without any token has out 0 and lse +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.arguments import INTEGERS, check_plane, check_tensor
from seamount.kernels.layout import CacheLayout, gather_slots, unpack_latent
from seamount.kernels.softmax import masked_softmax

# Elements of the gathered [rows, k, C + R] latents that exist at one time. Few enough to stay in a core's cache: larger
# tiles are slower (fresh memory for every temporary).
_TILE_ELEMENTS = 1 << 19


def sparse_mla_decode(
    q: Tensor, plane: Tensor, slots: Tensor, layout: CacheLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """One query a row, over slots of the paged cache; only these slots are read.

    q: [B, H, C + R] float32 or float64, latent part first; plane: a latent plane [num_pages, page bytes] uint8.
    slots: [B, k] int64 physical slots, -1 for none; distinct within a row. B and k may be 0.
    Returns (out [B, H, C], lse [B, H]) in q's dtype.

    On CUDA with an fp8 or bf16 plane: q may be bfloat16 (other dtypes are rounded to it), slots int32; lse is float32.
    Latents of an fp8 plane must stay below 65,504, float16's largest value, which an RMS norm sees to.
    Slots must lie in the plane: nothing can check them before the launch. Raises ValueError for other shapes, dtypes,
    strides or devices.
    """
    if q.is_cuda and layout.name != "exact":
        _check_query(q, plane, layout)
        _check_choice("slots", slots, q)
        from seamount.kernels.triton import sparse_mla

        return sparse_mla.sparse_mla_decode(q, plane, slots, layout, scale)
    batch, heads, _ = q.shape
    out = q.new_empty((batch, heads, layout.kv_lora_rank))
    lse = q.new_empty((batch, heads))
    for rows in _tiles(batch, slots.shape[1] * layout.latent_dim):
        latents = unpack_latent(gather_slots(plane, slots[rows].clamp(min=0).flatten(), layout, "latent"), layout)
        latents = latents.view(*slots[rows].shape, layout.latent_dim)
        out[rows], lse[rows] = _attend(q[rows], latents, slots[rows] < 0, scale, layout.kv_lora_rank)
    return out, lse


def sparse_mla_prefill(
    q: Tensor, plane: Tensor, context: Tensor, indices: Tensor, layout: CacheLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """The rows of one sequence over its context in the paged cache.

    q: [T, H, C + R] float32 or float64, latent part first; plane: a latent plane [num_pages, page bytes] uint8.
    context: [L] int64, the sequence's physical slots in order; indices: [T, k] int64 positions in it, -1 for none,
    distinct within a row. T, L and k may be 0. Context that no row chose may hold anything.
    Returns (out [T, H, C], lse [T, H]) in q's dtype.

    On CUDA with an fp8 or bf16 plane: q may be bfloat16 (other dtypes are rounded to it), the integers int32; lse is
    float32. Indices must lie in the context and slots in the plane: nothing can check them before the launch. Trailing
    -1 cost nothing, as the first queries of a sequence have them. Raises ValueError for other shapes, dtypes, strides
    or devices.
    """
    if q.is_cuda and layout.name != "exact":
        _check_query(q, plane, layout)
        check_tensor("context", context, (context.numel(),), q.device, INTEGERS)
        _check_choice("indices", indices, q)
        from seamount.kernels.triton import sparse_prefill

        return sparse_prefill.sparse_mla_prefill(q, plane, context, indices, layout, scale)
    num_rows, heads, _ = q.shape
    out = q.new_empty((num_rows, heads, layout.kv_lora_rank))
    lse = q.new_empty((num_rows, heads))
    kv = unpack_latent(gather_slots(plane, context, layout, "latent"), layout)
    if kv.shape[0] == 0:
        # What -1 points at below.
        kv = kv.new_zeros((1, layout.latent_dim))
    for rows in _tiles(num_rows, indices.shape[1] * layout.latent_dim):
        latents = kv.index_select(0, indices[rows].clamp(min=0).flatten()).view(*indices[rows].shape, layout.latent_dim)
        out[rows], lse[rows] = _attend(q[rows], latents, indices[rows] < 0, scale, layout.kv_lora_rank)
    return out, lse


def _check_query(q: Tensor, plane: Tensor, layout: CacheLayout) -> None:
    if q.dim() != 3 or q.shape[2] != layout.latent_dim:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [B, H, {layout.latent_dim}]")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype}; it must be bfloat16, float16 or float32")
    check_plane(plane, layout, "latent", q.device)


def _check_choice(name: str, chosen: Tensor, q: Tensor) -> None:
    if chosen.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(chosen.shape)}; it must be [{q.shape[0]}, k]")
    check_tensor(name, chosen, (q.shape[0], chosen.shape[1]), q.device, INTEGERS)


def _attend(q: Tensor, latents: Tensor, invalid: Tensor, scale: float, value_dim: int) -> tuple[Tensor, Tensor]:
    # Slot 0 stands in for -1 and may hold anything: 0 * NaN would reach the sum.
    if bool(invalid.any()):
        latents.masked_fill_(invalid.unsqueeze(-1), 0)
    scores = torch.bmm(q, latents.transpose(1, 2))
    probabilities, lse = masked_softmax(scores, invalid.unsqueeze(1), scale)
    return torch.bmm(probabilities, latents[..., :value_dim]), lse


def _tiles(num_rows: int, elements_per_row: int) -> list[slice]:
    tile = max(1, _TILE_ELEMENTS // max(1, elements_per_row))
    return [slice(start, start + tile) for start in range(0, num_rows, tile)]
