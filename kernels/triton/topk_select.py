"""Top-k of rows of scores: a row is dealt to several programs, the last of which selects among what they found.

    T = max { t : #{ i < length : key(x_i) >= t } >= k };   out = the i with key > T and the first of those with key = T

1. Bound: every 2^shift-th score is dealt to one of SHARES; the bound is the greatest score that a given number of the
   shares' maxima reach, such that the row surely holds k scores that reach it, and not many more
   (``topk.wanted_groups``).
2. Each program keeps the scores of its slice that reach the bound, with their positions: its segment of candidates.
3. The program that arrives last at the row's counter reads all segments, in order of position, into registers, searches
   T among the candidates and writes the indices in order.

Fewer than k candidates (samples that say nothing of the row) or more than ``CAPACITY`` (a plateau of equal scores):
that program counts the whole row again and again until a bound leaves k to CAPACITY of them or is T itself, of which
then only the first few are kept: slower, never wrong. A row of at most CAPACITY scores is its own list of candidates.
Which program arrives last does not show in the result.
Eight warps a program or sixteen (``topk._divide``): with four, a thread holds more candidates than it has registers.
Bytes, from L2: 4 a score; 4 a sample, read by each program of the row; 16 a candidate; 8 k written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton.topk_candidates import (
    find_bound,
    keep_by_counting,
    keep_slice,
    load_samples,
    load_scores,
    number_of,
)
from seamount.kernels.triton.topk_search import (
    ABOVE_ALL,
    MINUS_INFINITY,
    add,
    bounds,
    items,
    keys_of,
    parts,
    places,
    quads,
    search,
)


@gluon.jit
def _write_best(keys, at, num, k, out, ROWS: gl.constexpr):
    """Write the positions of the k best of ``num`` >= k keys, the first among equals, in the keys' order."""
    low, high = bounds(keys, ROWS)
    # Above a bound scores are about exponentially distributed.
    number = num.to(gl.float32)
    way = gl.log(number / k) / gl.log(number + 1.0)
    p1, p2, p3 = parts(low, high, 0.8 * way, way, 1.25 * way)
    threshold, _, count, _ = search(keys, low, high, num, p1, p2, p3, k, k, ROWS)
    keep = (keys >= threshold).to(gl.int32)
    if count > k:
        equal = (keys == threshold).to(gl.int32)
        rank, num_equal = places(equal, ROWS)
        keep = gl.where(rank >= num_equal - (count - k), keep - equal, keep)
    place, _ = places(keep, ROWS)
    gl.store(out + place, at.to(gl.uint32).to(gl.int64), mask=keep != 0)


@gluon.jit
def _select_from_row(row, length, k, out, SIZE: gl.constexpr, VECTOR: gl.constexpr):
    """The k best of a row of k to SIZE scores."""
    ROWS: gl.constexpr = SIZE // 128
    x, at = load_scores(row, 0, length, ROWS, VECTOR)
    keys = gl.where(at < length, keys_of(number_of(x)), 0).to(gl.uint32)
    _write_best(keys, at, length, k, out, ROWS)


@gluon.jit
def _locate(quad, counts, num, SLICES: gl.constexpr, STRIDE: gl.constexpr, ROWS: gl.constexpr):
    """[ROWS, 32]: where the candidates' quads are, segment behind segment; where their segments' candidates end."""
    if SLICES == 1:
        return quad, quad * 0 + num
    EACH: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    counts_ = gl.load(counts + gl.arange(0, SLICES, layout=EACH))
    num_quads = (counts_ + 3) // 4
    # First quad and number of candidates of each segment in one word. The segment of a quad is the last that begins
    # at it or before: a binary search, as every segment is long and short.
    begin = ((gl.associative_scan(num_quads, 0, add) - num_quads) << 16) | counts_
    flat = gl.reshape(quad, [ROWS * 32])
    segment = flat * 0
    for level in gl.static_range(SLICES.bit_length() - 1):
        middle = segment + (SLICES >> (level + 1))
        segment = gl.where(flat >= gl.gather(begin, middle, 0) >> 16, middle, segment)
    own = gl.gather(begin, segment, 0)
    own = gl.convert_layout(gl.reshape(own, [ROWS, 32]), quad.type.layout)
    segment = gl.convert_layout(gl.reshape(segment, [ROWS, 32]), quad.type.layout)
    return quad - (own >> 16) + segment * (STRIDE // 4), segment * STRIDE + (own & 0xFFFF)


@gluon.jit
def _select_from_segments(
    counts, num, candidates, k, out, SLICES: gl.constexpr, STRIDE: gl.constexpr, SIZE: gl.constexpr
):
    """The k best of ``num`` candidates, ``counts`` of them in each segment; all segments' quads fit SIZE.

    A single segment has ``num`` of them, whatever ``counts`` holds.
    """
    ROWS: gl.constexpr = SIZE // 128
    at_quad, end = _locate(quads(ROWS), counts, num, SLICES, STRIDE, ROWS)
    slot = items(at_quad, ROWS)
    # All of a quad is read if its first candidate is one.
    readable = (at_quad * 4 < end)[:, :, None] & (slot >= 0)
    candidate = gl.load(candidates + slot, mask=readable, other=0)
    x = (candidate >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    keys = gl.where(slot < end[:, :, None], keys_of(number_of(x)), 0).to(gl.uint32)
    _write_best(keys, candidate.to(gl.int32), num, k, out, ROWS)


@gluon.jit
def _select_long_row(
    row, length, slice_number, slice_size, x, at, sample, sampling, scratch, k, out,
    SLICES: gl.constexpr, SEGMENT: gl.constexpr, CAPACITY: gl.constexpr, TILE: gl.constexpr, VECTOR: gl.constexpr,
):  # fmt: skip
    """x, at: the slice's first tile; sample: the row's samples and their numbers."""
    STRIDE: gl.constexpr = SEGMENT + TILE
    arrivals, shift, groups = sampling
    counts, candidates = scratch
    bound = find_bound(sample[0], sample[1], length, shift, groups)
    start = slice_number * slice_size
    end = gl.minimum(start + slice_size, length)
    num = keep_slice(x, at, row, start, end, bound, candidates + slice_number * STRIDE, SEGMENT, TILE, VECTOR)
    if SLICES > 1:
        gl.store(counts + slice_number, num)
        gl.thread_barrier()
        last = gl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == SLICES - 1
        padded = num
        if last:
            each = gl.load(counts + gl.arange(0, SLICES, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
            num = gl.sum(each, 0)
            padded = gl.sum((each + 3) // 4 * 4, 0)
    else:
        gl.thread_barrier()
        last = True
        padded = num
    if last:
        # NaN, which counts as -inf, reaches no bound: that of -inf is not one.
        if (num < k) | (padded > CAPACITY) | (bound == float("-inf")):
            few = (num < k) & (bound > float("-inf"))
            bound_key = keys_of(bound)
            low = gl.where(few | (bound == float("-inf")), MINUS_INFINITY, bound_key).to(gl.uint32)
            high = gl.where(few, bound_key, ABOVE_ALL).to(gl.uint32)
            count_high = gl.where(few, num, 0)
            num = keep_by_counting(row, length, low, high, count_high, k, candidates, CAPACITY, TILE, VECTOR)
            _select_from_segments(counts, num, candidates, k, out, 1, STRIDE, CAPACITY)
        elif padded <= CAPACITY // 2:
            _select_from_segments(counts, num, candidates, k, out, SLICES, STRIDE, CAPACITY // 2)
        else:
            _select_from_segments(counts, num, candidates, k, out, SLICES, STRIDE, CAPACITY)


@gluon.jit
def _select_short_row(row, length, k, out, CAPACITY: gl.constexpr, VECTOR: gl.constexpr):
    FILL: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    if length <= k:
        for start in range(0, k, 1024):
            slot = start + gl.arange(0, 1024, layout=FILL)
            gl.store(out + slot, gl.where(slot < length, slot, -1).to(gl.int64), mask=slot < k)
    elif length <= CAPACITY // 2:
        _select_from_row(row, length, k, out, CAPACITY // 2, VECTOR)
    else:
        _select_from_row(row, length, k, out, CAPACITY, VECTOR)


@gluon.jit
def _select_row(
    row_number, slice_number, slice_size, rows, sampling, scratch,
    SAMPLES: gl.constexpr, SHARES: gl.constexpr, SLICES: gl.constexpr, SEGMENT: gl.constexpr, CAPACITY: gl.constexpr,
    TILE: gl.constexpr, VECTOR: gl.constexpr, SHORT: gl.constexpr,
):  # fmt: skip
    logits, stride, width, lengths, k, out = rows
    samples, sample_stride, spacing, arrivals, shift, groups = sampling
    row_id = gl.to_tensor(row_number).to(gl.int64)
    row = logits + row_id * stride
    out += row_id * k
    length = gl.load(lengths + row_id).to(gl.int32)
    if SHORT:
        _select_short_row(row, length, k, out, CAPACITY, VECTOR)
    else:
        # What most rows need is asked for together with the length.
        sample = load_samples(samples + row_id * sample_stride, width, shift, spacing, SAMPLES, SHARES)
        x, at = load_scores(row, slice_number * slice_size, width, TILE // 128, VECTOR)
        if length > CAPACITY:
            _select_long_row(
                row, length, slice_number, slice_size, x, at, sample, (arrivals + row_id, shift, groups), scratch, k,
                out, SLICES, SEGMENT, CAPACITY, TILE, VECTOR,
            )  # fmt: skip
        elif slice_number == 0:
            _select_short_row(row, length, k, out, CAPACITY, VECTOR)


@gluon.jit(do_not_specialize=["num_rows", "k", "spacing", "shift", "groups"])
def select(
    logits, stride, width, lengths, samples, sample_stride, spacing, arrivals, shift, groups, counts, candidates,
    slice_size, num_rows, k, out,
    SAMPLES: gl.constexpr, SHARES: gl.constexpr, SLICES: gl.constexpr, SEGMENT: gl.constexpr, CAPACITY: gl.constexpr,
    TILE: gl.constexpr, VECTOR: gl.constexpr, SHORT: gl.constexpr, MANY: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """out [num_rows, k] int64 of logits [num_rows, width]: see the head. ``SLICES`` successive programs take a row.

    samples: every 2^shift-th score of each row, at most SAMPLES, 2^spacing apart, rows sample_stride apart; groups: in
    how many of SHARES a sample is to reach the bound. arrivals: [num_rows] zeros, changed where SLICES > 1. counts:
    [programs] and candidates: [programs, SEGMENT + TILE], scratch. SEGMENT: the smaller of slice_size, a multiple of
    TILE, and CAPACITY, which is k at least. VECTOR: rows begin on 16 bytes and are whole quads. SHORT: no row is longer
    than CAPACITY. MANY: programs take several rows, SLICES 1. EARLY: launched before the launch ahead of it has ended.
    """
    slice_number = gl.program_id(0) % SLICES
    first_row = gl.program_id(0) // SLICES
    scratch = (
        counts + first_row * SLICES,
        candidates + first_row.to(gl.int64) * (SLICES * (SEGMENT + TILE)),
    )
    rows = (logits, stride, width, lengths, k, out)
    sampling = (samples, sample_stride, spacing, arrivals, shift, groups)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if MANY:
        for row_number in range(first_row, num_rows, gl.num_programs(0)):
            _select_row(
                row_number, slice_number, slice_size, rows, sampling, scratch,
                SAMPLES, SHARES, SLICES, SEGMENT, CAPACITY, TILE, VECTOR, SHORT,
            )  # fmt: skip
            # The next row's candidates take the place of this one's.
            gl.thread_barrier()
    else:
        _select_row(
            first_row, slice_number, slice_size, rows, sampling, scratch,
            SAMPLES, SHARES, SLICES, SEGMENT, CAPACITY, TILE, VECTOR, SHORT,
        )  # fmt: skip
