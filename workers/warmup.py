"""A rank's kernels are compiled before it serves.

Triton compiles a kernel when it is first launched, for seconds; in a turn that would be a step that outlasts its
deadline, and a rank that is taken for dead. So a rank on a GPU runs batches of every kind once: chunks of a prompt and
single tokens of one and of many sequences, within top-k and on contexts of four and sixteen times that. They write to
pages that nobody holds yet. Ranks of a gang run the same batches, since their experts meet; what is on the node's disk
from an earlier start (``TRITON_CACHE_DIR``) is not compiled again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch

from seamount.kernels.layout import PAGE_SIZE, CachePlanes
from seamount.workers.gang import Gang
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.runner import Model
from seamount.workers.scheduler import EngineLimits

_LOG = logging.getLogger(__name__)
DEADLINE_S = 600.0
"""Of one collective meanwhile: a peer that compiles, or still reads its weights, is not dead."""
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
"""Sequences of a step that decodes; kernels differ by the power of two and by divisibility by 16."""


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
    firsts = [0]
    while (longer := max(topk, firsts[-1] * 4)) < most:  # kernels are laid out by the context's length, too
        firsts.append(longer)
    chunk = min(limits.prefill_chunk_tokens, limits.max_batch_tokens)
    for first in firsts:
        for length in sorted({min(length, most - first) for length in (chunk, chunk // 2 + 1, 2)}):
            pages = range(-(-(first + length) // PAGE_SIZE))
            yield ForwardBatch.create([([1] * length, first, pages)])
        for rows in ROWS:
            if rows <= min(limits.max_running, limits.max_batch_tokens, num_pages - first // PAGE_SIZE):
                yield ForwardBatch.create([_single(first, row) for row in range(rows)])


def _single(first: int, row: int) -> tuple[list[int], int, list[int]]:
    """A sequence's next token at position ``first``: pages before it are shared, the last one is its own."""
    shared = first // PAGE_SIZE
    return [1], first, [*range(shared), shared + row]
