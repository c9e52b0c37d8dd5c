"""Parts of top-k over one program's scores: order-preserving keys, search of a threshold, compaction in order.

    key(x) = bits(x) ^ (all ones if x < 0 else the sign bit):  key(x) < key(y) where x < y
    T = max { t : #{ key >= t } >= k }

All keys of a row stay in registers and no byte of memory moves: a round of the search counts the keys that reach three
pivots, 4 or 8 bytes a warp through shared memory.
Gluon, because what costs here is how often threads wait for one another: the layout says which sums stay within a
thread, a warp, and which cross the warps.

    [ROWS, 32, 4]:  a thread holds four adjacent items (a quad), a warp's lanes 128 adjacent ones (a row),
                    a warp ROWS / num_warps adjacent rows
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MINUS_INFINITY = gl.constexpr(0x007FFFFF)
"""The key of -inf, the least of all scores."""
ABOVE_ALL = gl.constexpr(0xFF800001)
"""One more than the key of +inf."""


@gluon.constexpr_function
def layout(rows, num_warps):
    return gl.BlockedLayout([rows // num_warps, 1, 4], [1, 32, 1], [num_warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _lanes(rows, num_warps):
    """[ROWS, 32] as ``layout`` deals it."""
    return gl.BlockedLayout([rows // num_warps, 1], [1, 32], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def _flat(num_warps):
    """One number of each warp, in the lanes of every warp: what each warp needs to add up for itself."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.constexpr_function
def _pairs(rows, words, num_warps):
    """[ROWS, words]: a warp's own rows by all words, which its lanes share out."""
    return gl.BlockedLayout([rows // num_warps, max(1, words // 32)], [1, 32], [num_warps, 1], [1, 0])


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def keys_of(x):
    """uint32 in the order of the scores, which are not NaN. 0 is below every key."""
    # -0.0 + 0.0 is +0.0: the two zeros are equal scores.
    bits = (x + 0.0).to(gl.uint32, bitcast=True)
    return gl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000).to(gl.uint32)


@gluon.jit
def score_of(key):
    return gl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(gl.uint32).to(gl.float32, bitcast=True)


@gluon.jit
def quads(ROWS: gl.constexpr):
    """[ROWS, 32]: the numbers of the quads."""
    LAYOUT: gl.constexpr = layout(ROWS, gl.num_warps())
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    LANE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
    return gl.arange(0, ROWS, layout=ROW)[:, None] * 32 + gl.arange(0, 32, layout=LANE)[None, :]


@gluon.jit
def items(quad, ROWS: gl.constexpr):
    """[ROWS, 32, 4]: the numbers of the items of quads."""
    LAYOUT: gl.constexpr = layout(ROWS, gl.num_warps())
    ITEM: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
    return quad[:, :, None] * 4 + gl.arange(0, 4, layout=ITEM)[None, None, :]


@gluon.jit
def _halves(x):
    """Sums of the bytes of a word, the even ones below, the odd ones above."""
    return (x & 0xFF00FF) + ((x >> 8) & 0xFF00FF)


@gluon.jit
def places(keep, ROWS: gl.constexpr):
    """The number of each kept item among the kept ones, from 0, and how many they are.

    keep: [ROWS, 32, 4] int32, 1 for kept and 0 for others, whose places mean nothing. One exchange between the warps.
    """
    NUM_WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = layout(ROWS, NUM_WARPS)
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    # A row keeps at most 128: up to four of a warp's rows share a word, a byte each, and are added up at once.
    SHARE: gl.constexpr = 4 if ROWS // NUM_WARPS >= 4 else ROWS // NUM_WARPS
    WORDS: gl.constexpr = ROWS // SHARE
    SHARED: gl.constexpr = gl.BlockedLayout([WORDS // NUM_WARPS, SHARE, 1], [1, 1, 32], [NUM_WARPS, 1, 1], [2, 1, 0])
    PAIRS: gl.constexpr = _pairs(ROWS, WORDS, NUM_WARPS)
    BEFORE: gl.constexpr = gl.SliceLayout(0, PAIRS)
    OWN: gl.constexpr = gl.SliceLayout(1, PAIRS)
    lane = gl.sum(keep, 2)
    shift = gl.arange(0, ROWS, layout=ROW) % SHARE * 8
    word = gl.sum(gl.reshape(lane << shift[:, None], [WORDS, SHARE, 32]), 1)
    # A change of layout by name only, as those below: scans know no slices.
    word = gl.convert_layout(word, _lanes(WORDS, NUM_WARPS))
    through = gl.convert_layout(gl.associative_scan(word, 1, add), gl.SliceLayout(1, SHARED))
    through = gl.expand_dims(through, 1) + gl.zeros([WORDS, SHARE, 32], gl.int32, SHARED)
    through = gl.convert_layout(gl.reshape(through, [ROWS, 32]), gl.SliceLayout(2, LAYOUT))
    through = (through >> shift[:, None]) & 0xFF
    # Each warp adds up for its own rows what lies before them: a scan's result would have to be exchanged again.
    words = gl.convert_layout(gl.sum(word, 1), BEFORE)
    number = gl.arange(0, WORDS, layout=BEFORE)[None, :]
    own = gl.arange(0, ROWS, layout=OWN)[:, None]
    bytes_before = gl.where(
        number < own // SHARE, -1, gl.where(number == own // SHARE, (1 << (own % SHARE * 8)) - 1, 0)
    )
    halves = gl.sum(_halves(words[None, :] & bytes_before), 1)
    row_before = gl.convert_layout((halves & 0xFFFF) + (halves >> 16), ROW)
    before = through - lane + row_before[:, None] - 1
    num = gl.sum(_halves(words), 0)
    return gl.associative_scan(keep, 2, add) + before[:, :, None], (num & 0xFFFF) + (num >> 16)


@gluon.jit
def total(x, ROWS: gl.constexpr):
    """The sum of x: [ROWS, 32, 4] int32."""
    return gl.sum(_warp_totals(x, ROWS), 0)


@gluon.jit
def _warp_totals(x, ROWS: gl.constexpr):
    """The sums of the warps' parts, one in each lane of every warp: one exchange, then each warp adds for itself."""
    return gl.convert_layout(_own_totals(x, ROWS), _flat(gl.num_warps()))


@gluon.jit
def _own_totals(x, ROWS: gl.constexpr):
    """The same where they arise: each in its warp."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    return gl.sum(gl.sum(gl.reshape(gl.sum(x, 2), [NUM_WARPS, ROWS // NUM_WARPS, 32]), 1), 1)


@gluon.jit
def _count(keys, p1, p2, p3, ROWS: gl.constexpr):
    """How many keys reach each of three pivots; at most 65,535 keys."""
    if ROWS // gl.num_warps() < 8:
        # At most 1,023 keys a warp: three counts in one word, then two in words of 16 bits.
        x = (keys >= p1).to(gl.int32) + (keys >= p2).to(gl.int32) * 1024 + (keys >= p3).to(gl.int32) * 1048576
        x = _warp_totals(x, ROWS)
        c = gl.sum((x & 1023) | ((x << 6) & 0x3FF0000), 0)
        return c & 0xFFFF, (c >> 16) & 0xFFFF, gl.sum(x >> 20, 0)
    else:  # noqa: RET505 (what follows a return is compiled too)
        # Two words, exchanged as one.
        a = _own_totals((keys >= p1).to(gl.int32) + ((keys >= p2).to(gl.int32) << 16), ROWS)
        b = _own_totals((keys >= p3).to(gl.int32), ROWS)
        c = gl.sum(gl.convert_layout((b.to(gl.int64) << 32) | a.to(gl.uint32).to(gl.int64), _flat(gl.num_warps())), 0)
        return c.to(gl.int32) & 0xFFFF, (c >> 16).to(gl.int32) & 0xFFFF, (c >> 32).to(gl.int32)


@gluon.jit
def bounds(keys, ROWS: gl.constexpr):
    """The least key that is not 0, and one more than the greatest. One exchange between the warps for both."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    FLAT: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [NUM_WARPS, 1], [1, 0])
    keys = gl.reshape(keys, [NUM_WARPS, ROWS // NUM_WARPS * 128])
    # The complement turns the least into a greatest, and 0, which stands for no key, into what never is one.
    least = gl.max(gl.where(keys == 0, 0, keys ^ 0xFFFFFFFF).to(gl.uint32), 1)
    greatest = gl.max(keys, 1)
    least, greatest = gl.split(gl.convert_layout(gl.join(least, greatest), FLAT))
    return gl.max(least, 0) ^ 0xFFFFFFFF, (gl.max(greatest, 0) + 1).to(gl.uint32)


@gluon.jit
def parts(low, high, f1, f2, f3):
    """Three pivots between two keys, at these parts of the way between their scores.

    From key to key the scores' sizes grow geometrically, so that parts of the keys would not part the scores.
    """
    least = score_of(low)
    way = score_of(high - 1) - least
    return keys_of(least + f1 * way), keys_of(least + f2 * way), keys_of(least + f3 * way)


@gluon.jit
def search(keys, low, high, count, p1, p2, p3, wanted, most, ROWS: gl.constexpr):
    """A key that ``wanted`` to ``most`` of the keys reach or, if there is none, the greatest that ``wanted`` reach.

    low, count: a key and the number >= wanted that reach it; high: a key that fewer reach. p1 <= p2 <= p3: where to
    look first, any values. Returns both ends of the interval (neighbours if the count exceeds ``most``) and how many
    reach them. A round counts for three pivots. They quarter the interval or, after a round that left no more than a
    quarter of it, surround the place where the wanted count lies if keys are spread evenly.
    """
    count_high = 0
    while (count > most) & (high - low > 1):
        p1 = gl.minimum(gl.maximum(p1, low + 1), high - 1)
        p2 = gl.minimum(gl.maximum(p2, low + 1), high - 1)
        p3 = gl.minimum(gl.maximum(p3, low + 1), high - 1)
        c1, c2, c3 = _count(keys, p1, p2, p3, ROWS)
        before = high - low
        high = gl.where(c1 < wanted, p1, gl.where(c2 < wanted, p2, gl.where(c3 < wanted, p3, high))).to(gl.uint32)
        count_high = gl.where(c1 < wanted, c1, gl.where(c2 < wanted, c2, gl.where(c3 < wanted, c3, count_high)))
        low = gl.where(c3 >= wanted, p3, gl.where(c2 >= wanted, p2, gl.where(c1 >= wanted, p1, low))).to(gl.uint32)
        count = gl.where(c3 >= wanted, c3, gl.where(c2 >= wanted, c2, gl.where(c1 >= wanted, c1, count)))
        width = high - low
        p1 = low + width // 4
        p2 = low + width // 2
        p3 = p2 + width // 4
        if width <= before // 4:
            number = (count - count_high).to(gl.float32)
            span = width.to(gl.float32)
            middle = span * (count - (wanted + most) // 2).to(gl.float32) / number
            deviation = span * gl.rsqrt(number)
            p1 = low + gl.maximum(middle - deviation, 0.0).to(gl.uint32)
            p2 = low + gl.maximum(middle, 0.0).to(gl.uint32)
            p3 = low + gl.maximum(middle + deviation, 0.0).to(gl.uint32)
    return low, high, count, count_high
