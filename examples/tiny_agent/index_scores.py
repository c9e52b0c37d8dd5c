"""The lightning indexer's scores of packed rows, without gradient.

    I[t, s] = sum_h w[t, h] ReLU(q[t, h] . k[s])        for starts[t] <= s <= t, else -inf

On CUDA one Triton program holds a tile of 128 queries by 128 keys in registers and walks over the heads, so that the
[rows, heads, keys] products never reach memory; tiles without a visible pair only write -inf. Work: 2 H D flops a pair
(16,384 with 64 heads of 128), against 4 bytes written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_TILE = 128


def index_scores(q: Tensor, k: Tensor, weights: Tensor, starts: Tensor, first: int, end: int) -> Tensor:
    """The rows first .. end - 1 against the keys 0 .. end - 1: [B, end - first, end] float32.

    q: [B, T, H, D]; k: [B, T, D]; weights: [B, T, H]; starts: [B, T] int64.
    """
    if q.is_cuda:
        return _fused(q, k, weights, starts, first, end)
    products = torch.einsum("brhd,btd->brht", q[:, first:end], k[:, :end]).relu().float()
    scores = (products * weights[:, first:end].unsqueeze(-1)).sum(2)
    key, row = torch.arange(end), torch.arange(first, end).unsqueeze(1)
    return scores.masked_fill((key > row) | (key < starts[:, first:end].unsqueeze(-1)), float("-inf"))


def _fused(q: Tensor, k: Tensor, weights: Tensor, starts: Tensor, first: int, end: int) -> Tensor:
    batch, length, heads, dim = q.shape
    if first % _TILE or end % _TILE:
        raise ValueError(f"the rows are {first} to {end}; on CUDA both must be multiples of {_TILE}")
    out = torch.empty((batch, end - first, end), dtype=torch.float32, device=q.device)
    q, k, starts = q.contiguous(), k.contiguous(), starts.contiguous()
    by_head = weights.transpose(1, 2).contiguous()
    grid = ((end - first) // _TILE, end // _TILE, batch)
    _kernel()[grid](q, k, by_head, starts, out, first, end, length, heads, dim, _TILE, num_warps=8)
    return out


@cache
def _kernel() -> Any:
    # Triton is there only where a GPU is.
    from examples.tiny_agent import index_scores_kernel

    return index_scores_kernel.scores
