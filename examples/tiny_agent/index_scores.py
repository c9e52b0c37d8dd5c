"""The lightning indexer's scores of chosen rows, with their gradients; and what they are compared with.

    I[r, s] = sum_h w[r, h] ReLU(q[r, h] . k[s])        for starts[r] <= s <= rows[r], else -inf
    p[r, s] = 1/H sum_h exp(scale q[r, h] . k[s, h] - lse[h, r])        for the same pairs, else 0

On CUDA Triton kernels (``index_kernels.py``) walk over the heads with a tile of rows by keys in registers, so that no
[rows, heads, keys] array ever exists; elsewhere plain PyTorch says the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

TILE = 128
"""On CUDA the numbers of rows and keys are multiples of it."""
_HEAD_GROUPS = 8


def visible(starts: Tensor, rows: Tensor, num_keys: int) -> Tensor:
    """[B, R, num_keys] bool: the pairs that have a score."""
    key = torch.arange(num_keys, device=rows.device)
    return (key >= starts.unsqueeze(-1)) & (key <= rows.unsqueeze(-1))


def index_scores(q: Tensor, k: Tensor, weights: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """I, differentiable in q, k and weights.

    q: [B, R, H, D]; k: [B, T, D]; weights: [B, R, H] float32; starts, rows: [B, R] int64, the first token that a row
    sees and its own number. Returns [B, R, T] float32.
    """
    if q.is_cuda:
        scores: Tensor = _IndexScores.apply(q, k, weights, starts, rows)
        return scores
    products = torch.einsum("brhd,btd->brht", q, k).relu().float()
    scores = (products * weights.unsqueeze(-1)).sum(2)
    return scores.masked_fill(~visible(starts, rows, k.shape[1]), float("-inf"))


def attention_mass(q: Tensor, k: Tensor, lse: Tensor, starts: Tensor, rows: Tensor, scale: float) -> Tensor:
    """p, without gradient: the heads' attention, summed and normalised to 1 over the tokens that ``lse`` is of.

    q: [B, R, H, N]; k: [B, T, H, N]; lse: [B, H, R] float32, log of each softmax's denominator. Returns [B, R, T]
    float32.
    """
    if q.is_cuda:
        return _fused_mass(q, k, lse, starts, rows, scale)
    logits = torch.einsum("brhd,bthd->bhrt", q, k).float() * scale
    mass = (logits - lse.unsqueeze(-1)).exp().mean(1)
    return mass.masked_fill(~visible(starts, rows, k.shape[1]), 0.0)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, weights: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
        q, k = q.contiguous(), k.contiguous()
        by_head = weights.transpose(1, 2).contiguous()
        starts, rows = starts.contiguous(), rows.contiguous()
        batch, count, heads, dim = q.shape
        out = torch.empty((batch, count, k.shape[1]), dtype=torch.float32, device=q.device)
        grid = (_tiles(count), _tiles(k.shape[1]), batch)
        _kernels().scores[grid](
            q, k, by_head, starts, rows, out, count, k.shape[1], HEADS=heads, DIM=dim, TILE=TILE, num_warps=8
        )
        ctx.save_for_backward(q, k, by_head, starts, rows)
        return out

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, by_head, starts, rows = ctx.saved_tensors
        batch, count, heads, dim = q.shape
        length = k.shape[1]
        d_scores = d_scores.to(q.dtype).contiguous()  # read once for each head
        sizes = {"HEADS": heads, "DIM": dim, "TILE": TILE}
        d_q, d_by_head = torch.empty_like(q), torch.empty_like(by_head)
        _kernels().query_gradients[(heads, _tiles(count), batch)](
            q, k, by_head, starts, rows, d_scores, d_q, d_by_head, count, length, **sizes, num_warps=8
        )
        parts = torch.empty((_HEAD_GROUPS, *k.shape), dtype=torch.float32, device=k.device)
        _kernels().key_gradients[(_tiles(length), _HEAD_GROUPS, batch)](
            q, k, by_head, starts, rows, d_scores, parts, count, length, **sizes, GROUPS=_HEAD_GROUPS, num_warps=8
        )
        return d_q, parts.sum(0).to(k.dtype), d_by_head.transpose(1, 2), None, None


def _fused_mass(q: Tensor, k: Tensor, lse: Tensor, starts: Tensor, rows: Tensor, scale: float) -> Tensor:
    batch, count, heads, dim = q.shape
    length = k.shape[1]
    out = torch.empty((batch, count, length), dtype=torch.float32, device=q.device)
    grid = (_tiles(count), _tiles(length), batch)
    operands = (q.contiguous(), k.contiguous(), lse.contiguous(), starts.contiguous(), rows.contiguous())
    block = 1 << (dim - 1).bit_length()
    _kernels().mass[grid](
        *operands, out, count, length, scale, HEADS=heads, DIM=dim, BLOCK_DIM=block, TILE=TILE, num_warps=8
    )
    return out


def _tiles(count: int) -> int:
    if count % TILE:
        raise ValueError(f"there are {count} rows or keys; on CUDA it must be a multiple of {TILE}")
    return count // TILE


@cache
def _kernels() -> Any:
    # Triton is there only where a GPU is.
    from examples.tiny_agent import index_kernels

    return index_kernels
