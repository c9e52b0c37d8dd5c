"""Softmax over tiles, and how it goes from the warpgroup that computes it to the one that does not.

    m = max(m', rowmax s),   p = 2^(s - m),   acc = acc 2^(m' - m) + p v,   at last acc / sum p

In sparse decode and prefill the left warpgroup has the scores s of 64 heads by 64 tokens, in units of log2, and one
half of acc; the right one has the other half. They meet in shared memory of the caller: p_tile [64, 64] and keeps
[64] float32 take each tile's P and factors 2^(m' - m), and after the last tile the norms in the factors' place;
p_full and p_empty are barriers of one arrival. A turn is one such passage, numbered from 0.
Bytes a turn, all in shared memory: 8 KB of P and 256 of factors, written by the left side, read by the right one's
product and, in sparse decode, by the left one's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def softmax(scores, scale, bias, top):
    """P of a tile, the factors of what was summed before, the new maxima. bias [64]: 0 for a token, -inf for none."""
    s = scores * scale + gl.expand_dims(bias, 0)
    new_top = gl.maximum(top, gl.max(s, axis=1))
    safe_top = gl.where(new_top == float("-inf"), 0.0, new_top)
    return gl.exp2(s - gl.expand_dims(safe_top, 1)), gl.exp2(top - safe_top), new_top


@gluon.jit
def share(p, keep, p_tile, keeps, p_full, p_empty, turn):
    """The left side of a tile's turn."""
    mbarrier.wait(p_empty, (turn & 1) ^ 1)
    p_tile.store(p.to(p_tile.dtype))
    keeps.store(keep)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(p_full, count=1)


@gluon.jit
def share_norm(total, keeps, p_full, p_empty, turn):
    """The left side of the turn after a last tile's ``turn``. Returns which heads saw no token, and the norms."""
    is_empty = total == 0.0
    norm = gl.where(is_empty, 0.0, 1.0 / gl.where(is_empty, 1.0, total))
    mbarrier.wait(p_empty, turn & 1)
    keeps.store(norm)
    gl.thread_barrier()
    mbarrier.arrive(p_full, count=1)
    return is_empty, norm


@gluon.jit
def rescale(acc, keeps):
    """The right side's part of any turn, once p_full says so: acc times the tile's factors, or the norms."""
    return acc * gl.expand_dims(keeps.load(gl.SliceLayout(1, acc.type.layout)), 1)


@gluon.jit
def add_product(acc, p_tile, v, p_empty):
    """The rest of its part of a tile's turn: acc + P V."""
    product = warpgroup_mma(p_tile, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [product])
    gl.thread_barrier()
    mbarrier.arrive(p_empty, count=1)
    return acc
