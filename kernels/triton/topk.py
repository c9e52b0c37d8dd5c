"""Exact top-k on the GPU, ties to the lowest index: samples of each row, then ``topk_select``, which has the formula.

Tiles: a program takes a row, or one of 2 to 128 slices of it, 2,048 or 4,096 scores at a time.
Bytes: a score is read once, 4; 64 more for every 2^shift of them where a launch takes the samples; 8 k written.
Two launches: ``_take_samples`` copies every 2^shift-th score of a row; then one or more programs a row select, as many
as keep the SMs busy. Who computes the scores can store the samples with them and call ``select_rows`` alone. One launch
where a row has one program, which reads the samples from the row itself just before the rest of it: memory is read in
64 bytes, so that a launch for the samples alone would read half of all scores. One, too, for rows of at most 8,192
scores, which a program holds in registers.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton.topk_select import select

_CAPACITY = 8192
_MAX_SLICES = 128
# The shares that samples are dealt to: the bound is one of their maxima.
_SHARES = 128
# Most samples of a row, and the logarithm of the least distance between them.
_MAX_SAMPLES = 8192
_MIN_SHIFT = 5
# Standard deviations between the wanted number of candidates and k: of 10,000 rows of random scores a few hold fewer
# than k and are counted again.
_MARGIN = 4.0


class Samples(NamedTuple):
    """What the selection begins with."""

    scores: Tensor
    """[T, num_samples(width)] float32: scores 0, 2^shift, 2 * 2^shift, ... of a row; undefined behind its length."""
    arrivals: Tensor
    """[T] int32: zeros, which the selection changes."""


def sample_shift(width: int) -> int:
    """The logarithm of the distance between samples of rows of at most ``width`` scores."""
    distance: int = triton.cdiv(width, _MAX_SAMPLES)
    return max(_MIN_SHIFT, (distance - 1).bit_length())


def num_samples(width: int) -> int:
    """Columns of the samples of rows of at most ``width`` scores: a power of two, two a share at least."""
    columns: int = triton.next_power_of_2(triton.cdiv(width, 1 << sample_shift(width)))
    return max(2 * _SHARES, columns)


def wanted_groups(k: int, shift: int) -> int:
    """In how many shares a sample is to reach the bound, so that k scores of the row surely do.

    Of c scores that reach it about r = c / 2^shift are samples, give or take sqrt(r). The least r is wanted for which
    r - margin * sqrt(r) = k / 2^shift. They lie in G (1 - exp(-r / G)) of G shares.
    """
    root = (_MARGIN + math.sqrt(_MARGIN * _MARGIN + 4 * k / (1 << shift))) / 2
    return min(_SHARES, math.ceil(-_SHARES * math.expm1(-root * root / _SHARES)))


def wants_samples(width: int) -> bool:
    """Whether rows of ``width`` scores are selected from by their samples."""
    return width > _CAPACITY


@triton.jit(do_not_specialize=["shift"])
def _take_samples(
    logits, stride, lengths, samples, arrivals, shift,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row_id = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + row_id)
    at = number.to(tl.int64) << shift
    x = tl.load(logits + row_id * stride + at, mask=at < length, other=0.0)
    tl.store(samples + row_id * SAMPLES + number, x)
    if tl.program_id(1) == 0:
        tl.store(arrivals + row_id, 0)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a launch may begin before the one ahead of it has ended, and wait for it (from Hopper on)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def empty_samples(num_rows: int, width: int, device: torch.device) -> Samples:
    """Room for the samples of rows, for who stores their scores."""
    return Samples(
        torch.empty((num_rows, num_samples(width)), dtype=torch.float32, device=device),
        torch.empty((num_rows,), dtype=torch.int32, device=device),
    )


def _samples_of(logits: Tensor, lengths: Tensor) -> Samples:
    num_rows, width = logits.shape
    samples = empty_samples(num_rows, width, logits.device)
    columns = samples.scores.shape[1]
    _take_samples[(num_rows, triton.cdiv(columns, 1024))](
        logits,
        logits.stride(0),
        lengths,
        *samples,
        sample_shift(width),
        SAMPLES=columns,
        BLOCK=min(1024, columns),
        EARLY=starts_early(logits.device),
        num_warps=4,
        launch_pdl=starts_early(logits.device),
    )
    return samples


class _Division(NamedTuple):
    """How programs share the scores of the rows."""

    slices: int
    """Programs a row, a power of two."""
    tile: int
    """Scores that a program looks at in one go."""
    num_warps: int
    max_registers: int | None = None
    """Of a thread, at most; None: what it takes."""


def _divide(num_rows: int, width: int, num_sms: int) -> _Division:
    """A program an SM, or two where rows are many enough."""
    if not wants_samples(width):
        return _Division(slices=1, tile=2048, num_warps=16)
    if num_rows > num_sms:
        # Two programs an SM, one reading while the other counts, leave 128 registers to each of their threads.
        return _Division(slices=1, tile=4096, num_warps=8, max_registers=128)
    slices: int = min(num_sms // num_rows, triton.cdiv(width, 2048), _MAX_SLICES)
    slices = 1 << (slices.bit_length() - 1)
    if slices > 4:
        # Slices are short: how long the last program selects is what counts, most of it exchanges between warps.
        return _Division(slices, tile=2048, num_warps=8)
    # Slices are long: reading them is what counts, and more threads have more reads under way.
    return _Division(slices, tile=4096, num_warps=16)


def select_rows(logits: Tensor, lengths: Tensor, k: int, samples: Samples | None = None) -> Tensor:
    """[T, k] int64 from logits [T, L] float32 with adjacent columns, and contiguous lengths [T]; k <= MAX_CUDA_K.

    samples: of every row, where ``wants_samples``; None: taken here or on the way.
    """
    num_rows, width = logits.shape
    device = logits.device
    out = torch.empty((num_rows, k), dtype=torch.int64, device=device)
    if num_rows == 0:
        return out
    slices, tile, num_warps, max_registers = _divide(num_rows, width, _num_sms(device))
    slice_size = triton.cdiv(width, slices * tile) * tile
    short = not wants_samples(width)
    segment = _CAPACITY if short else min(_CAPACITY, slice_size)  # a program of short rows has none
    num_parallel = min(num_rows, 2 * _num_sms(device))
    num_programs = num_parallel * slices
    if samples is None and not short and slices > 1:
        samples = _samples_of(logits, lengths)
    if samples is None:  # of short rows none are read
        samples, sample_stride, spacing = Samples(logits, lengths), logits.stride(0), sample_shift(width)
    else:
        sample_stride, spacing = samples.scores.shape[1], 0
    select[(num_programs,)](
        logits,
        logits.stride(0),
        width,
        lengths,
        samples.scores,
        sample_stride,
        spacing,
        samples.arrivals,
        sample_shift(width),
        wanted_groups(k, sample_shift(width)),
        torch.empty((num_programs,), dtype=torch.int32, device=device),
        torch.empty((num_programs, 0 if short else segment + tile), dtype=torch.int64, device=device),
        slice_size,
        num_rows,
        k,
        out,
        SAMPLES=num_samples(width),
        SHARES=_SHARES,
        SLICES=slices,
        SEGMENT=segment,
        CAPACITY=_CAPACITY,
        TILE=tile,
        VECTOR=width % 4 == 0 and logits.stride(0) % 4 == 0 and logits.data_ptr() % 16 == 0,
        SHORT=short,
        MANY=num_rows > num_parallel,
        EARLY=starts_early(device),
        num_warps=num_warps,
        maxnreg=max_registers,
        launch_pdl=starts_early(device),
    )
    return out


def topk_indices(logits: Tensor, k: int, lengths: Tensor) -> Tensor:
    """See ``seamount.kernels.topk.topk_indices``; arguments are checked there."""
    return select_rows(logits, lengths.contiguous(), k)
