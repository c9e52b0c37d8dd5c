"""Indexer scores over paged keys on the GPU.

    I[b, n, s] = k_scale[s] * sum_h w[b, n, h] * ReLU(q[b, n, h] . k[s]),   -inf at s >= length[b, n]

Tiles: 128 tokens (two pages) of e4m3 keys against all heads of one query: one product [128, D] x [D, H] on the tensor
cores, H/4 partial sums a thread, two shuffles. A program walks a few tiles of one sequence, the next tiles' keys
already on their way to shared memory; several programs share an SM. Two queries of a sequence (next_n) read a tile
once. Programs beyond a sequence's length only write -inf.
Bytes: 132 a token (D = 128) read once, 4 written a query; D H a query read by each program (from L2).
Work: 2 D H flops a token and query, 124 for each byte: memory-bound up to four queries.
The tensor cores add e4m3 products over D in their own reduced accumulator, as every kernel on this chip does that does
not promote it: about 2^-13 of the largest partial sum.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE, CacheLayout

_TOKENS = 128


@triton.jit
def _paged_logits(
    q,
    keys,
    scales,
    weights,
    lengths,
    page_tables,
    out,
    num_pages,
    table_stride,
    tiles_per_program,
    NEXT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    PAGES: tl.constexpr = TOKENS // 64
    # Bytes of a page: 64 keys, then their 64 scales.
    PAGE_BYTES: tl.constexpr = 64 * DIM + 256
    sequence = tl.program_id(1).to(tl.int64)
    first_tile = tl.program_id(0) * tiles_per_program
    end_tile = tl.minimum(first_tile + tiles_per_program, (num_pages + PAGES - 1) // PAGES)
    length = tl.load(lengths + sequence * NEXT).to(tl.int32)
    for n in tl.static_range(1, NEXT):
        length = tl.maximum(length, tl.load(lengths + sequence * NEXT + n).to(tl.int32))
    end_used = tl.maximum(first_tile, tl.minimum(end_tile, (length + TOKENS - 1) // TOKENS))
    width = num_pages * 64
    token = tl.arange(0, TOKENS)
    out += sequence * NEXT * width
    page_tables += sequence * table_stride

    channel = tl.arange(0, DIM)
    head = tl.arange(0, BLOCK_HEADS)
    real = head < HEADS
    q_at = q + sequence * NEXT * HEADS * DIM + head[:, None] * DIM + channel[None, :]
    w_at = weights + sequence * NEXT * HEADS + head
    query_0 = tl.load(q_at, mask=real[:, None], other=0.0)
    weight_0 = tl.load(w_at, mask=real, other=0.0)
    length_0 = tl.load(lengths + sequence * NEXT).to(tl.int32)
    if NEXT == 2:
        query_1 = tl.load(q_at + HEADS * DIM, mask=real[:, None], other=0.0)
        weight_1 = tl.load(w_at + HEADS, mask=real, other=0.0)
        length_1 = tl.load(lengths + sequence * NEXT + 1).to(tl.int32)
    for tile in tl.range(first_tile, end_used, num_stages=STAGES):
        at = tile * TOKENS + token
        page = tl.load(page_tables + at // 64, mask=at < length, other=0).to(tl.int64)
        key = tl.load(keys + (page * PAGE_BYTES + (at % 64) * DIM)[:, None] + channel[None, :])
        scale = tl.load(scales + page * (PAGE_BYTES // 4) + 16 * DIM + at % 64)
        scores = tl.maximum(tl.dot(key, query_0.T), 0.0)
        logits = tl.sum(scores * weight_0[None, :], axis=1) * scale
        tl.store(out + at, tl.where(at < length_0, logits, float("-inf")), mask=at < width)
        if NEXT == 2:
            scores = tl.maximum(tl.dot(key, query_1.T), 0.0)
            logits = tl.sum(scores * weight_1[None, :], axis=1) * scale
            tl.store(out + width + at, tl.where(at < length_1, logits, float("-inf")), mask=at < width)
    for tile in range(end_used, end_tile):
        at = tile * TOKENS + token
        for n in tl.static_range(NEXT):
            tl.store(out + n * width + at, tl.full((TOKENS,), float("-inf"), tl.float32), mask=at < width)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def paged_mqa_logits(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, layout: CacheLayout
) -> Tensor:
    """See ``seamount.kernels.indexer.paged_mqa_logits``; arguments are checked there. q: [B, N, H, D]."""
    batch, queries, heads, dim = q.shape
    if queries > 2:
        # More accumulators than fit: each query walks the pages by itself.
        flat = paged_mqa_logits(
            q.flatten(0, 1).unsqueeze(1),
            plane,
            weights.flatten(0, 1).unsqueeze(1),
            context_lens.flatten().unsqueeze(1),
            page_tables.repeat_interleave(queries, 0),
            layout,
        )
        return flat.view(batch, queries, -1)
    num_pages = page_tables.shape[1]
    out = torch.empty((batch, queries, num_pages * PAGE_SIZE), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    num_tiles = triton.cdiv(num_pages * PAGE_SIZE, _TOKENS)
    # About eight programs an SM if there is work for them; at most eight tiles each, so that the last wave is short.
    tiles_per_program = max(1, min(8, batch * num_tiles // (8 * _num_sms(q.device))))
    _paged_logits[(triton.cdiv(num_tiles, tiles_per_program), batch)](
        q.to(torch.float8_e4m3fn).contiguous(),
        plane.view(torch.float8_e4m3fn),
        plane.view(torch.float32),
        weights.to(torch.float32).contiguous(),
        context_lens.contiguous(),
        page_tables,
        out,
        num_pages,
        page_tables.stride(0),
        tiles_per_program,
        NEXT=queries,
        HEADS=heads,
        BLOCK_HEADS=max(16, triton.next_power_of_2(heads)),
        DIM=dim,
        TOKENS=_TOKENS,
        STAGES=3,
        num_warps=4,
        num_stages=3,
    )
    return out
