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
from dataclasses import dataclass, field, replace

from seamount.wire.errors import InvalidArgument, SeamountError
from seamount.wire.limits import MAX_CONTEXT_TOKENS
from seamount.workers.cache.reservations import Reservations
from seamount.workers.events import Finished, FinishReason
from seamount.workers.requests import EngineRequest

PROBATION_TOKENS = 2
"""What a request in steps of its own samples before it joins the others: the token at which its last rank died, and one
more."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request on its way through the engine; changed by the engine's thread only.

    arrival: its place in the order of submission. num_computed: prompt tokens computed here, recomputation included;
    reached_len: the furthest position computed so far; times are seconds of the engine's clock.
    """

    request: EngineRequest
    arrival: int
    submitted_at: float
    is_preempted: bool = False
    num_sampled: int = 0
    num_computed: int = 0
    num_preemptions: int = 0
    reached_len: int = 0
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def samples(self) -> bool:
        return self.request.sampling is not None

    @property
    def target_len(self) -> int:
        """The position up to which entries are wanted now."""
        num_tokens = len(self.request.reservation.token_ids)
        until = self.request.prefill_until
        return num_tokens if self.samples or until is None else min(until, num_tokens)

    @property
    def first_missing(self) -> int:
        """A sequence that samples computes its last token always, for its logits."""
        computed_len = self.request.reservation.present_len
        return min(computed_len, self.target_len - 1) if self.samples else computed_len

    @property
    def num_missing(self) -> int:
        return max(0, self.target_len - self.first_missing)

    @property
    def is_on_probation(self) -> bool:
        return self.request.alone and self.num_sampled < PROBATION_TOKENS

    @property
    def decodes(self) -> bool:
        """Whether its next step computes one token and samples the one after it."""
        return self.samples and self.num_missing == 1

    @property
    def output_index(self) -> int:
        """Of the token to sample next."""
        assert self.request.sampling is not None, "only sequences that sample have outputs"
        return self.request.sampling.first_output_index + self.num_sampled

    def note_computed(self, first: int, end: int) -> int:
        """Positions [first, end) were computed. Returns how many count: prompt, and what was computed once before."""
        known_len = max(self.request.reservation.prompt_len, self.reached_len)
        num_computed = max(0, min(end, known_len) - first)
        self.num_computed += num_computed
        self.reached_len = max(self.reached_len, end)
        return num_computed

    def finished(self, reason: FinishReason, now: float) -> Finished:
        started_at = now if self.started_at is None else self.started_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return Finished(
            reason=reason,
            num_computed=self.num_computed,
            num_preemptions=self.num_preemptions,
            queue_s=started_at - self.submitted_at,
            prefill_s=first_token_at - started_at,
            decode_s=now - first_token_at,
        )


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

    def clear(self) -> None:
        self.waiting.clear()
        self.running.clear()

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
