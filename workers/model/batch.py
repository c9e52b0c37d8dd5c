"""One step's tokens, and how attention walks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The tokens of B sequences, one after the other: T rows in all. B, T and N may be 0.

    token_ids: [T] int64. positions: [T] int64, consecutive within a sequence, the last one ``context_lens[b] - 1``.
    slots: [T] int64, distinct: ``physical_page * 64 + offset`` where each token's cache entries are written.
    query_starts: B + 1 numbers; sequence b has the rows [query_starts[b], query_starts[b + 1]), at least one.
    context_lens: tokens of each sequence in the cache after this step's writes.
    page_tables: physical pages of each sequence in order, at least ceil(context_len / 64).
    logit_rows: [N] int64, rows whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: list[int]
    context_lens: list[int]
    page_tables: list[list[int]]
    logit_rows: Tensor

    def to(self, device: torch.device) -> ForwardBatch:
        """The same batch with its tensors on ``device``; itself where they are there already."""
        if self.token_ids.device == device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            logit_rows=self.logit_rows.to(device),
        )

    @staticmethod
    def create(
        sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], logit_rows: Sequence[int] | None = None
    ) -> ForwardBatch:
        """A batch of (token ids of this step, position of the first, physical pages) for each sequence.

        logit_rows: None for the last row of every sequence. Raises ValueError for a sequence without tokens or with
        too few pages.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, context_lens, page_tables = [0], [], []
        for ids, first, pages in sequences:
            end = first + len(ids)
            if not ids or len(pages) * PAGE_SIZE < end:
                raise ValueError(f"a sequence of {len(ids)} tokens from {first} on has {len(pages)} pages")
            token_ids.extend(ids)
            positions.extend(range(first, end))
            slots.extend(pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(first, end))
            starts.append(len(token_ids))
            context_lens.append(end)
            page_tables.append(list(pages))
        rows = [start - 1 for start in starts[1:]] if logit_rows is None else list(logit_rows)
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            query_starts=starts,
            context_lens=context_lens,
            page_tables=page_tables,
            logit_rows=torch.tensor(rows, dtype=torch.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """The sequences with one new token, attended together.

    rows: [D] int64 rows of the batch. lengths: [D] int64. page_tables: [D, P] int64, 0 beyond a sequence's pages.
    slots: [D, k] int64: every context slot where the context fits into k, -1 beyond; k = min(top-k, longest context).
    scored: [S] int64, those of the D whose context exceeds top-k; their rows of ``slots`` come from the indexer.
    """

    rows: Tensor
    lengths: Tensor
    page_tables: Tensor
    slots: Tensor
    scored: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Several new tokens of one sequence.

    rows: their rows of the batch. lengths: [n] int64, tokens that each row may see. pages: [P] int64.
    slots: [L] int64, the context's slots in order.
    scored: where its rows stand among the plan's scored rows; None if the context fits into top-k.
    """

    rows: slice
    lengths: Tensor
    pages: Tensor
    slots: Tensor
    scored: slice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How all layers of one step walk over its batch.

    scored_rows: [X] int64, the rows for which the indexer must choose: first those of ``decode.scored``, then those of
    the scored chunks in order.
    """

    decode: DecodeRows | None
    chunks: list[PrefillChunk]
    scored_rows: Tensor

    @staticmethod
    def create(batch: ForwardBatch, topk: int) -> AttentionPlan:
        """topk: tokens that a query attends to; sequences within it are not scored."""
        starts = batch.query_starts
        single = [b for b in range(len(batch.context_lens)) if starts[b + 1] - starts[b] == 1]
        several = [b for b in range(len(batch.context_lens)) if starts[b + 1] - starts[b] > 1]
        scored = [starts[b] for b in single if batch.context_lens[b] > topk]
        chunks: list[PrefillChunk] = []
        for b in several:
            first = len(scored)
            if batch.context_lens[b] > topk:
                scored.extend(range(starts[b], starts[b + 1]))
            chunks.append(_prefill_chunk(batch, b, slice(first, len(scored)) if len(scored) > first else None))
        return AttentionPlan(
            decode=_decode_rows(batch, single, topk) if single else None,
            chunks=chunks,
            scored_rows=torch.tensor(scored, dtype=torch.int64, device=batch.positions.device),
        )


def context_slots(pages: Tensor, num_tokens: int) -> Tensor:
    """The slots of the first tokens behind page tables: [..., P] int64 to [..., num_tokens] int64."""
    offsets = torch.arange(PAGE_SIZE, device=pages.device)
    return (pages.unsqueeze(-1) * PAGE_SIZE + offsets).flatten(-2)[..., :num_tokens]


def slots_at(page_tables: Tensor, indices: Tensor) -> Tensor:
    """Positions to physical slots: [D, P] page tables, [D, k] positions or -1 to [D, k] slots or -1."""
    at = indices.clamp(min=0)
    slots = page_tables.gather(1, at // PAGE_SIZE) * PAGE_SIZE + at % PAGE_SIZE
    return slots.masked_fill_(indices < 0, -1)


def _prefill_chunk(batch: ForwardBatch, b: int, scored: slice | None) -> PrefillChunk:
    length = batch.context_lens[b]
    device = batch.positions.device
    pages = torch.tensor(batch.page_tables[b][: -(-length // PAGE_SIZE)], dtype=torch.int64, device=device)
    rows = slice(batch.query_starts[b], batch.query_starts[b + 1])
    return PrefillChunk(
        rows=rows,
        lengths=batch.positions[rows] + 1,
        pages=pages,
        slots=context_slots(pages, length),
        scored=scored,
    )


def _decode_rows(batch: ForwardBatch, single: list[int], topk: int) -> DecodeRows:
    device = batch.positions.device
    lengths = [batch.context_lens[b] for b in single]
    num_pages = -(-max(lengths) // PAGE_SIZE)
    padded = [(batch.page_tables[b] + [0] * num_pages)[:num_pages] for b in single]
    page_tables = torch.tensor(padded, dtype=torch.int64, device=device)
    lengths_column = torch.tensor(lengths, dtype=torch.int64, device=device)
    slots = context_slots(page_tables, min(topk, max(lengths)))
    unseen = torch.arange(slots.shape[1], device=device) >= lengths_column.unsqueeze(1)
    return DecodeRows(
        rows=torch.tensor([batch.query_starts[b] for b in single], dtype=torch.int64, device=device),
        lengths=lengths_column,
        page_tables=page_tables,
        slots=slots.masked_fill(unseen, -1),
        scored=torch.tensor([i for i, n in enumerate(lengths) if n > topk], dtype=torch.int64, device=device),
    )
