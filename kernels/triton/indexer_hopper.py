"""Indexer scores of decode on Hopper: one or two queries a sequence against its paged keys.

    I[b, n, s] = k_scale[s] * sum_h w[b, n, h] * ReLU(q[b, n, h] . k[s]),   s < length[b, n],   64 heads of 128 channels

Tiles: a program takes a few pages (64 tokens each) of one sequence. It asks for all of them at once, by TMA, each with
a barrier of its own (in the plane seen as rows of 128 bytes, a page is 66 rows: 64 keys and their scales), and
multiplies them as they come: a product [64 tokens, 128] x [128, 64 heads] a query, the next one running while ReLU,
weights and the sum over heads of the last are computed in registers. There is no ring of buffers: several programs
share an SM, and while one waits or begins, others multiply. A page is read once for both queries.
Bytes: 132 a token, 4 written a query; 8 KB of queries by each program, from L2.
Work: 16,384 flops a token and query, 124 for each byte: memory-bound.
The tensor cores add e4m3 products over D in their own reduced accumulator: see ``indexer.py``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.layout import PAGE_SIZE
from seamount.kernels.triton.topk import Samples, sample_shift

_DIM = 128
_HEADS = 64
# Rows of 128 bytes, as TMA writes and the tensor cores read them.
_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
# [64 tokens, 64 heads] as the product leaves it.
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
_TOKENS = gl.constexpr(gl.SliceLayout(1, _SCORES.value))


@gluon.jit
def _score_pages(
    queries,
    keys,
    scales,
    weights,
    lengths,
    pages,
    out,
    samples,
    sequence,
    first_page,
    num_pages,
    shift,
    tiles,
    NEXT: gl.constexpr,
    SAMPLES: gl.constexpr,
):
    q_tiles, k_tiles, q_full, full = tiles
    PAGES: gl.constexpr = k_tiles.shape[0]
    mbarrier.expect(q_full, NEXT * 64 * 128)
    for n in gl.static_range(NEXT):
        tma.async_copy_global_to_shared(queries, [(sequence * NEXT + n) * 64, 0], q_full, q_tiles.index(n))
    # Behind the table's last page: that one again, its scores not stored.
    for p in gl.static_range(PAGES):
        page = gl.load(pages + gl.minimum(first_page + p, num_pages - 1)).to(gl.int32)
        mbarrier.expect(full.index(p), 64 * 128)
        tma.async_copy_global_to_shared(keys, [page * 66, 0], full.index(p), k_tiles.index(p))
    token = gl.arange(0, 64, layout=_TOKENS)
    # The compiler's tuples grow, and know no unpacking.
    page_scales = ()
    for p in gl.static_range(PAGES):
        page = gl.load(pages + gl.minimum(first_page + p, num_pages - 1)).to(gl.int64)
        page_scales = page_scales + (gl.load(scales + page * 2112 + token),)  # type: ignore[assignment] # noqa: RUF005
    head = gl.arange(0, 64, layout=gl.SliceLayout(0, _SCORES))
    query_weights = ()
    query_lengths = ()
    for n in gl.static_range(NEXT):
        weight = gl.load(weights + (sequence * NEXT + n) * 64 + head)
        query_weights = query_weights + (gl.expand_dims(weight, 0),)  # type: ignore[assignment] # noqa: RUF005
        query_lengths = query_lengths + (gl.load(lengths + sequence * NEXT + n).to(gl.int32),)  # type: ignore[assignment] # noqa: RUF005

    # Selection reads the scores next: the keys that stream by shall not push them out of the L2.
    policy: gl.constexpr = "evict_last" if SAMPLES else ""
    width = num_pages * 64
    row = sequence.to(gl.int64) * NEXT
    zeros = gl.zeros([64, 64], gl.float32, _SCORES)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(full.index(0), 0)
    running = warpgroup_mma(k_tiles.index(0), q_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    for p in gl.static_range(PAGES):
        at = (first_page + p) * 64 + token
        for n in gl.static_range(NEXT):
            scores = warpgroup_mma_wait(0, [running])
            if n + 1 < NEXT:
                next_q = q_tiles.index(n + 1).permute((1, 0))
                running = warpgroup_mma(k_tiles.index(p), next_q, zeros, use_acc=False, is_async=True)
            elif p + 1 < PAGES:
                mbarrier.wait(full.index(p + 1), 0)
                first_q = q_tiles.index(0).permute((1, 0))
                running = warpgroup_mma(k_tiles.index(p + 1), first_q, zeros, use_acc=False, is_async=True)
            logits = gl.sum(gl.maximum(scores, 0.0) * query_weights[n], axis=1) * page_scales[p]
            logits = gl.where(at < query_lengths[n], logits, float("-inf"))
            gl.store(out + (row + n) * width + at, logits, mask=at < width, eviction_policy=policy)
            if SAMPLES:
                is_sample = ((at & ((1 << shift) - 1)) == 0) & (at < width)
                gl.store(samples + (row + n) * SAMPLES + (at >> shift), logits, mask=is_sample)


@gluon.jit(do_not_specialize=["num_pages", "table_stride", "shift"])
def _paged_logits(
    queries,
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
    shift,
    NEXT: gl.constexpr,
    PAGES: gl.constexpr,
    SAMPLES: gl.constexpr,
    ROWS: gl.constexpr,
):
    sequence = gl.program_id(1)
    first_page = gl.program_id(0) * PAGES
    q_tiles = gl.allocate_shared_memory(gl.float8e4nv, [NEXT, 64, 128], ROWS)
    k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [PAGES, 64, 128], ROWS)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [PAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for p in gl.static_range(PAGES):
        mbarrier.init(full.index(p), count=1)
    gl.thread_barrier()
    gdc_wait()
    gdc_launch_dependents()
    length = gl.load(lengths + sequence * NEXT).to(gl.int32)
    for n in gl.static_range(1, NEXT):
        length = gl.maximum(length, gl.load(lengths + sequence * NEXT + n).to(gl.int32))
    if SAMPLES:  # noqa: SIM102 (this one is the compiler's)
        if first_page == 0:
            for n in gl.static_range(NEXT):
                gl.store(arrivals + sequence * NEXT + n, 0)
    if first_page * 64 < length:
        pages = page_tables + sequence.to(gl.int64) * table_stride
        tiles = (q_tiles, k_tiles, q_full, full)
        _score_pages(
            queries, keys, scales, weights, lengths, pages, out, samples, sequence, first_page, num_pages, shift,
            tiles, NEXT, SAMPLES,
        )  # fmt: skip
    elif not SAMPLES:
        # The selection does not read what lies behind a row's length.
        width = num_pages * 64
        for n in gl.static_range(NEXT):
            for p in gl.static_range(PAGES):
                at = (first_page + p) * 64 + gl.arange(0, 64, layout=_TOKENS)
                unseen = gl.full([64], float("-inf"), gl.float32, _TOKENS)
                gl.store(out + (sequence.to(gl.int64) * NEXT + n) * width + at, unseen, mask=at < width)


def is_supported(heads: int, dim: int, device: torch.device) -> bool:
    """Whether ``write_scores`` takes queries of these sizes here."""
    return (heads, dim) == (_HEADS, _DIM) and torch.cuda.get_device_capability(device)[0] == 9


def _pages_per_program(batch: int, num_pages: int) -> int:
    """Few where few programs would leave SMs idle at the end; more where there are waves of them."""
    return 2 if batch * num_pages <= 4096 else 4


def write_scores(
    q: Tensor,
    plane: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_tables: Tensor,
    out: Tensor,
    samples: Samples | None,
) -> None:
    """Writes out and samples, which ``is_supported`` must allow; with samples nothing behind a sequence's pages.

    q: [B, N, 64, 128] e4m3; plane: an index plane; weights: [B, N, 64] float32; lengths: [B, N] integers, all
    contiguous. page_tables: [B, P] integers with adjacent columns. out: [B, N, P * 64] float32. B, N, P are 1 or more.
    """
    batch, queries = q.shape[:2]
    num_pages = page_tables.shape[1]
    pages = _pages_per_program(batch, num_pages)
    rows = plane.view(torch.float8_e4m3fn).view(-1, _DIM)
    heads = q.view(-1, _DIM)
    _paged_logits[(triton.cdiv(num_pages, pages), batch)](
        TensorDescriptor(heads, list(heads.shape), [_DIM, 1], [_HEADS, _DIM], _ROWS),
        TensorDescriptor(rows, list(rows.shape), [_DIM, 1], [PAGE_SIZE, _DIM], _ROWS),
        plane.view(torch.float32)[:, PAGE_SIZE * _DIM // 4 :],
        weights,
        lengths,
        page_tables,
        out,
        *(samples or Samples(out, lengths)),
        num_pages,
        page_tables.stride(0),
        sample_shift(num_pages * PAGE_SIZE),
        NEXT=queries,
        PAGES=pages,
        SAMPLES=samples.scores.shape[1] if samples else 0,
        ROWS=_ROWS,
        num_warps=4,
        launch_pdl=True,
    )
