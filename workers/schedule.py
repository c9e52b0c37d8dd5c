"""One step's work, as the scheduler decides it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from seamount.wire.errors import SeamountError
from seamount.workers.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Positions [first, end) of one sequence, computed in one step; ``samples``: the last one's logits are wanted."""

    sequence: Sequence
    first: int
    end: int
    samples: bool

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step's work: one token of each sequence that decodes, then chunks of prompts, oldest first.

    complete: prefill-only sequences that lack nothing; dropped: background sequences that give way; lost: sequences
    that the scheduler has dropped because their reservation has ended, with the reason.
    """

    decode: tuple[Chunk, ...] = ()
    prefill: tuple[Chunk, ...] = ()
    complete: tuple[Sequence, ...] = ()
    dropped: tuple[Sequence, ...] = ()
    lost: tuple[tuple[Sequence, SeamountError], ...] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decode + self.prefill

    @property
    def num_prefill_tokens(self) -> int:
        return sum(map(len, self.prefill))

    @property
    def is_background(self) -> bool:
        """Whether all that it computes gives way to other work."""
        return bool(self.chunks) and all(chunk.sequence.request.is_background for chunk in self.chunks)

    def without_background(self) -> Schedule:
        """The same with its background sequences dropped."""
        kept = tuple(chunk for chunk in self.prefill if not chunk.sequence.request.is_background)
        gone = tuple(chunk.sequence for chunk in self.prefill if chunk.sequence.request.is_background)
        return replace(self, prefill=kept, dropped=self.dropped + gone)

    def within(self, prefill_budget: int) -> Schedule:
        """The same with at most ``prefill_budget`` prompt tokens: the youngest chunks are cut first."""
        if self.num_prefill_tokens <= prefill_budget:
            return self
        kept: list[Chunk] = []
        for chunk in self.prefill:
            size = min(len(chunk), prefill_budget)
            prefill_budget -= size
            if size == len(chunk):
                kept.append(chunk)
            elif size > 0:
                kept.append(replace(chunk, end=chunk.first + size, samples=False))
        return replace(self, prefill=tuple(kept))
