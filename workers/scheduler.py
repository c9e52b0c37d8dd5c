"""Which tokens the next step computes: a pure decision over sequences and pages, no torch.

A sequence waits (in order of arrival), then runs: its prompt is computed in chunks, then one token a step. When pages
run out, the youngest sequence gives its pages back and waits again at its old place; what it computed stays cached as
long as nobody needs the room. The oldest sequence is never preempted for another, so it always moves on, where leases
hold the last pages when they end: none is given meanwhile. A background sequence is dropped by the first step that
finds other work.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from seamount.wire.errors import InvalidArgument, SeamountError
from seamount.wire.limits import MAX_CONTEXT_TOKENS
from seamount.workers.cache.reservations import Reservations
from seamount.workers.schedule import Chunk, Schedule
from seamount.workers.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What a step, the queue and a sequence may hold.

    max_batch_tokens: tokens in a step; max_running: sequences that hold a place in it; prefill_chunk_tokens: prompt
    tokens of one sequence in a step, and of the whole rank while any rank of its gang decodes; max_context_tokens:
    where a sequence ends with ``length``; max_waiting: requests that may wait before more are refused.

    Raises InvalidArgument unless all are positive and every running sequence fits into a step with one token.
    """

    max_batch_tokens: int
    max_running: int
    prefill_chunk_tokens: int
    max_context_tokens: int = MAX_CONTEXT_TOKENS
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_running", "prefill_chunk_tokens", "max_context_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; it must be at least 1", field=name)
        if self.max_batch_tokens < self.max_running:
            raise InvalidArgument(
                f"max_batch_tokens is {self.max_batch_tokens}; it must be at least max_running {self.max_running}",
                field="max_batch_tokens",
            )


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """Owns the order of sequences; pages stay with ``Reservations``. Used by the engine's thread only."""

    reservations: Reservations
    limits: EngineLimits
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    num_preemptions: int = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget it; its reservation is the caller's to release. Idempotent."""
        for sequences in (self.waiting, self.running):
            if sequence in sequences:
                sequences.remove(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def num_running(self) -> int:
        """Without background sequences, as the two that follow."""
        return sum(not sequence.request.is_background for sequence in list(self.running))

    @property
    def num_waiting(self) -> int:
        return sum(not sequence.request.is_background for sequence in list(self.waiting))

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens still to compute, of running and waiting sequences."""
        real = [sequence for sequence in list(self) if not sequence.request.is_background]
        return sum(sequence.num_missing for sequence in real if not sequence.decodes)

    def schedule(self) -> Schedule:
        """Decode first, then prompts in order of arrival, within the limits; one that is on probation by itself, while
        the others wait. Who waits for pages from a tier below sits out. Empty if nothing can move now."""
        lost: list[tuple[Sequence, SeamountError]] = []
        dropped = self._drop_background()
        stalled, preempted = self._make_room(lost)
        if not preempted:
            self._admit(lost)
        decode: list[Chunk] = []
        prompts: list[Sequence] = []
        complete: list[Sequence] = []
        able = [s for s in self.running if s not in stalled and not s.request.reservation.is_restoring]
        for sequence in _chosen(able):
            first, end = sequence.first_missing, sequence.target_len
            if sequence.samples and end - first == 1:
                decode.append(Chunk(sequence=sequence, first=first, end=end, samples=True))
            else:
                (prompts if first < end else complete).append(sequence)
        budget = self.limits.max_batch_tokens - len(decode)
        if decode:
            budget = min(budget, self.limits.prefill_chunk_tokens)
        prefill: list[Chunk] = []
        for sequence in prompts:
            first = sequence.first_missing
            size = min(sequence.target_len - first, self.limits.prefill_chunk_tokens, budget)
            if size > 0:
                samples = sequence.samples and first + size == sequence.target_len
                prefill.append(Chunk(sequence=sequence, first=first, end=first + size, samples=samples))
                budget -= size
        return Schedule(
            decode=tuple(decode),
            prefill=tuple(prefill),
            complete=tuple(complete),
            dropped=dropped,
            lost=tuple(lost),
        )

    def _drop_background(self) -> tuple[Sequence, ...]:
        background = tuple(sequence for sequence in self if sequence.request.is_background)
        if not background or len(background) == len(self):
            return ()
        for sequence in background:
            self.remove(sequence)
        return background

    def _make_room(self, lost: list[tuple[Sequence, SeamountError]]) -> tuple[list[Sequence], bool]:
        """Pages for the next token of all that decode, oldest first; the youngest give theirs back if none are left.

        Returns those that must sit this step out, and whether any was preempted.
        """
        stalled: list[Sequence] = []
        any_preempted = False
        for sequence in list(self.running):
            if sequence.request.reservation.capacity >= sequence.target_len:
                continue
            try:
                while sequence in self.running and not self.reservations.ensure_capacity(
                    sequence.request.id, sequence.target_len
                ):
                    if self._preempt_youngest(sequence):
                        any_preempted = True
                    else:
                        stalled.append(sequence)
                        break
            except SeamountError as error:  # ended from outside: superseded, expired or released
                self.remove(sequence)
                lost.append((sequence, error))
        return stalled, any_preempted

    def _preempt_youngest(self, needy: Sequence) -> bool:
        """Take the pages of the youngest sequence that holds some, ``needy`` itself only where others are older.

        False if nothing may be taken: what is left belongs to transfers and to reservations not submitted yet, which
        end by themselves.
        """
        holders = sorted((s for s in self if not s.is_preempted and s.arrival >= needy.arrival), key=_by_arrival)
        if self.running and self.running[0] is needy:
            holders = [s for s in holders if s is not needy]
        return any(self._preempt(victim) for victim in reversed(holders))

    def _preempt(self, victim: Sequence) -> bool:
        try:
            if not self.reservations.preempt(victim.request.id):
                return False  # a transfer still reads its pages
        except SeamountError:
            return False  # it has ended; its own turn in the loop, or its next admission, reports it
        victim.is_preempted = True
        if victim in self.running:
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.running.remove(victim)
            self.add(victim)
        return True

    def _admit(self, lost: list[tuple[Sequence, SeamountError]]) -> None:
        """Let the first of those who wait run, as long as there are places and pages; nobody overtakes."""
        while self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            try:
                while not self.reservations.resume(sequence.request.id):
                    # With nobody running, only those behind it can make room; else somebody will end.
                    if self.running or not self._preempt_youngest(sequence):
                        return
            except SeamountError as error:
                lost.append((sequence, error))
                del self.waiting[0]
                continue
            del self.waiting[0]
            sequence.is_preempted = False
            insort(self.running, sequence, key=_by_arrival)


def _chosen(able: list[Sequence]) -> list[Sequence]:
    """The oldest on probation alone, else all."""
    return [sequence for sequence in able if sequence.is_on_probation][:1] or able


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival
