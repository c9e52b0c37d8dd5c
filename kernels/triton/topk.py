"""Exact top-k on the GPU, ties to the lowest index: maxima of groups of scores, then ``topk_select`` a row.

Two launches: ``_group_maxima`` reads all scores once (4 L bytes, L/4 to L written), all SMs busy at one row too; then
one program a row selects. Who computes the scores can store the maxima with them (``store_group_maxima``) and call
``select_rows`` alone. One launch for rows of at most 8,192 scores, which a program holds in registers, and for many
rows of at most 32,768, whose quads' maxima each program finds itself: the second read of a row then comes from L2.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.triton.topk_select import select

GROUPS = 8192
"""Groups of a row at most, and columns of their maxima."""
_CAPACITY = 8192
_TILE = 8192
_MAXIMA_TILE = 4096


def group_levels(width: int) -> int:
    """How many sizes of groups, from 4 scores on, rows of at most ``width`` scores need."""
    levels = 1
    while (GROUPS << (1 + levels)) < width:
        levels += 1
    return levels


def maxima_columns(width: int) -> int:
    """Columns of the maxima of rows of at most ``width`` scores: groups, then quads where groups may be of 16."""
    quads = triton.cdiv(width, _MAXIMA_TILE) * (_MAXIMA_TILE // 4)
    return GROUPS + (quads if group_levels(width) > 2 else 0)


@triton.jit
def store_group_maxima(scores, first, length, maxima, N: tl.constexpr, GROUPS: tl.constexpr, LEVELS: tl.constexpr):
    """Store the maxima of the quads (if LEVELS > 2) and of the groups of a piece of a row.

    scores: [N] at positions from ``first``, both multiples of the largest group; -inf beyond the row's length. maxima:
    the row's ``maxima_columns``. The L2 keeps what is stored, since it is read next.
    """
    shift = 2
    for level in tl.static_range(1, LEVELS):
        shift += (length > (GROUPS << (1 + level))).to(tl.int32)
    best = tl.max(tl.reshape(scores, (N // 4, 4)), 1)
    # NaN counts as -inf, which is what is left of a quad of nothing else.
    best = tl.where(best != best, float("-inf"), best)
    if LEVELS > 2:
        tl.store(maxima + GROUPS + first // 4 + tl.arange(0, N // 4), best, eviction_policy="evict_last")
    for level in tl.static_range(LEVELS):
        if level > 0:
            best = tl.max(tl.reshape(best, (N >> (2 + level), 2)), 1)
        group = first // (4 << level) + tl.arange(0, N >> (2 + level))
        mine = (shift == 2 + level) & (group < GROUPS)
        tl.store(maxima + group, best, mask=mine, eviction_policy="evict_last")


@triton.jit
def _group_maxima(
    logits,
    stride,
    lengths,
    maxima,
    maxima_stride,
    GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    length = tl.load(lengths + row_id).to(tl.int32)
    if start < length:
        at = start + tl.arange(0, TILE)
        # With VECTOR rows are whole quads: a quad is read if its first score is the row's.
        read = start + tl.arange(0, TILE) // 4 * 4 < length if VECTOR else at < length
        x = tl.load(logits + row_id * stride + at, mask=read, other=0.0)
        x = tl.where(at < length, x, float("-inf"))
        store_group_maxima(x, start, length, maxima + row_id * maxima_stride, TILE, GROUPS, LEVELS)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _in_quads(logits: Tensor) -> bool:
    return logits.shape[1] % 4 == 0 and logits.stride(0) % 4 == 0 and logits.data_ptr() % 16 == 0


def _capacity(k: int) -> int:
    capacity: int = max(_CAPACITY, triton.next_power_of_2(k))
    return capacity


def wants_maxima(width: int, k: int) -> bool:
    """Whether rows of ``width`` scores are selected from by their groups."""
    return width > _capacity(k)


def group_maxima(logits: Tensor, lengths: Tensor) -> Tensor:
    """[T, maxima_columns] of logits [T, L] float32 with adjacent columns; lengths: [T]."""
    num_rows, width = logits.shape
    maxima = torch.empty((num_rows, maxima_columns(width)), dtype=torch.float32, device=logits.device)
    _group_maxima[(num_rows, triton.cdiv(width, _MAXIMA_TILE))](
        logits,
        logits.stride(0),
        lengths,
        maxima,
        maxima.stride(0),
        GROUPS=GROUPS,
        LEVELS=group_levels(width),
        TILE=_MAXIMA_TILE,
        VECTOR=_in_quads(logits),
        num_warps=8,
    )
    return maxima


def select_rows(logits: Tensor, lengths: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    """[T, k] int64 from logits [T, L] float32 with adjacent columns, and contiguous lengths [T].

    maxima: [T, maxima_columns(L)] as ``store_group_maxima`` leaves them; None: found here, if they are wanted.
    """
    num_rows, width = logits.shape
    device = logits.device
    out = torch.empty((num_rows, k), dtype=torch.int64, device=device)
    if num_rows == 0:
        return out
    # A program fills an SM.
    num_programs = min(num_rows, _num_sms(device))
    short = not wants_maxima(width, k)
    # With two rows an SM or more a launch for the maxima keeps no more SMs busy.
    own_maxima = maxima is None and not short and num_rows >= 2 * num_programs and group_levels(width) == 1
    if maxima is None:
        if short or own_maxima:
            maxima = torch.empty((num_programs, maxima_columns(width)), dtype=torch.float32, device=device)
        else:
            maxima = group_maxima(logits, lengths)
    columns = maxima_columns(width)
    capacity = _capacity(k)
    select[(num_programs,)](
        logits,
        logits.stride(0),
        lengths,
        maxima,
        columns,
        torch.empty((num_programs, columns), dtype=torch.int32, device=device),
        torch.empty((num_programs, capacity + _TILE), dtype=torch.int64, device=device),
        out,
        num_rows,
        k,
        GROUPS=GROUPS,
        LEVELS=group_levels(width),
        CAPACITY=capacity,
        TILE=_TILE,
        VECTOR=_in_quads(logits),
        SHORT=short,
        OWN_MAXIMA=own_maxima,
        # Eight candidates a thread; where k makes the lists longer, more threads.
        num_warps=16 if capacity == _CAPACITY else 32,
    )
    return out


def topk_indices(logits: Tensor, k: int, lengths: Tensor) -> Tensor:
    """See ``seamount.kernels.topk.topk_indices``; arguments are checked there."""
    return select_rows(logits, lengths.contiguous(), k)
