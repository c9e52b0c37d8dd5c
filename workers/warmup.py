"""A rank's kernels are compiled before it serves.

Triton compiles a kernel when it is first launched, for seconds; in a turn that would be a step that outlasts its
deadline, and a rank that is taken for dead. So a rank on a GPU runs batches of every kind once. Which variant of a
kernel a step takes depends on how many tokens it has, how many sequences decode, and how long their contexts are: the
classes end at multiples of 16 for few tokens, and at powers of two and one and a half of them. The batches write to
pages that nobody holds yet. Ranks of a gang run the same ones, since their experts meet; what is on the node's disk
from an earlier start (``TRITON_CACHE_DIR``) is not compiled again. ``late_kernels`` tells what was left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch

from seamount.kernels.layout import PAGE_SIZE, CachePlanes
from seamount.workers.gang import Gang
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.runner import Model
from seamount.workers.scheduler import EngineLimits

_LOG = logging.getLogger(__name__)
DEADLINE_S = 600.0
"""Of one collective meanwhile: a peer that compiles, or still reads its weights, is not dead."""
_FEW_TOKENS = 272
"""Up to here products of matrices differ by the 16 tokens."""
_LONG_CONTEXT = 8192
"""Beyond it several programs select for a row: how many, and how, differs by the length and by the number of rows."""
_LONG_CHUNKS = (4, 8, 16, 32, 64, 128, 192)
"""Rows of one prompt behind a long context."""
_TOKEN_IDS = 64
"""Different ones in turn, so that every rank's experts get some; every vocabulary has as many. One step has a single
id: its rows go to the same few experts, and more of them to these ranks than their share."""


def warm_up(model: Model, planes: CachePlanes, gang: Gang, limits: EngineLimits, *, topk: int, num_pages: int) -> None:
    """Run the batches of ``batches``; every rank of the gang calls it, before any page is held.

    topk: tokens that a query attends to; num_pages: of ``planes``. Raises what the model raises: a kernel that does
    not compile, a peer that is lost.
    """
    began = time.monotonic()
    with gang.patience(DEADLINE_S), torch.inference_mode():
        for batch in batches(limits, topk=topk, num_pages=num_pages):
            model.forward(batch, planes).cpu()
    _LOG.info("rank_warm", extra={"took_s": round(time.monotonic() - began, 1)})


def batches(limits: EngineLimits, *, topk: int, num_pages: int) -> Iterator[ForwardBatch]:
    """Steps of every kind that ``limits`` and ``num_pages`` allow; at least one token of one sequence."""
    most = min(num_pages * PAGE_SIZE, limits.max_context_tokens)
    chunk = min(limits.prefill_chunk_tokens, limits.max_batch_tokens)
    row_counts = [rows for rows in steps(limits.max_running) if rows <= limits.max_batch_tokens]
    for context in context_lengths(most, topk):
        chunks = (2, chunk // 2 + 1, chunk, *(_LONG_CHUNKS if context > _LONG_CONTEXT else ()))
        for length in sorted({min(length, chunk, context) for length in chunks}):
            yield ForwardBatch.create([_tokens(context - length, length, range(-(-context // PAGE_SIZE)))])
        shared = (context - 1) // PAGE_SIZE  # pages before the last one, which is each sequence's own
        for rows in row_counts:
            if shared + rows <= num_pages:
                own = ([*range(shared), shared + row] for row in range(rows))
                yield ForwardBatch.create([_tokens(context - 1, 1, pages) for pages in own])
    for count in token_counts(limits.max_batch_tokens):
        yield from _prompts(count, min(chunk, most), num_pages, num_ids=_TOKEN_IDS)
    yield from _prompts(limits.max_batch_tokens, min(chunk, most), num_pages, num_ids=1)


def steps(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ...: powers of two and one and a half of each, up to ``limit``, which ends the list."""
    powers = [1 << i for i in range(limit.bit_length())]
    return sorted({n for power in powers for n in (power, power + power // 2) if n < limit} | {limit})


def context_lengths(most: int, topk: int) -> list[int]:
    """Contexts that fit into top-k, of whole and of broken tiles, one that does not, and long ones up to ``most``."""
    few = (1, 3, 16, topk - 1, topk + topk // 2 + 1, most)
    long = {n for n in steps(most) if n >= max(topk, _LONG_CONTEXT)}
    return sorted({n for n in few if 0 < n <= most} | long)


def token_counts(limit: int) -> list[int]:
    """Of whole steps: multiples of 16 while they are few, and the powers of two, with odd numbers beside them."""
    few = range(16, _FEW_TOKENS + 1, 16)
    return sorted({n for n in (*few, *(n + odd for n in steps(limit) for odd in (0, 1))) if 1 < n <= limit} | {limit})


def _prompts(count: int, chunk: int, num_pages: int, *, num_ids: int) -> Iterator[ForwardBatch]:
    """A step of ``count`` tokens, the beginnings of as many prompts as that takes; none where pages are too few."""
    lengths = [min(chunk, count - start) for start in range(0, count, chunk)]
    sizes = [-(-length // PAGE_SIZE) for length in lengths]
    if sum(sizes) <= num_pages:
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        pages = (range(first, first + size) for first, size in zip(firsts, sizes, strict=True))
        own = zip(lengths, pages, strict=True)
        yield ForwardBatch.create([_tokens(0, length, its, num_ids) for length, its in own])


def _tokens(
    first: int, length: int, pages: Sequence[int], num_ids: int = _TOKEN_IDS
) -> tuple[list[int], int, Sequence[int]]:
    return [at % num_ids for at in range(first, first + length)], first, pages
