"""Triton kernels of ``index_scores``: tiles of 128 rows by 128 keys, one product on the tensor cores for each head.

Arrays: q [B, R, H, D] and k [B, T, D] bfloat16, weights and lse [B, H, R], starts and rows [B, R] int64, scores and
mass [B, R, T]. A tile without a visible pair costs nothing but its output. Work: 2 H D flops a pair for the scores,
twice that for either gradient, against 4 and 2 bytes of a pair's score: bound by the tensor cores.
"""

import triton
import triton.language as tl


@triton.jit
def _visible(starts, rows, at, key):
    start, row = tl.load(starts + at), tl.load(rows + at)
    return (key[None, :] >= start[:, None]) & (key[None, :] <= row[:, None])


@triton.jit
def scores(q, k, weights, starts, rows, out, count, length, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, DIM)
    seen = _visible(starts, rows, batch * count + row, key)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    if tl.max(seen.to(tl.int32)) > 0:
        keys = tl.load(k + (batch * length + key[None, :]) * DIM + channel[:, None])
        q_at = q + (batch * count + row[:, None]) * (HEADS * DIM) + channel[None, :]
        w_at = weights + batch * HEADS * count + row
        for head in tl.range(0, HEADS, num_stages=3):
            products = tl.dot(tl.load(q_at + head * DIM), keys)
            weight = tl.load(w_at + head * count)
            total += tl.maximum(products, 0.0) * weight[:, None]
    out_at = out + (batch * count + row[:, None]) * length + key[None, :]
    tl.store(out_at, tl.where(seen, total, float("-inf")))


@triton.jit
def query_gradients(
    q, k, weights, starts, rows, d_scores, d_q, d_weights, count, length,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head of one tile of rows: dq = w sum_s d [S > 0] k, dw = sum_s d ReLU(S) with S = q k^T."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(0)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, DIM)
    at = batch * count + row
    first = tl.min(tl.load(starts + at)).to(tl.int32) // TILE
    end = tl.max(tl.load(rows + at)).to(tl.int32) // TILE + 1
    q_at = at[:, None] * (HEADS * DIM) + head * DIM + channel[None, :]
    queries = tl.load(q + q_at)
    gradient = tl.zeros((TILE, DIM), dtype=tl.float32)
    d_weight = tl.zeros((TILE,), dtype=tl.float32)
    for tile in tl.range(first, end, num_stages=2):
        key = tile * TILE + tl.arange(0, TILE)
        keys = tl.load(k + (batch * length + key[:, None]) * DIM + channel[None, :])
        d = tl.load(d_scores + at[:, None] * length + key[None, :])
        products = tl.dot(queries, keys.T)
        d_weight += tl.sum(d.to(tl.float32) * tl.maximum(products, 0.0), 1)
        gradient += tl.dot(tl.where(products > 0, d, 0.0).to(keys.dtype), keys)
    w_at = (batch * HEADS + head) * count + row
    weight = tl.load(weights + w_at)
    tl.store(d_q + q_at, (gradient * weight[:, None]).to(queries.dtype))
    tl.store(d_weights + w_at, d_weight)


@triton.jit
def key_gradients(
    q, k, weights, starts, rows, d_scores, d_k, count, length,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One group of heads of one tile of keys: dk = sum_r sum_h d w [S > 0] q; d_k: [GROUPS, B, T, D] float32."""
    batch, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    key = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, DIM)
    k_at = (batch * length + key[:, None]) * DIM + channel[None, :]
    keys = tl.load(k + k_at)
    gradient = tl.zeros((TILE, DIM), dtype=tl.float32)
    for tile in range(count // TILE):
        row = tile * TILE + tl.arange(0, TILE)
        at = batch * count + row
        first, last = tl.min(tl.load(starts + at)), tl.max(tl.load(rows + at))
        if (first < (tl.program_id(0) + 1) * TILE) & (last >= tl.program_id(0) * TILE):
            # [keys, rows]: what is not visible has gradient 0.
            d = tl.load(d_scores + at[None, :] * length + key[:, None])
            for head in tl.range(group * (HEADS // GROUPS), (group + 1) * (HEADS // GROUPS), num_stages=2):
                queries = tl.load(q + at[:, None] * (HEADS * DIM) + head * DIM + channel[None, :])
                weight = tl.load(weights + (batch * HEADS + head) * count + row)
                products = tl.dot(keys, queries.T)
                scaled = tl.where(products > 0, d.to(tl.float32) * weight[None, :], 0.0)
                gradient += tl.dot(scaled.to(queries.dtype), queries)
    batches = tl.num_programs(2)
    tl.store(d_k + group.to(tl.int64) * batches * length * DIM + k_at, gradient)


@triton.jit
def mass(
    q, k, lse, starts, rows, out, count, length, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_DIM)
    seen = _visible(starts, rows, batch * count + row, key)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    if tl.max(seen.to(tl.int32)) > 0:
        q_at = q + (batch * count + row[:, None]) * (HEADS * DIM) + channel[None, :]
        k_at = k + (batch * length + key[None, :]) * (HEADS * DIM) + channel[:, None]
        lse_at = lse + batch * HEADS * count + row
        for head in tl.range(0, HEADS, num_stages=2):
            queries = tl.load(q_at + head * DIM, mask=channel[None, :] < DIM, other=0.0)
            keys = tl.load(k_at + head * DIM, mask=channel[:, None] < DIM, other=0.0)
            logits = tl.dot(queries, keys) * scale - tl.load(lse_at + head * count)[:, None]
            # Invisible pairs may overflow here; they are dropped below.
            total += tl.exp(logits)
    out_at = out + (batch * count + row[:, None]) * length + key[None, :]
    tl.store(out_at, tl.where(seen, total / HEADS, 0.0))
