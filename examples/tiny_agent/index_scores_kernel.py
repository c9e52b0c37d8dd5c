"""The Triton kernel of ``index_scores``."""

import triton
import triton.language as tl


@triton.jit
def scores(q, k, weights, starts, out, first, end, length, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr):
    """q: [B, length, HEADS, DIM]; k: [B, length, DIM]; weights: [B, HEADS, length]; out: [B, end - first, end]."""
    batch = tl.program_id(2).to(tl.int64)
    row = first + tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, DIM)
    start = tl.load(starts + batch * length + row)
    visible = (key[None, :] >= start[:, None]) & (key[None, :] <= row[:, None])
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    if tl.max(visible.to(tl.int32)) > 0:
        keys = tl.load(k + (batch * length + key[None, :]) * DIM + channel[:, None])
        q_at = q + (batch * length + row[:, None]) * (HEADS * DIM) + channel[None, :]
        w_at = weights + batch * HEADS * length + row
        for head in tl.range(0, HEADS, num_stages=3):
            products = tl.dot(tl.load(q_at + head * DIM), keys)
            weight = tl.load(w_at + head * length)
            total += tl.maximum(products, 0.0) * weight[:, None]
    out_at = out + (batch * (end - first) + row[:, None] - first) * end + key[None, :]
    tl.store(out_at, tl.where(visible, total, float("-inf")))
