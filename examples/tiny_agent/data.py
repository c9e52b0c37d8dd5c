"""Batches of packed training documents, made while training runs.

A batch is a pure function of (seed, its index, its shape, the mixture): any number of workers gives the same batches in
the same order, and a stopped run goes on at ``first_batch``.

    for batch in batches(seed=1, sequence_length=2048, batch_size=64, num_workers=14):
        loss at (b, t): predict ``tokens[b, t]`` from what is before it, where ``loss_mask[b, t]``
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from examples.tiny_agent.conversation import Document
from examples.tiny_agent.documents import SHORT, DocumentSource, Mixture

PADDING = -1
"""Document id of padding, at the end of a row."""
_DRAWN_SHARE = 1.15
"""Tokens that are drawn for a batch, over its room; what does not fit is dropped."""
_SHORT_DOCUMENT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows of T tokens; each row holds whole documents, one behind the other, then padding.

    tokens: [B, T] int32, 0 in padding. loss_mask: [B, T] bool, True at the tokens that a model is to predict (those of
    the assistant: reasoning, calls, answers, EOS), never at the first token of a document. document_ids: [B, T] int32,
    counted from 0 in each row, -1 in padding: attention stays inside one document. positions: [B, T] int32, counted
    from 0 in each document, 0 in padding.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    document_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.document_ids != PADDING).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    seed: int
    sequence_length: int
    batch_size: int
    mixture: Mixture = SHORT


def batches(
    *,
    seed: int,
    sequence_length: int,
    batch_size: int,
    mixture: Mixture = SHORT,
    num_workers: int = 0,
    first_batch: int = 0,
    stride: int = 1,
) -> Iterator[Batch]:
    """Endless batches: ``first_batch`` and every ``stride``-th one after it.

    num_workers: processes that work ahead, two batches each; 0 makes batches in this process. Close the iterator (or
    drop it) to end the workers.
    """
    shape = BatchShape(seed=seed, sequence_length=sequence_length, batch_size=batch_size, mixture=mixture)
    if num_workers == 0:
        index = first_batch
        while True:
            yield make_batch(shape, index)
            index += stride
    with multiprocessing.get_context("spawn").Pool(num_workers, initializer=begin_worker) as pool:
        ahead = deque(pool.apply_async(packed_batch, (shape, first_batch + i * stride)) for i in range(2 * num_workers))
        index = first_batch + len(ahead) * stride
        while True:
            packed = ahead.popleft().get()
            ahead.append(pool.apply_async(packed_batch, (shape, index)))
            index += stride
            yield unpacked(packed)


def make_batch(shape: BatchShape, index: int) -> Batch:
    """Batch ``index``, made here and now."""
    return unpacked(packed_batch(shape, index))


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch in the form that travels: 2.1 bytes a token."""

    tokens: npt.NDArray[np.uint16]
    """[B, T]."""
    loss_mask: npt.NDArray[np.uint8]
    """[B, ceil(T / 8)], bits."""
    lengths: list[list[int]]
    """Of each row's documents."""


def begin_worker() -> None:
    """Prepares a process that makes batches."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker


def packed_batch(shape: BatchShape, index: int) -> PackedBatch:
    """Batch ``index`` in the form that travels."""
    rows = _fill_rows(DocumentSource.shared(), shape, index)
    tokens = np.zeros((shape.batch_size, shape.sequence_length), np.uint16)
    loss_mask = np.zeros((shape.batch_size, shape.sequence_length), np.bool_)
    for row, documents in enumerate(rows):
        end = sum(len(document.token_ids) for document in documents)
        if documents:
            tokens[row, :end] = np.concatenate([document.token_ids for document in documents])
            loss_mask[row, :end] = np.concatenate([document.loss_mask for document in documents])
    lengths = [[len(document.token_ids) for document in documents] for documents in rows]
    return PackedBatch(tokens, np.packbits(loss_mask, axis=1), lengths)


def _fill_rows(source: DocumentSource, shape: BatchShape, index: int) -> list[list[Document]]:
    """A little more documents than there is room for, each where it leaves the least waste; most may lose turns."""
    rows: list[list[Document]] = [[] for _ in range(shape.batch_size)]
    room = [shape.sequence_length] * shape.batch_size
    missing = _DRAWN_SHARE * shape.batch_size * shape.sequence_length
    for document in source.documents(shape.mixture, seed=(shape.seed, index), max_tokens=shape.sequence_length):
        missing -= len(document.token_ids)
        lengths = [document.length_within(left) for left in room]
        fitting = [row for row in range(shape.batch_size) if lengths[row]]
        if fitting:
            row = min(fitting, key=lambda row: _waste(room[row], lengths[row], len(document.token_ids)))
            rows[row].append(document.first(lengths[row]))
            room[row] -= lengths[row]
        if missing <= 0:
            return rows
    raise AssertionError("documents have no end")


def _waste(room: int, length: int, whole: int) -> float:
    """Tokens: what is left of the row where no other document is likely to fit, and a part of what was made in vain."""
    left = room - length
    return (left if left < _SHORT_DOCUMENT else _SHORT_DOCUMENT / 4) + (whole - length) / 4


def unpacked(packed: PackedBatch) -> Batch:
    """A packed batch as the trainer takes it."""
    shape = packed.tokens.shape
    document_ids = np.full(shape, PADDING, np.int32)
    positions = np.zeros(shape, np.int32)
    for row, lengths in enumerate(packed.lengths):
        end = sum(lengths)
        document_ids[row, :end] = np.repeat(np.arange(len(lengths)), lengths)
        if lengths:
            positions[row, :end] = np.concatenate([np.arange(length) for length in lengths])
    loss_mask = np.unpackbits(packed.loss_mask, axis=1, count=shape[1]).astype(np.bool_)
    return Batch(
        tokens=packed.tokens.astype(np.int32), loss_mask=loss_mask, document_ids=document_ids, positions=positions
    )
