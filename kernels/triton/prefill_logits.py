"""Indexer scores of a prefill chunk on Hopper: many queries of one sequence against its paged keys.

    I[t, s] = k_scale[s] * sum_h w[t, h] * ReLU(q[t, h] . k[s]),   s < length[t],   64 heads of 128 channels

Tiles: a program keeps eight queries in shared memory and walks over keys one page (64 tokens) at a time. One warp
fetches pages by TMA into a ring of four: in the plane seen as rows of 128 bytes, a page is 66 rows, 64 keys and their
scales. Two warpgroups take four queries each, two at a time: a product [64 tokens, 128] x [128, 2 queries x 64 heads]
on the tensor cores, then ReLU, weights and the sum over heads in registers. A warpgroup begins its next product before
it sums the last, so that the tensor cores always have work.
    product of queries 2, 3 | sum of 0, 1 | product of 0, 1 with the next page | sum of 2, 3
Bytes: 128 a key and program from L2 (a key serves eight queries), 4 written a score.
Work: 16,384 flops a score: 512 tensor-core clocks a page and warpgroup, in which each of its warps has 350 instructions
to issue, 248 of them ReLU and multiply-add.
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

_DIM = 128
_HEADS = 64
# Queries of a program; of them two make one product.
_BLOCK = 8
_STAGES = 4
# Rows of 128 bytes, as TMA writes and the tensor cores read them.
_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
# [64 tokens, 2 queries x 64 heads] as a warpgroup's product leaves it: a thread has a quarter of each head sum.
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
# [64 tokens, 2 queries, 4 quarters]: a thread has the four quarters of one sum.
_QUARTERS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]],
        lane_bases=[[0, 1, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 2, 4],
    )
)
_LOGITS = gl.constexpr(gl.SliceLayout(2, _QUARTERS.value))


@gluon.jit
def _fetch(queries, keys, pages, first_pair, tiles):
    """One warp: the queries once, then page after page, each as soon as its buffer is free."""
    first_page, num_pages, q_tiles, k_tiles, q_full, full, empty = tiles
    STAGES: gl.constexpr = k_tiles.shape[0]
    mbarrier.expect(q_full, 4 * 128 * 128)
    for part in gl.static_range(4):
        tma.async_copy_global_to_shared(queries, [first_pair + part * 128, 0], q_full, q_tiles.index(part))
    pages += first_page
    page = gl.load(pages).to(gl.int32)
    for step in range(num_pages):
        buffer = step % STAGES
        next_page = gl.load(pages + gl.minimum(step + 1, num_pages - 1)).to(gl.int32)
        mbarrier.wait(empty.index(buffer), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(buffer), 64 * 128)
        tma.async_copy_global_to_shared(keys, [page * 66, 0], full.index(buffer), k_tiles.index(buffer))
        page = next_page


@gluon.jit
def _prepare(rows, first_query, first_page):
    """Of two queries: their weights; the keys each sees from the first page on; where their logits go."""
    weights, lengths, _, _, out, out_stride, num_queries = rows
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, _SCORES))
    real = first_query + column // 64 < num_queries
    weight = gl.expand_dims(gl.load(weights + first_query * 64 + column, mask=real, other=0.0), 0)
    query = first_query + gl.arange(0, 2, layout=gl.SliceLayout(0, _LOGITS))
    token = gl.expand_dims(first_page * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, _LOGITS)), 1)
    length = gl.load(lengths + query, mask=query < num_queries, other=0).to(gl.int32)
    seen = gl.expand_dims(length, 0) - token
    out_at = out + gl.expand_dims(query.to(gl.int64), 0) * out_stride + token
    return weight, seen, out_at, gl.expand_dims(query < num_queries, 0) & (token >= 0)


@gluon.jit
def _write(scores, scale, step, queries):
    """Two queries' logits of a page. Threads exchange quarters rather than reduce: each ends with one logit."""
    weight, seen, out_at, mask = queries
    weighted = gl.reshape(gl.maximum(scores, 0.0) * weight, [64, 2, 8, 4, 2])
    quarters = gl.sum(gl.reshape(weighted.permute((0, 1, 3, 2, 4)), [64, 2, 4, 16]), axis=3)
    logits = gl.sum(gl.convert_layout(quarters, _QUARTERS), axis=2) * gl.expand_dims(scale, 1)
    gl.store(out_at + step * 64, gl.where(seen > step * 64, logits, float("-inf")), mask=mask)


@gluon.jit
def _score(rows, tiles, first_query, PART: gl.constexpr):
    """Four warps: the logits of the program's queries 4 * PART to 4 * PART + 3."""
    _, _, scales, pages, _, _, _ = rows
    first_page, num_pages, q_tiles, k_tiles, q_full, full, empty = tiles
    STAGES: gl.constexpr = k_tiles.shape[0]
    first_query += 4 * PART
    queries_0 = _prepare(rows, first_query, first_page)
    queries_1 = _prepare(rows, first_query + 2, first_page)
    q_0 = q_tiles.index(2 * PART).permute((1, 0))
    q_1 = q_tiles.index(2 * PART + 1).permute((1, 0))
    # Scales are fetched a page ahead, page numbers two: their latency would show.
    pages += first_page
    scale_at = scales + gl.arange(0, 64, layout=gl.SliceLayout(1, _LOGITS))
    scale = gl.load(scale_at + gl.load(pages).to(gl.int64) * 2112)
    page = gl.load(pages + gl.minimum(1, num_pages - 1)).to(gl.int64)

    zeros = gl.zeros([64, 128], gl.float32, _SCORES)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(full.index(0), 0)
    running = warpgroup_mma(k_tiles.index(0), q_0, zeros, use_acc=False, is_async=True)
    for step in range(num_pages):
        buffer = step % STAGES
        scores = warpgroup_mma_wait(0, [running])
        running = warpgroup_mma(k_tiles.index(buffer), q_1, zeros, use_acc=False, is_async=True)
        next_scale = gl.load(scale_at + page * 2112)
        page = gl.load(pages + gl.minimum(step + 2, num_pages - 1)).to(gl.int64)
        _write(scores, scale, step, queries_0)
        # Behind the last page: the same buffer again, its scores unused, rather than a branch around the product.
        ahead = gl.minimum(step + 1, num_pages - 1)
        mbarrier.wait(full.index(ahead % STAGES), ahead // STAGES & 1)
        scores = warpgroup_mma_wait(0, [running])
        running = warpgroup_mma(k_tiles.index(ahead % STAGES), q_0, zeros, use_acc=False, is_async=True)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
        _write(scores, scale, step, queries_1)
        scale = next_scale
    warpgroup_mma_wait(0, [running])


@gluon.jit(do_not_specialize=["num_queries", "num_blocks", "pages_per_program"])
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
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    program = gl.program_id(0)
    # Later rows see more: they begin first.
    first_query = (num_blocks - 1 - program % num_blocks) * 8
    query = first_query + gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [4], [0]))
    length = gl.max(gl.load(lengths + query, mask=query < num_queries, other=0).to(gl.int32), axis=0)
    first_page = program // num_blocks * pages_per_program
    num_pages = gl.minimum(pages_per_program, (length + 63) // 64 - first_page)
    if num_pages > 0:
        q_tiles = gl.allocate_shared_memory(gl.float8e4nv, [4, 128, 128], ROWS)
        k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 64, 128], ROWS)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        for buffer in gl.static_range(STAGES):
            mbarrier.init(full.index(buffer), count=1)
            mbarrier.init(empty.index(buffer), count=2)
        rows = (weights, lengths, scales, pages, out, out_stride, num_queries)
        tiles = (first_page, num_pages, q_tiles, k_tiles, q_full, full, empty)
        gl.warp_specialize(
            [
                (_score, (rows, tiles, first_query, 0)),
                (_score, (rows, tiles, first_query, 1)),
                (_fetch, (queries, keys, pages, first_query * 64, tiles)),
            ],
            [4, 1],
            [232, 24],
        )


def is_supported(q: Tensor, layout: CacheLayout) -> bool:
    """Whether ``write_logits`` takes these queries and these pages."""
    return (
        layout.quantizes_index
        and (q.shape[1], layout.index_head_dim) == (_HEADS, _DIM)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _choose_splits(num_blocks: int, num_pages: int, num_sms: int) -> int:
    """Into how many programs the keys of a block of queries go: the fewest that end soonest.

    A program has an SM for itself; beginning and ending one takes as long as about four pages.
    """
    options = range(1, max(1, min(num_pages // 8, 2 * num_sms)) + 1)
    return min(options, key=lambda n: (-(-num_blocks * n // num_sms) * (-(-num_pages // n) + 4), n))


def write_logits(q: Tensor, plane: Tensor, weights: Tensor, lengths: Tensor, pages: Tensor, out: Tensor) -> None:
    """Writes out[t, s] for s < lengths[t], float32; elsewhere -inf or nothing. ``is_supported`` must hold.

    q: [T, 64, 128] e4m3; plane: an index plane; weights: [T, 64] float32; lengths: [T] and pages: [P] integers; all
    contiguous. out: [T, P * 64] float32, rows at any stride. T and P may be 0.
    """
    num_queries = q.shape[0]
    if num_queries == 0 or pages.shape[0] == 0:
        return
    num_blocks = triton.cdiv(num_queries, _BLOCK)
    splits = _choose_splits(num_blocks, pages.shape[0], _num_sms(q.device))
    rows = plane.view(torch.float8_e4m3fn).view(-1, _DIM)
    _prefill_logits[(num_blocks * splits,)](
        TensorDescriptor(q.view(-1, _DIM), [num_queries * _HEADS, _DIM], [_DIM, 1], [2 * _HEADS, _DIM], _ROWS),
        TensorDescriptor(rows, list(rows.shape), [_DIM, 1], [PAGE_SIZE, _DIM], _ROWS),
        weights,
        lengths,
        plane.view(torch.float32)[:, PAGE_SIZE * _DIM // 4 :],
        pages,
        out,
        out.stride(0),
        num_queries,
        num_blocks,
        triton.cdiv(pages.shape[0], splits),
        STAGES=_STAGES,
        ROWS=_ROWS,
        num_warps=4,
    )
