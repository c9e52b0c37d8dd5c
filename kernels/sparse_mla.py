"""Multi-head latent attention (absorbed form) over the tokens that the indexer selected.

    out[t, h] = sum_j p[t, h, j] kv[i_j, :C],   p = softmax_j(scale * q[t, h] . kv[i_j]),   i = slots[t]

Slot -1 is no token, wherever it stands. A row without any token has out 0 and lse +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.arguments import INTEGERS, check_plane, check_tensor
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, gather_slots, unpack_latent
from seamount.kernels.quant import wide_dtype
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
    Slots must lie in the plane: nothing can check them before the launch. Raises ValueError for other shapes, dtypes,
    strides or devices.
    """
    if q.is_cuda and layout.name != "exact":
        _check(q, plane, slots, layout)
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
    q: Tensor, plane: Tensor, slots: Tensor, layout: CacheLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Many rows whose slots overlap, as those of one sequence do: ``sparse_mla_decode``, fit for that.

    Takes and returns what ``sparse_mla_decode`` does. On the CPU a slot that several rows chose is unpacked once; on
    CUDA nothing is copied.
    """
    if q.is_cuda and layout.name != "exact":
        _check(q, plane, slots, layout)
        from seamount.kernels.triton import sparse_mla

        return sparse_mla.sparse_mla_decode(q, plane, slots, layout, scale)
    num_rows, heads, _ = q.shape
    kv, indices = _distinct_latents(plane, slots, layout)
    out = q.new_empty((num_rows, heads, layout.kv_lora_rank))
    lse = q.new_empty((num_rows, heads))
    for rows in _tiles(num_rows, indices.shape[1] * layout.latent_dim):
        latents = kv.index_select(0, indices[rows].flatten()).view(*indices[rows].shape, layout.latent_dim)
        out[rows], lse[rows] = _attend(q[rows], latents, slots[rows] < 0, scale, layout.kv_lora_rank)
    return out, lse


def _check(q: Tensor, plane: Tensor, slots: Tensor, layout: CacheLayout) -> None:
    if q.dim() != 3 or q.shape[2] != layout.latent_dim:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [B, H, {layout.latent_dim}]")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype}; it must be bfloat16, float16 or float32")
    check_plane(plane, layout, "latent", q.device)
    if slots.dim() != 2:
        raise ValueError(f"slots has shape {tuple(slots.shape)}; it must be [B, k]")
    check_tensor("slots", slots, (q.shape[0], slots.shape[1]), q.device, INTEGERS)


def _distinct_latents(plane: Tensor, slots: Tensor, layout: CacheLayout) -> tuple[Tensor, Tensor]:
    """The latents [n, C + R] of all slots that some row chose, each once, and where each row finds its own: [T, k].

    Where ``slots`` is -1 the second result names any latent; without a single slot there is one, of zeros.
    """
    is_chosen = torch.zeros(plane.shape[0] * PAGE_SIZE, dtype=torch.bool, device=plane.device)
    is_chosen[slots[slots >= 0]] = True
    chosen = is_chosen.nonzero().squeeze(1)
    if chosen.shape[0] == 0:
        dtype = wide_dtype(layout.dtype)
        return torch.zeros((1, layout.latent_dim), dtype=dtype, device=plane.device), torch.zeros_like(slots)
    kv = unpack_latent(gather_slots(plane, chosen, layout, "latent"), layout)
    indices = (is_chosen.cumsum(0) - 1)[slots.clamp(min=0)]
    return kv, indices.clamp_(min=0)


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
