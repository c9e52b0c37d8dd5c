"""Indexer scores over paged keys on the GPU.

    I[b, n, s] = k_scale[s] * sum_h w[b, n, h] * ReLU(q[b, n, h] . k[s]),   -inf at s >= length[b, n]

Tiles: 128 tokens (two pages) of e4m3 keys against all heads of one query: one product [128, D] x [D, H] on the tensor
cores, H/4 partial sums a thread, two shuffles. A program walks a few tiles of one sequence, the next tiles' keys
already on their way to shared memory; several programs share an SM. Two queries of a sequence (next_n) read a tile
once. Programs beyond a sequence's length only write -inf. Where the k best are wanted, the samples that top-k begins
with are stored with the scores. On Hopper the usual sizes have a kernel of their own: ``indexer_hopper.py``.
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
from seamount.kernels.triton import indexer_hopper
from seamount.kernels.triton.topk import (
    Samples,
    empty_samples,
    num_samples,
    sample_shift,
    select_rows,
    wants_samples,
)

_TOKENS = 128
# Sequences of a launch, which lie along the grid's second axis.
_MAX_SEQUENCES = 65535


@triton.jit
def _store(logits, at, width, out, samples, shift, SAMPLES: tl.constexpr):
    # Selection reads the scores next: the keys that stream by shall not push them out of the L2.
    tl.store(out + at, logits, mask=at < width, eviction_policy="evict_last" if SAMPLES else "")
    if SAMPLES:
        tl.store(samples + (at >> shift), logits, mask=(at & ((1 << shift) - 1)) == 0)


@triton.jit(do_not_specialize=["num_pages", "table_stride", "tiles_per_program", "shift"])
def _paged_logits(
    q,
    keys,
    scales,
    weights,
    lengths,
    page_tables,
    out,
    samples,
    arrivals,
    num_pages,
    table_stride,
    tiles_per_program,
    shift,
    NEXT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SAMPLES: tl.constexpr,
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
    samples += sequence * NEXT * SAMPLES

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
        logits = tl.where(at < length_0, logits, float("-inf"))
        _store(logits, at, width, out, samples, shift, SAMPLES)
        if NEXT == 2:
            scores = tl.maximum(tl.dot(key, query_1.T), 0.0)
            logits = tl.sum(scores * weight_1[None, :], axis=1) * scale
            logits = tl.where(at < length_1, logits, float("-inf"))
            _store(logits, at, width, out + width, samples + SAMPLES, shift, SAMPLES)
    if SAMPLES:  # noqa: SIM102 (this one is the compiler's)
        if tl.program_id(0) == 0:
            for n in tl.static_range(NEXT):
                tl.store(arrivals + sequence * NEXT + n, 0)
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
    if q.shape[1] > 2:
        flat = _one_query_each(q, weights, context_lens, page_tables)
        return paged_mqa_logits(flat[0], plane, *flat[1:], layout).view(*q.shape[:2], -1)
    return _write_scores(q, plane, weights, context_lens, page_tables, None)


def paged_topk_indices(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, layout: CacheLayout, k: int
) -> Tensor:
    """See ``seamount.kernels.indexer.paged_topk_indices``; arguments are checked there. q: [B, N, H, D]."""
    batch, queries = q.shape[:2]
    if queries > 2:
        flat = _one_query_each(q, weights, context_lens, page_tables)
        return paged_topk_indices(flat[0], plane, *flat[1:], layout, k).view(batch, queries, k)
    context_lens = context_lens.contiguous()
    width = page_tables.shape[1] * PAGE_SIZE
    samples = empty_samples(batch * queries, width, q.device) if wants_samples(width) else None
    scores = _write_scores(q, plane, weights, context_lens, page_tables, samples)
    rows = select_rows(scores.view(batch * queries, width), context_lens.view(-1), k, samples)
    return rows.view(batch, queries, k)


def _one_query_each(
    q: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every query as a sequence of its own: more than two at once need more accumulators than fit."""
    tables = page_tables.repeat_interleave(q.shape[1], 0)
    return q.flatten(0, 1)[:, None], weights.flatten(0, 1)[:, None], context_lens.flatten()[:, None], tables


def _write_scores(
    q: Tensor, plane: Tensor, weights: Tensor, context_lens: Tensor, page_tables: Tensor, samples: Samples | None
) -> Tensor:
    """[B, N, P * 64] float32 for N of 1 or 2; samples: of B N rows, written, or None."""
    batch, queries, heads, dim = q.shape
    num_pages = page_tables.shape[1]
    width = num_pages * PAGE_SIZE
    out = torch.empty((batch, queries, width), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    q, weights = q.to(torch.float8_e4m3fn).contiguous(), weights.to(torch.float32).contiguous()
    context_lens = context_lens.contiguous()
    hopper = indexer_hopper.is_supported(heads, dim, q.device)
    launch = indexer_hopper.write_scores if hopper else _launch
    if batch <= _MAX_SEQUENCES:
        launch(q, plane, weights, context_lens, page_tables, out, samples)
        return out
    for start in range(0, batch, _MAX_SEQUENCES):
        part = slice(start, start + _MAX_SEQUENCES)
        rows = slice(start * queries, (start + _MAX_SEQUENCES) * queries)
        part_samples = samples and Samples(samples.scores[rows], samples.arrivals[rows])
        launch(q[part], plane, weights[part], context_lens[part], page_tables[part], out[part], part_samples)
    return out


def _launch(
    q: Tensor,
    plane: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_tables: Tensor,
    out: Tensor,
    samples: Samples | None,
) -> None:
    """Arguments as ``indexer_hopper.write_scores`` takes them, of any sizes."""
    batch, queries, heads, dim = q.shape
    num_pages = page_tables.shape[1]
    width = num_pages * PAGE_SIZE
    num_tiles = triton.cdiv(width, _TOKENS)
    # About eight programs an SM if there is work for them; at most eight tiles each, so that the last wave is short. A
    # power of two deals most rows evenly.
    tiles_per_program = max(1, min(8, batch * num_tiles // (8 * _num_sms(q.device))))
    tiles_per_program = 1 << (tiles_per_program.bit_length() - 1)
    _paged_logits[(triton.cdiv(num_tiles, tiles_per_program), batch)](
        q,
        plane.view(torch.float8_e4m3fn),
        plane.view(torch.float32),
        weights,
        lengths,
        page_tables,
        out,
        *(samples or Samples(out, lengths)),
        num_pages,
        page_tables.stride(0),
        tiles_per_program,
        sample_shift(width),
        NEXT=queries,
        HEADS=heads,
        BLOCK_HEADS=max(16, triton.next_power_of_2(heads)),
        DIM=dim,
        TOKENS=_TOKENS,
        STAGES=2,
        SAMPLES=num_samples(width) if samples else 0,
        num_warps=4,
        num_stages=2,
    )
