"""Indexer scores of a prefill chunk on Hopper: many queries of one sequence against its paged keys.

    I[t, s] = k_scale[s] * sum_h w[t, h] * ReLU(q[t, h] . k[s]),   s < length[t]

Tiles: a program holds 512 (query, head) pairs in shared memory, eight queries of 64 heads, and walks over keys one page
(64 tokens) at a time. One warp fetches pages by TMA into a ring of four: a page's keys are 64 whole rows of 128 bytes
in the plane seen as rows (a page is 66 rows, the last two its scales). Two warpgroups take 256 pairs each: one product
[64, 128] x [128, 256] on the tensor cores, then ReLU, weights, the sum over heads in registers. While one warpgroup
sums, the other multiplies.
Bytes: 128 a key and program from L2 (a key serves eight queries), 4 written a score.
Work: 2 * 128 * heads flops a score: 512 tensor-core clocks a tile and warpgroup, beside 394 instructions a warp, 248
of them ReLU and multiply-add. The tensor cores set the pace.
The tensor cores add e4m3 products over D in their own reduced accumulator: see ``indexer.py``.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seamount.kernels.layout import PAGE_SIZE, CacheLayout

_STAGES = 4
# Rows of 128 bytes, as TMA writes and the tensor cores read them.
_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def _fetch(queries, keys, pages, first_pair, tiles):
    """One warp: the queries once, then page after page, each as soon as its buffer is free."""
    first_page, num_pages, q_tile, k_tiles, q_full, full, empty = tiles
    STAGES: gl.constexpr = k_tiles.shape[0]
    PAIRS: gl.constexpr = q_tile.shape[0]
    mbarrier.expect(q_full, PAIRS * 128)
    for first in gl.static_range(0, PAIRS, 256):
        tma.async_copy_global_to_shared(queries, [first_pair + first, 0], q_full, q_tile.slice(first, 256, dim=0))
    for step in range(num_pages):
        buffer = step % STAGES
        mbarrier.wait(empty.index(buffer), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(buffer), 64 * 128)
        page = gl.load(pages + first_page + step).to(gl.int32)
        tma.async_copy_global_to_shared(keys, [page * 66, 0], full.index(buffer), k_tiles.index(buffer))


@gluon.jit
def _score(rows, tiles, HALF: gl.constexpr, HEADS: gl.constexpr):
    """Four warps: the logits of half of the program's queries."""
    weights, lengths, scales, pages, out, out_stride, first_query, num_queries = rows
    first_page, num_pages, q_tile, k_tiles, q_full, full, empty = tiles
    STAGES: gl.constexpr = k_tiles.shape[0]
    COLUMNS: gl.constexpr = q_tile.shape[0] // 2
    QUERIES: gl.constexpr = COLUMNS // HEADS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    zeros = gl.zeros([64, COLUMNS], gl.float32, SCORES)
    SUMS: gl.constexpr = gl.sum(gl.reshape(zeros, [64, QUERIES, HEADS]), axis=2).type.layout
    first_query += HALF * QUERIES
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SCORES))
    real = first_query + column // HEADS < num_queries
    weight = gl.expand_dims(gl.load(weights + first_query * HEADS + column, mask=real, other=0.0), 0)

    query = first_query + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, SUMS))
    offset = gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    length = gl.load(lengths + query, mask=query < num_queries, other=0).to(gl.int32)
    # Keys of the tile at hand that a query sees: column by column.
    seen = gl.expand_dims(length, 0) - gl.expand_dims(first_page * 64 + offset, 1)
    out_at = out + gl.expand_dims(query.to(gl.int64), 0) * out_stride + gl.expand_dims(first_page * 64 + offset, 1)
    mask = gl.expand_dims(query < num_queries, 0) & (gl.expand_dims(offset, 1) >= 0)

    pages += first_page
    page = gl.load(pages).to(gl.int64)
    scale = gl.load(scales + page * 2112 + offset)
    q_half = q_tile.slice(HALF * COLUMNS, COLUMNS, dim=0).permute((1, 0))
    mbarrier.wait(q_full, 0)
    for step in range(num_pages):
        buffer = step % STAGES
        page = gl.load(pages + gl.minimum(step + 1, num_pages - 1)).to(gl.int64)
        mbarrier.wait(full.index(buffer), step // STAGES & 1)
        scores = warpgroup_mma(k_tiles.index(buffer), q_half, zeros, use_acc=False, is_async=True)
        next_scale = gl.load(scales + page * 2112 + offset)
        scores = warpgroup_mma_wait(0, [scores])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
        weighted = gl.reshape(gl.maximum(scores, 0.0) * weight, [64, QUERIES, HEADS])
        logits = gl.sum(weighted, axis=2) * gl.expand_dims(scale, 1)
        gl.store(out_at + step * 64, gl.where(seen > step * 64, logits, float("-inf")), mask=mask)
        scale = next_scale


@gluon.jit
def _prefill_logits(
    queries,
    keys,
    weights,
    lengths,
    scales,
    pages,
    out,
    out_stride,
    num_queries,
    num_blocks,
    pages_per_program,
    HEADS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    BLOCK: gl.constexpr = 2 * COLUMNS // HEADS
    program = gl.program_id(0)
    # Later rows see more: they begin first.
    first_query = (num_blocks - 1 - program % num_blocks) * BLOCK
    query = first_query + gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    length = gl.max(gl.load(lengths + query, mask=query < num_queries, other=0).to(gl.int32), axis=0)
    first_page = program // num_blocks * pages_per_program
    num_pages = gl.minimum(pages_per_program, (length + 63) // 64 - first_page)
    if num_pages > 0:
        q_tile = gl.allocate_shared_memory(gl.float8e4nv, [2 * COLUMNS, 128], LAYOUT)
        k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 64, 128], LAYOUT)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        for buffer in gl.static_range(STAGES):
            mbarrier.init(full.index(buffer), count=1)
            mbarrier.init(empty.index(buffer), count=2)
        rows = (weights, lengths, scales, pages, out, out_stride, first_query, num_queries)
        tiles = (first_page, num_pages, q_tile, k_tiles, q_full, full, empty)
        gl.warp_specialize(
            [
                (_score, (rows, tiles, 0, HEADS)),
                (_score, (rows, tiles, 1, HEADS)),
                (_fetch, (queries, keys, pages, first_query * HEADS, tiles)),
            ],
            [4, 1],
            [232, 24],
        )


def is_supported(q: Tensor, layout: CacheLayout) -> bool:
    """Whether ``write_logits`` takes these queries and these pages."""
    return (
        layout.quantizes_index
        and layout.index_head_dim == 128
        and q.shape[1] in (16, 32, 64, 128)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _choose_splits(num_blocks: int, num_pages: int, num_sms: int) -> int:
    """Into how many programs the keys of a block of queries go: the fewest that end soonest.

    A program works alone on its SM; beginning and ending one takes as long as about four pages.
    """
    options = range(1, max(1, min(num_pages // 8, 2 * num_sms)) + 1)
    return min(options, key=lambda n: (-(-num_blocks * n // num_sms) * (-(-num_pages // n) + 4), n))


def write_logits(q: Tensor, plane: Tensor, weights: Tensor, lengths: Tensor, pages: Tensor, out: Tensor) -> None:
    """Writes out[t, s] for s < lengths[t], float32; elsewhere -inf or nothing. ``is_supported`` must hold.

    q: [T, H, 128] e4m3; plane: an index plane; weights: [T, H] float32; lengths: [T] and pages: [P] integers; all
    contiguous. out: [T, P * 64] or wider float32, rows at any stride. T and P may be 0.
    """
    num_queries, heads, dim = q.shape
    if num_queries == 0 or pages.shape[0] == 0:
        return
    columns = max(128, min(256, 4 * heads))
    num_blocks = triton.cdiv(num_queries * heads, 2 * columns)
    splits = _choose_splits(num_blocks, pages.shape[0], _num_sms(q.device))
    rows = plane.view(torch.float8_e4m3fn).view(-1, dim)
    _prefill_logits[(num_blocks * splits,)](
        TensorDescriptor(q.view(-1, dim), [num_queries * heads, dim], [dim, 1], [256, dim], _ROWS),
        TensorDescriptor(rows, list(rows.shape), [dim, 1], [PAGE_SIZE, dim], _ROWS),
        weights,
        lengths,
        plane.view(torch.float32)[:, PAGE_SIZE * dim // 4 :],
        pages,
        out,
        out.stride(0),
        num_queries,
        num_blocks,
        triton.cdiv(pages.shape[0], splits),
        HEADS=heads,
        COLUMNS=columns,
        STAGES=_STAGES,
        LAYOUT=_ROWS,
        num_warps=4,
    )
