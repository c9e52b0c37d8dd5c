"""Multi-head latent attention over a contiguous context, in its two equal forms.

Absorbed (every head reads the same latent row, values are its first C channels):
    out[t, h] = sum_s p[t, h, s] kv[s, :C],   p = softmax_s(scale * q[t, h] . kv[s])
Plain (keys and values of each head expanded from the latent):
    out[t, h] = sum_s p[t, h, s] v[s, h],     p = softmax_s(scale * q[t, h] . k[s, h])

lse[t, h] is the natural logarithm of the softmax's denominator. A row that sees no key has out 0 and lse +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the [heads, rows, keys] scores that exist at one time; more where they are too few rows: every tile of
# rows reads all keys again.
_TILE_ELEMENTS = 1 << 21
_MIN_TILE_ROWS = 16


def dense_mla(q: Tensor, kv: Tensor, visible: Tensor, scale: float, value_dim: int) -> tuple[Tensor, Tensor]:
    """Absorbed form.

    q: [T, H, C + R] float32 or float64; kv: [L, C + R], the same dtype; value_dim: C.
    visible: [T, L] bool: which rows of kv a query sees (causality, selection). T and L may be 0. Rows of kv that are
    seen by no query must be finite too.
    Returns (out [T, H, C], lse [T, H]) in q's dtype.
    """
    num_rows, heads, _ = q.shape
    out = q.new_empty((num_rows, heads, value_dim))
    lse = q.new_empty((num_rows, heads))
    tile = max(_MIN_TILE_ROWS, _TILE_ELEMENTS // max(1, heads * kv.shape[0]))
    for start in range(0, num_rows, tile):
        rows = slice(start, start + tile)
        scores = (q[rows].flatten(0, 1) @ kv.T).view(*q[rows].shape[:2], kv.shape[0])
        probabilities, lse[rows] = masked_softmax(scores, ~visible[rows].unsqueeze(1), scale)
        out[rows] = probabilities @ kv[:, :value_dim]
    return out, lse


def dense_mha(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain form.

    q: [T, H, N + R]; k: [L, H, N + R]; v: [L, H, V]; ``visible`` and empty cases as in ``dense_mla``.
    Returns (out [T, H, V], lse [T, H]) in q's dtype.
    """
    num_rows, heads, _ = q.shape
    out = q.new_empty((num_rows, heads, v.shape[-1]))
    lse = q.new_empty((num_rows, heads))
    keys, values = k.permute(1, 2, 0), v.transpose(0, 1)
    tile = max(_MIN_TILE_ROWS, _TILE_ELEMENTS // max(1, heads * k.shape[0]))
    for start in range(0, num_rows, tile):
        rows = slice(start, start + tile)
        scores = torch.bmm(q[rows].transpose(0, 1), keys)
        probabilities, tile_lse = masked_softmax(scores, ~visible[rows], scale)
        out[rows] = torch.bmm(probabilities, values).transpose(0, 1)
        lse[rows] = tile_lse.transpose(0, 1)
    return out, lse


def masked_softmax(scores: Tensor, masked: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * scores) over the last dimension without the masked keys, and its log denominator.

    scores: [..., L], overwritten; masked: bool, broadcastable to it. L may be 0.
    Returns (probabilities [..., L], lse [...]); a row without any key has probabilities 0 and lse +inf.
    """
    scores.mul_(scale).masked_fill_(masked, float("-inf"))
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("inf"))
    top = scores.amax(dim=-1, keepdim=True)
    top.masked_fill_(top == float("-inf"), 0)
    scores.sub_(top).exp_()
    total = scores.sum(dim=-1, keepdim=True)
    empty = total == 0
    scores.div_(total.masked_fill(empty, 1))
    lse = (total.log() + top).masked_fill_(empty, float("inf"))
    return scores, lse.squeeze(-1)
