"""Top-k of rows from the maxima of their groups: one program a row.

    T = max { t : #{ i < length : key(x_i) >= t } >= k };   out = the i with key > T and the first of those with key = T

A group is 2^shift >= 4 adjacent scores: as few as leave the row no more than ``GROUPS`` groups (4 up to 32K scores, 16
up to 128K), since their maxima are what a program holds in registers.

1. Bound: m groups whose maxima reach a bound hold at least m scores that reach it, so the k-th largest maximum is a
   lower bound of T. Groups of exchangeable scores hold more than one each: where a quarter of the groups or more are
   wanted, k - k/16 to k of them are tried first, and the bound is lowered if they hold fewer than k scores.
2. List the groups that reach the bound, then, if groups have 16 scores or more, the quads among them that do.
3. Candidates: read those quads' scores, keep what reaches the bound: about 1.1 k scores, in order of position.
4. T among the candidates, and the indices in order.

More candidates than ``CAPACITY`` (one stretch of large scores; a plateau of equal ones) are counted again and again
until the bound is high enough or is T itself, of which then only the first few are kept: slower, never wrong. A row of
at most ``CAPACITY`` scores is its own list of candidates.
Bytes, from L2: 4 a group, 16 a listed group, 16 a listed quad, 16 a candidate, 8 k written.
Time: about ten dependent reads and ten rounds of counting, each an exchange between the warps; a row takes 13 us at 32K
and 17 us at 128K, most of it waiting, and so do 32 rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from seamount.kernels.triton.topk_search import (
    MINUS_INFINITY,
    bounds,
    items,
    keys_of,
    places,
    quads,
    quarters,
    score_of,
    search,
    total,
)


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
def _scores(row, quad, listed, length, ROWS: gl.constexpr, VECTOR: gl.constexpr):
    """[ROWS, 32, 4]: the scores of quads, NaN as -inf; where they are; where the row ends, 0 for what is not listed."""
    at = items(quad, ROWS)
    end = gl.where(listed, length, 0)[:, :, None]
    if VECTOR:
        # Rows are whole quads: a quad is read if its first score is the row's.
        readable = listed & (quad * 4 < length)
        x = gl.load(row + at, mask=readable[:, :, None] & (at >= 0), other=0.0)
    else:
        x = gl.load(row + at, mask=at < end, other=0.0)
    return gl.maximum(x, float("-inf")), at, end


@gluon.jit
def _listed_quads(entries, num_entries, shift, start, ROWS: gl.constexpr):
    """[ROWS, 32]: the quads that make up the listed entries, of 2^shift items each, from item ``start`` on."""
    quad = start // 4 + quads(ROWS)
    entry = quad >> (shift - 2)
    listed = entry < num_entries
    number = gl.load(entries + entry, mask=listed, other=0)
    return (number << (shift - 2)) + (quad & ((1 << (shift - 2)) - 1)), listed


@gluon.jit
def _list_groups(best, bound, entries, ROWS: gl.constexpr):
    keep = (best >= bound).to(gl.int32)
    place, num = places(keep, ROWS)
    gl.store(entries + place, items(quads(ROWS), ROWS), mask=keep != 0)
    gl.thread_barrier()
    return num


@gluon.jit
def _list_quads(quad_maxima, entries, num_entries, shift, bound, out, TILE: gl.constexpr):
    """List the quads that reach the bound among those of the listed groups of 2^shift quads."""
    ROWS: gl.constexpr = TILE // 128
    num = 0
    for start in range(0, num_entries << shift, TILE):
        fours, listed = _listed_quads(entries, num_entries, shift, start, ROWS)
        quad = items(fours, ROWS)
        x = gl.load(quad_maxima + quad, mask=listed[:, :, None] & (quad >= 0), other=float("-inf"))
        keep = _reaches(x, bound, quad, gl.where(listed, 0x7FFFFFFF, 0)[:, :, None])
        place, more = places(keep, ROWS)
        gl.store(out + num + place, quad, mask=keep != 0)
        num += more
    gl.thread_barrier()
    return num


@gluon.jit
def _collect(
    row,
    entries,
    num_entries,
    shift,
    length,
    bound,
    quota,
    candidates,
    LIMITED: gl.constexpr,
    CAPACITY: gl.constexpr,
    TILE: gl.constexpr,
    VECTOR: gl.constexpr,
):
    """Write the listed scores that reach the bound, each with its position; return how many there are.

    LIMITED: of those equal to the bound only the first ``quota``.
    """
    ROWS: gl.constexpr = TILE // 128
    num = 0
    num_equal = 0
    for start in range(0, num_entries << shift, TILE):
        quad, listed = _listed_quads(entries, num_entries, shift, start, ROWS)
        x, at, end = _scores(row, quad, listed, length, ROWS, VECTOR)
        keep = _reaches(x, bound, at, end)
        if LIMITED:
            equal = gl.where(x == bound, keep, 0)
            rank, more_equal = places(equal, ROWS)
            keep = gl.where(num_equal + rank >= quota, keep - equal, keep)
            num_equal += more_equal
        place, more = places(keep, ROWS)
        # What does not fit is only counted; there is room for a tile more.
        if num <= CAPACITY:
            bits = x.to(gl.uint32, bitcast=True).to(gl.int64)
            gl.store(candidates + num + place, (bits << 32) | at.to(gl.uint32).to(gl.int64), mask=keep != 0)
        num += more
    gl.thread_barrier()
    return num


@gluon.jit
def _tighten(
    row,
    entries,
    num_entries,
    shift,
    length,
    low,
    high,
    wanted,
    CAPACITY: gl.constexpr,
    TILE: gl.constexpr,
    VECTOR: gl.constexpr,
):
    """A bound that at least ``wanted`` listed scores reach and no more than fit, and any quota of those equal to it."""
    ROWS: gl.constexpr = TILE // 128
    count = CAPACITY + 1
    count_high = 0
    while (count > CAPACITY) & (high - low > 1):
        middle = low + (high - low) // 2
        reach = 0
        for start in range(0, num_entries << shift, TILE):
            quad, listed = _listed_quads(entries, num_entries, shift, start, ROWS)
            x, at, end = _scores(row, quad, listed, length, ROWS, VECTOR)
            reach += total(_reaches(x, score_of(middle), at, end), ROWS)
        enough = reach >= wanted
        low = gl.where(enough, middle, low).to(gl.uint32)
        high = gl.where(enough, high, middle).to(gl.uint32)
        count = gl.where(enough, reach, count)
        count_high = gl.where(enough, count_high, reach)
    return low, gl.where(count > CAPACITY, wanted - count_high, 0x7FFFFFFF)


@gluon.jit
def _candidates_of(
    row,
    length,
    maxima,
    entries,
    candidates,
    k,
    GROUPS: gl.constexpr,
    LEVELS: gl.constexpr,
    CAPACITY: gl.constexpr,
    TILE: gl.constexpr,
    VECTOR: gl.constexpr,
):
    """Write at least k scores that reach a bound; return their number, the bound, a key above all, the way to T."""
    ROWS: gl.constexpr = GROUPS // 128
    shift = 2
    for level in gl.static_range(1, LEVELS):
        shift += (length > (GROUPS << (1 + level))).to(gl.int32)
    num_groups = (length + (1 << shift) - 1) >> shift
    best = gl.load(maxima + items(quads(ROWS), ROWS))
    best = gl.where(items(quads(ROWS), ROWS) < num_groups, keys_of(best), 0).to(gl.uint32)
    low, high = bounds(best, ROWS)
    # With fewer than k groups there is no bound: every score is a candidate.
    low = gl.where(num_groups < k, MINUS_INFINITY, low).to(gl.uint32)
    p1, p2, p3 = quarters(low, high)
    slack = k // 16
    wanted = gl.where((4 * k >= num_groups) & (num_groups > k), k - slack, k)
    bound = low
    num = 0
    num_entries = 0
    way = 0.0
    # What is listed last: groups or, behind them, quads.
    first = 0
    listed_shift = shift
    if LEVELS > 2:
        first = gl.where(shift > 3, GROUPS, 0)
        listed_shift = gl.where(shift > 3, 2, shift)
    while num < k:
        bound, above, count, count_above = search(best, low, high, num_groups, p1, p2, p3, wanted, wanted + slack, ROWS)
        reach = score_of(bound)
        num_entries = _list_groups(best, bound, entries, ROWS)
        if LEVELS > 2:  # noqa: SIM102 (this one is the compiler's)
            if shift > 3:
                num_entries = _list_quads(
                    maxima + GROUPS, entries, num_entries, shift - 2, reach, entries + GROUPS, TILE
                )
        num = _collect(
            row, entries + first, num_entries, listed_shift, length, reach, 0, candidates, False, CAPACITY, TILE, VECTOR
        )
        # As far above the bound as maxima lie that the surplus leads past.
        density = (count - count_above + 1).to(gl.float32) / (above - bound).to(gl.float32)
        way = (num - k + 1).to(gl.float32) / density
        wanted = k
    if num > CAPACITY:
        bound, quota = _tighten(
            row, entries + first, num_entries, listed_shift, length, bound, high, k, CAPACITY, TILE, VECTOR
        )
        reach = score_of(bound)
        num = _collect(
            row,
            entries + first,
            num_entries,
            listed_shift,
            length,
            reach,
            quota,
            candidates,
            True,
            CAPACITY,
            TILE,
            VECTOR,
        )
    return num, bound, high, way


@gluon.jit
def _emit(keys, at, num, low, high, p1, p2, p3, k, out, ROWS: gl.constexpr):
    """Write the positions of the k best of ``num`` keys, the first among equals, in the keys' order."""
    threshold, _, count, _ = search(keys, low, high, num, p1, p2, p3, k, k, ROWS)
    keep = (keys >= threshold).to(gl.int32)
    if count > k:
        equal = (keys == threshold).to(gl.int32)
        rank, num_equal = places(equal, ROWS)
        keep = gl.where(rank >= num_equal - (count - k), keep - equal, keep)
    place, _ = places(keep, ROWS)
    gl.store(out + place, at.to(gl.uint32).to(gl.int64), mask=keep != 0)


@gluon.jit
def _emit_row(row, length, k, out, SIZE: gl.constexpr, VECTOR: gl.constexpr):
    """The same of a row of at most SIZE scores."""
    ROWS: gl.constexpr = SIZE // 128
    x, at, end = _scores(row, quads(ROWS), quads(ROWS) >= 0, length, ROWS, VECTOR)
    keys = gl.where(at < end, keys_of(x), 0).to(gl.uint32)
    low, high = bounds(keys, ROWS)
    p1, p2, p3 = quarters(low, high)
    _emit(keys, at, length, low, high, p1, p2, p3, k, out, ROWS)


@gluon.jit
def _emit_candidates(candidates, num, low, high, way, k, out, SIZE: gl.constexpr):
    ROWS: gl.constexpr = SIZE // 128
    slot = items(quads(ROWS), ROWS)
    candidate = gl.load(candidates + slot)
    x = (candidate >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    keys = gl.where(slot < num, keys_of(x), 0).to(gl.uint32)
    p1 = low + (0.55 * way).to(gl.uint32)
    p2 = low + (0.9 * way).to(gl.uint32)
    p3 = low + (1.4 * way).to(gl.uint32)
    _emit(keys, candidate.to(gl.int32), num, low, high, p1, p2, p3, k, out, ROWS)


@gluon.jit
def _quad_maxima(row, length, maxima, TILE: gl.constexpr, VECTOR: gl.constexpr):
    ROWS: gl.constexpr = TILE // 128
    for start in range(0, length, TILE):
        quad = start // 4 + quads(ROWS)
        x, at, end = _scores(row, quad, quad >= 0, length, ROWS, VECTOR)
        gl.store(maxima + quad, gl.max(gl.where(at < end, x, float("-inf")), 2))
    gl.thread_barrier()


@gluon.jit(do_not_specialize=["num_rows"])
def select(
    logits,
    stride,
    lengths,
    maxima,
    maxima_stride,
    entries,
    candidates,
    out,
    num_rows,
    k,
    GROUPS: gl.constexpr,
    LEVELS: gl.constexpr,
    CAPACITY: gl.constexpr,
    TILE: gl.constexpr,
    VECTOR: gl.constexpr,
    SHORT: gl.constexpr,
    OWN_MAXIMA: gl.constexpr,
):
    """out [num_rows, k] int64 of logits [num_rows, width]: see the head.

    maxima: [num_rows, maxima_stride]: the maxima of a row's groups, then, if LEVELS > 2, of its quads. With OWN_MAXIMA
    each program finds its rows' maxima itself, in a row of its own, from groups that are quads (LEVELS 1).
    entries, candidates: each program's lists, [maxima_stride] int32 and [CAPACITY + TILE] int64.
    LEVELS: sizes that groups of this width can have. VECTOR: rows begin on 16 bytes and are whole quads. SHORT: no row
    is longer than CAPACITY.
    """
    FILL: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    program = gl.program_id(0).to(gl.int64)
    entries += program * maxima_stride
    candidates += program * (CAPACITY + TILE)
    for row_number in range(gl.program_id(0), num_rows, gl.num_programs(0)):
        row_id = program * 0 + row_number
        row = logits + row_id * stride
        row_out = out + row_id * k
        length = gl.load(lengths + row_id).to(gl.int32)
        if length <= k:
            for start in range(0, k, 1024):
                slot = start + gl.arange(0, 1024, layout=FILL)
                gl.store(row_out + slot, gl.where(slot < length, slot, -1).to(gl.int64), mask=slot < k)
        elif length <= CAPACITY // 2:
            _emit_row(row, length, k, row_out, CAPACITY // 2, VECTOR)
        elif length <= CAPACITY:
            _emit_row(row, length, k, row_out, CAPACITY, VECTOR)
        elif not SHORT:
            if OWN_MAXIMA:
                row_maxima = maxima + program * maxima_stride
                _quad_maxima(row, length, row_maxima, TILE, VECTOR)
            else:
                row_maxima = maxima + row_id * maxima_stride
            num, low, high, way = _candidates_of(
                row, length, row_maxima, entries, candidates, k, GROUPS, LEVELS, CAPACITY, TILE, VECTOR
            )
            if num <= CAPACITY // 2:
                _emit_candidates(candidates, num, low, high, way, k, row_out, CAPACITY // 2)
            else:
                _emit_candidates(candidates, num, low, high, way, k, row_out, CAPACITY)
        # The next row writes over the lists.
        gl.thread_barrier()
