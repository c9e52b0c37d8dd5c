"""Candidates of top-k: the scores of a row, or of a slice of it, that reach a bound, k of the row's at least.

    C = { i < length : x_i >= bound },   #C >= k

Tiles: TILE scores of one row at a time, kept ones written in their order. Bytes: 4 a score, read once (and once more in
each round of counting), 8 a candidate written.
The bound comes from a sample of the row or, where that says nothing of the row, from counting all of it: see
``topk_select``. Gluon, with the layout of ``topk_search``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from seamount.kernels.triton.topk_search import items, keys_of, places, quads, score_of, total


@gluon.jit
def _reaches(x, bound, at, end):
    """1 where x >= bound and at < end, else 0. Comparisons that LLVM sees it packs into bits, and unpacks again."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.s32 p, $3, $4; setp.ge.and.f32 p, $1, $2, p; selp.s32 $0, 1, 0, p; }",
        "=r,f,f,r,r",
        [x, bound, at, end],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def load_scores(row, start, end, ROWS: gl.constexpr, VECTOR: gl.constexpr):
    """[ROWS, 32, 4]: the scores from ``start`` on, those before ``end`` defined, and where they are."""
    quad = start // 4 + quads(ROWS)
    at = items(quad, ROWS)
    if VECTOR:
        # Rows are whole quads: a quad is read if its first score is wanted.
        x = gl.load(row + at, mask=(quad * 4 < end)[:, :, None] & (at >= 0), other=0.0)
    else:
        x = gl.load(row + at, mask=at < end, other=0.0)
    return x, at


@gluon.jit
def number_of(x):
    """NaN counts as -inf."""
    return gl.maximum(x, float("-inf"))


@gluon.constexpr_function
def _dealt(num_shares, num_warps):
    """[samples of a share, shares]: adjacent samples lie in different shares, a share with one thread or a few."""
    across = min(num_warps, num_shares // 32)
    return gl.BlockedLayout([1, 1], [1, 32], [num_warps // across, across], [1, 0])


@gluon.jit
def load_samples(samples, width, shift, spacing, SAMPLES: gl.constexpr, SHARES: gl.constexpr):
    """[SAMPLES / SHARES, SHARES], whatever the row's length: those behind it are undefined; and their numbers.

    They are 2^spacing scores apart where they are read.
    """
    LAYOUT: gl.constexpr = _dealt(SHARES, gl.num_warps())
    turn = gl.arange(0, SAMPLES // SHARES, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    number = turn * SHARES + gl.arange(0, SHARES, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(samples + (number << spacing), mask=number << shift < width, other=0.0), number


@gluon.jit
def find_bound(x, number, length, shift, groups):
    """The greatest score that the maxima of ``groups`` shares reach, x their samples; -inf if there is none."""
    SHARES: gl.constexpr = x.shape[1]
    PAIRS: gl.constexpr = gl.BlockedLayout([1, SHARES], [32, 1], [gl.num_warps(), 1], [1, 0])
    maxima = gl.max(gl.where(number << shift < length, number_of(x), float("-inf")), 0)
    own = gl.convert_layout(maxima, gl.SliceLayout(1, PAIRS))
    others = gl.convert_layout(maxima, gl.SliceLayout(0, PAIRS))
    reach = gl.sum((others[None, :] >= own[:, None]).to(gl.int32), 1)
    return gl.max(gl.where(reach >= groups, own, float("-inf")), 0)


@gluon.jit
def _pack(x, at):
    """A candidate: a score and where it is."""
    return (x.to(gl.uint32, bitcast=True).to(gl.int64) << 32) | at.to(gl.uint32).to(gl.int64)


@gluon.jit
def _is_at_least(x, bound):
    """1 or 0, 0 for NaN. Comparisons that LLVM sees it packs into bits, and unpacks again."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.f32 p, $1, $2; selp.s32 $0, 1, 0, p; }",
        "=r,f,f",
        [x, bound],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def keep_slice(
    x, at, row, start, end, bound, candidates, SEGMENT: gl.constexpr, TILE: gl.constexpr, VECTOR: gl.constexpr
):
    """Write the scores from ``start`` to ``end`` that reach the bound, in order; return how many there are.

    x, at: the first tile. What does not fit the segment and the room for a tile behind it is only counted.
    """
    ROWS: gl.constexpr = TILE // 128
    num = 0
    for first in range(start, end, TILE):
        next_x, next_at = load_scores(row, first + TILE, end, ROWS, VECTOR)
        if first + TILE > end:
            x = gl.where(at < end, x, float("nan"))
        keep = _is_at_least(x, bound)
        place, more = places(keep, ROWS)
        if num <= SEGMENT:
            gl.store(candidates + (num + place), _pack(x, at), mask=keep != 0)
        num += more
        x, at = next_x, next_at
    return num


@gluon.jit
def _keep_some(row, length, bound, quota, candidates, CAPACITY: gl.constexpr, TILE: gl.constexpr, VECTOR: gl.constexpr):
    """The same of a whole row, NaN included, and of the scores equal to the bound only the first ``quota``."""
    ROWS: gl.constexpr = TILE // 128
    num = 0
    num_equal = 0
    for first in range(0, length, TILE):
        x, at = load_scores(row, first, length, ROWS, VECTOR)
        x = number_of(x)
        keep = _reaches(x, bound, at, length)
        equal = gl.where(x == bound, keep, 0)
        rank, more_equal = places(equal, ROWS)
        keep = gl.where(num_equal + rank >= quota, keep - equal, keep)
        num_equal += more_equal
        place, more = places(keep, ROWS)
        gl.store(candidates + (num + place), _pack(x, at), mask=(keep != 0) & (num + place < CAPACITY))
        num += more
    return num


@gluon.jit
def _count(row, length, p1, p2, p3, TILE: gl.constexpr, VECTOR: gl.constexpr):
    """How many scores of the row reach each of three pivots."""
    ROWS: gl.constexpr = TILE // 128
    c1 = 0
    c2 = 0
    c3 = 0
    for first in range(0, length, TILE):
        x, at = load_scores(row, first, length, ROWS, VECTOR)
        keys = gl.where(at < length, keys_of(number_of(x)), 0).to(gl.uint32)
        c1 += total((keys >= p1).to(gl.int32), ROWS)
        c2 += total((keys >= p2).to(gl.int32), ROWS)
        c3 += total((keys >= p3).to(gl.int32), ROWS)
    return c1, c2, c3


@gluon.jit
def keep_by_counting(
    row,
    length,
    low,
    high,
    count_high,
    k,
    candidates,
    CAPACITY: gl.constexpr,
    TILE: gl.constexpr,
    VECTOR: gl.constexpr,
):
    """Candidates, k to CAPACITY of them, by as many passes over the row as it takes; return how many there are.

    low: a key that at least k scores reach; high: one that ``count_high`` < k reach.
    """
    count = CAPACITY + 1
    while (count > CAPACITY) & (high - low > 1):
        width = high - low
        # Just above ``low``: if that is what a plateau scores, one pass tells.
        p1 = low + 1
        p2 = gl.maximum(low + width // 3, p1)
        p3 = gl.minimum(gl.maximum(low + width // 3 * 2, p1), high - 1)
        c1, c2, c3 = _count(row, length, p1, p2, p3, TILE, VECTOR)
        high = gl.where(c1 < k, p1, gl.where(c2 < k, p2, gl.where(c3 < k, p3, high))).to(gl.uint32)
        count_high = gl.where(c1 < k, c1, gl.where(c2 < k, c2, gl.where(c3 < k, c3, count_high)))
        low = gl.where(c3 >= k, p3, gl.where(c2 >= k, p2, gl.where(c1 >= k, p1, low))).to(gl.uint32)
        count = gl.where(c3 >= k, c3, gl.where(c2 >= k, c2, gl.where(c1 >= k, c1, count)))
    quota = gl.where(count > CAPACITY, k - count_high, 0x7FFFFFFF)
    num = _keep_some(row, length, score_of(low), quota, candidates, CAPACITY, TILE, VECTOR)
    gl.thread_barrier()
    return num
