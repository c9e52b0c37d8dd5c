"""Exact top-k on the GPU, ties to the lowest index.

    T = max { t : #{ i < length : key(x_i) >= t } >= k },   key: float bits in an order-preserving uint32, NaN as -inf
    out = the i with key > T and the first of those with key = T, ascending

T is found by bisection of the keys; counts are exact, so the result does not depend on
the tiling.

Rows of up to 8,192 scores: one program a row; all keys stay in registers while T is sought, and the row is read a
second time (from L2) to write the indices in order. Bytes: 4 L read twice, 8 k written.

Longer rows take four launches:
1. ``_group_maxima``: the row is dealt to G = 2 k groups (score i into group i mod G); each group's largest key. The
   k-th largest of these is a lower bound of T, because k groups hold a score at least as large. Reads 4 L.
2. ``_find_bounds``: one program a row finds that bound. Reads 4 G.
3. ``_collect``: a program for each 8,192 scores keeps the positions of the scores that reach the bound: about 1.4 k in
   a row of exchangeable scores. Reads 4 L.
4. ``_select``: one program a row seeks T among the candidates. If there are more than 4 k (a plateau, or scores whose
   period is G), it bisects the row itself, read 32 times from L2: slower, never wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW_KEYS = 8192
_CHUNK = 8192
_TILE = tl.constexpr(4096)
_MAX_CANDIDATES = 32768


@triton.jit
def _keys(x):
    # -0.0 + 0.0 is +0.0: the two zeros are equal scores.
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    keys = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, 0x007FFFFF, keys).to(tl.uint32)


@triton.jit
def _row_keys(row, at, length):
    """Keys of the scores at ``at``; 0, below every score's key, beyond the row's length."""
    legal = at < length
    return tl.where(legal, _keys(tl.load(row + at, mask=legal, other=0.0)), 0).to(tl.uint32)


@triton.jit
def _threshold(keys, low, wanted):
    """The largest t with at least ``wanted`` >= 1 keys >= t, or any t that exactly ``wanted`` keys reach.

    low: a key >= 1 that at least ``wanted`` keys reach. One bit a round: counting for several pivots at once costs more
    instructions than it saves rounds.
    """
    high = tl.max(keys).to(tl.uint32)
    while low < high:
        middle = low + (high - low) // 2 + (high - low) % 2
        count = tl.sum((keys >= middle).to(tl.int32))
        high = tl.where(count > wanted, high, tl.where(count == wanted, middle, middle - 1)).to(tl.uint32)
        low = tl.where(count >= wanted, middle, low).to(tl.uint32)
    return low


@triton.jit
def _row_threshold(row, length, wanted):
    """``_threshold`` of a whole row, which is read again for each bit."""
    low = tl.full((), 1, tl.uint32)
    high = tl.full((), 0xFFFFFFFF, tl.uint32)
    while low < high:
        middle = low + (high - low) // 2 + (high - low) % 2
        counts = tl.zeros((_TILE,), tl.int32)
        for start in range(0, length, _TILE):
            counts += (_row_keys(row, start + tl.arange(0, _TILE), length) >= middle).to(tl.int32)
        count = tl.sum(counts)
        high = tl.where(count > wanted, high, tl.where(count == wanted, middle, middle - 1)).to(tl.uint32)
        low = tl.where(count >= wanted, middle, low).to(tl.uint32)
    return low


@triton.jit
def _place(keys, at, threshold, greater, equal, num_equal, wanted, out):
    """Write the chosen among ``keys`` (in order of ``at``) behind the ``greater`` and ``equal`` already met."""
    is_greater = keys > threshold
    is_equal = keys == threshold
    # Two counts in one scan: tiles hold at most 2^15 keys.
    packed = is_greater.to(tl.int32) * 65536 + is_equal.to(tl.int32)
    before = tl.cumsum(packed, 0) - packed
    greater_before = greater + (before >> 16)
    equal_before = equal + (before & 0xFFFF)
    position = greater_before + tl.minimum(equal_before, num_equal)
    chosen = is_greater | (is_equal & (equal_before < num_equal))
    tl.store(out + position, at.to(tl.int64), mask=chosen & (position < wanted))
    total = tl.sum(packed)
    return greater + (total >> 16), equal + (total & 0xFFFF)


@triton.jit
def _emit_row(row, length, threshold, wanted, num_greater, out):
    greater = 0
    equal = 0
    for start in range(0, length, _TILE):
        at = start + tl.arange(0, _TILE)
        keys = _row_keys(row, at, length)
        greater, equal = _place(keys, at, threshold, greater, equal, wanted - num_greater, wanted, out)


@triton.jit
def _fill(out, wanted, k):
    for start in range(wanted, k, 1024):
        at = start + tl.arange(0, 1024)
        tl.store(out + at, tl.full((1024,), -1, tl.int64), mask=at < k)


@triton.jit
def _whole_row(logits, stride, lengths, out, k, BLOCK: tl.constexpr):
    row_id = tl.program_id(0).to(tl.int64)
    row, out = logits + row_id * stride, out + row_id * k
    length = tl.load(lengths + row_id).to(tl.int32)
    wanted = tl.minimum(length, k)
    if length <= k:
        for start in range(0, length, 1024):
            at = start + tl.arange(0, 1024)
            tl.store(out + at, at.to(tl.int64), mask=at < length)
    else:
        keys = _row_keys(row, tl.arange(0, BLOCK), length)
        low = tl.min(tl.where(keys == 0, 0xFFFFFFFF, keys).to(tl.uint32)).to(tl.uint32)
        threshold = _threshold(keys, low, wanted)
        num_greater = tl.sum((keys > threshold).to(tl.int32))
        _emit_row(row, length, threshold, wanted, num_greater, out)
    _fill(out, wanted, k)


@triton.jit
def _group_maxima(logits, stride, lengths, maxima, NUM_GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * stride
    length = tl.load(lengths + row_id).to(tl.int32)
    group = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    best = tl.zeros((COLUMNS,), tl.uint32)
    step = tl.arange(0, 16)
    for start in range(0, length, 16 * NUM_GROUPS):
        at = start + step[:, None] * NUM_GROUPS + group[None, :]
        best = tl.maximum(best, tl.max(_row_keys(row, at, length), axis=0))
    # Stored as int32: torch knows few operations on uint32.
    tl.store(maxima + row_id * NUM_GROUPS + group, best.to(tl.int32, bitcast=True))


@triton.jit
def _find_bounds(maxima, k, bounds, NUM_GROUPS: tl.constexpr):
    row_id = tl.program_id(0).to(tl.int64)
    group_keys = tl.load(maxima + row_id * NUM_GROUPS + tl.arange(0, NUM_GROUPS)).to(tl.uint32, bitcast=True)
    # With fewer than k groups in use the bound is 1: every score is a candidate.
    bound = _threshold(group_keys, tl.maximum(tl.min(group_keys), 1).to(tl.uint32), k)
    tl.store(bounds + row_id, bound.to(tl.int32, bitcast=True))


@triton.jit
def _collect(logits, stride, lengths, candidates, counts, bounds, num_chunks, CHUNK: tl.constexpr):
    row_id = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    length = tl.load(lengths + row_id).to(tl.int32)
    slot = row_id * num_chunks + chunk
    if chunk * CHUNK < length:
        bound = tl.load(bounds + row_id).to(tl.uint32, bitcast=True)
        offset = tl.arange(0, CHUNK)
        kept = (_row_keys(logits + row_id * stride, chunk * CHUNK + offset, length) >= bound).to(tl.int32)
        position = tl.cumsum(kept, 0) - kept
        tl.store(candidates + slot * CHUNK + position, offset.to(tl.int16), mask=kept != 0)
        tl.store(counts + slot, tl.sum(kept))
    else:
        tl.store(counts + slot, 0)


@triton.jit
def _select_candidates(
    row,
    candidates,
    counts,
    num_chunks,
    bound,
    wanted,
    out,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    slot = tl.arange(0, CAPACITY)
    slot_chunk = tl.zeros((CAPACITY,), tl.int32)
    first = tl.zeros((CAPACITY,), tl.int32)
    total = 0
    for chunk in tl.static_range(NUM_CHUNKS):
        total += tl.load(counts + chunk, mask=chunk < num_chunks, other=0)
        slot_chunk += (slot >= total).to(tl.int32)
        first = tl.where(slot >= total, total, first)
    filled = slot < total
    offset = tl.load(candidates + slot_chunk * CHUNK + slot - first, mask=filled, other=0).to(tl.int32)
    at = slot_chunk * CHUNK + offset
    keys = tl.where(filled, _keys(tl.load(row + at, mask=filled, other=0.0)), 0).to(tl.uint32)
    threshold = _threshold(keys, bound, wanted)
    num_greater = tl.sum((keys > threshold).to(tl.int32))
    _place(keys, at, threshold, 0, 0, wanted - num_greater, wanted, out)


@triton.jit
def _select(
    logits,
    stride,
    lengths,
    candidates,
    counts,
    bounds,
    num_chunks,
    out,
    k,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row, out = logits + row_id * stride, out + row_id * k
    length = tl.load(lengths + row_id).to(tl.int32)
    wanted = tl.minimum(length, k)
    counts += row_id * num_chunks
    candidates += row_id * num_chunks * CHUNK
    bound = tl.load(bounds + row_id).to(tl.uint32, bitcast=True)
    chunk = tl.arange(0, NUM_CHUNKS)
    total = tl.sum(tl.load(counts + chunk, mask=chunk < num_chunks, other=0))
    if wanted > 0:
        if total <= CAPACITY // 2:
            _select_candidates(
                row, candidates, counts, num_chunks, bound, wanted, out, CHUNK, NUM_CHUNKS, CAPACITY // 2
            )
        elif total <= CAPACITY:
            _select_candidates(row, candidates, counts, num_chunks, bound, wanted, out, CHUNK, NUM_CHUNKS, CAPACITY)
        else:
            threshold = _row_threshold(row, length, wanted)
            counted = tl.zeros((_TILE,), tl.int32)
            for start in range(0, length, _TILE):
                counted += (_row_keys(row, start + tl.arange(0, _TILE), length) > threshold).to(tl.int32)
            _emit_row(row, length, threshold, wanted, tl.sum(counted), out)
    _fill(out, wanted, k)


def topk_indices(logits: Tensor, k: int, lengths: Tensor) -> Tensor:
    """See ``seamount.kernels.topk.topk_indices``; arguments are checked there."""
    num_rows, num_keys = logits.shape
    lengths = lengths.contiguous()
    out = torch.empty((num_rows, k), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    if num_keys <= _ROW_KEYS:
        block = max(1024, triton.next_power_of_2(num_keys))
        _whole_row[(num_rows,)](
            logits, logits.stride(0), lengths, out, k, BLOCK=block, num_warps=min(32, max(4, block // 512))
        )
        return out
    num_groups = triton.next_power_of_2(max(2 * k, 1024))
    num_chunks = triton.cdiv(num_keys, _CHUNK)
    counts = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    bounds = torch.empty((num_rows,), dtype=torch.int32, device=logits.device)
    candidates = torch.empty((num_rows, num_chunks, _CHUNK), dtype=torch.int16, device=logits.device)
    if 2 * num_groups > _MAX_CANDIDATES:
        # k is too large for a short list; a count beyond every capacity sends the rows through the whole-row branch.
        counts.fill_(_CHUNK * 8)
        num_groups = 1024
    else:
        maxima = torch.empty((num_rows, num_groups), dtype=torch.int32, device=logits.device)
        _group_maxima[(num_rows, num_groups // 128)](
            logits, logits.stride(0), lengths, maxima, NUM_GROUPS=num_groups, COLUMNS=128, num_warps=2
        )
        _find_bounds[(num_rows,)](maxima, k, bounds, NUM_GROUPS=num_groups, num_warps=8)
        _collect[(num_rows, num_chunks)](
            logits, logits.stride(0), lengths, candidates, counts, bounds, num_chunks, CHUNK=_CHUNK, num_warps=16
        )
    capacity = 2 * num_groups
    _select[(num_rows,)](
        logits,
        logits.stride(0),
        lengths,
        candidates,
        counts,
        bounds,
        num_chunks,
        out,
        k,
        CHUNK=_CHUNK,
        NUM_CHUNKS=triton.next_power_of_2(num_chunks),
        CAPACITY=capacity,
        num_warps=8,
    )
    return out
