"""One rank in virtual time: the system's own caches and scheduler, and steps that take what ``StepCosts`` says."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import StepCosts
from benchmarks.simulation.mover import Mover
from seamount.router.placement import RankLoad
from seamount.wire.ids import RankId
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.requests import EngineRequest, SamplingParams
from seamount.workers.schedule import Schedule
from seamount.workers.scheduler import EngineLimits, Scheduler
from seamount.workers.sequence import Sequence


@dataclass(slots=True, kw_only=True)
class Answer:
    """A turn at work here. Both are called once, in virtual time; token_ids: what it will sample, in order."""

    token_ids: array[int]
    on_first_token: Callable[[], None]
    on_end: Callable[[], None]


@dataclass(slots=True, kw_only=True)
class Rank:
    """``caches`` and ``scheduler`` are the real ones; what a step computes is only counted."""

    rank_id: RankId
    clock: Clock
    costs: StepCosts
    caches: Reservations
    limits: EngineLimits
    scheduler: Scheduler = field(init=False)
    mover: Mover = field(init=False)
    num_computed: int = 0
    busy_s: float = 0.0
    _answers: dict[str, Answer] = field(default_factory=dict)
    _num_submitted: int = 0
    _is_stepping: bool = False

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(reservations=self.caches, limits=self.limits)
        self.mover = Mover.of(self.clock, self.costs, self.caches, self.wake)

    def submit(self, reservation: Reservation, answer: Answer) -> None:
        """Compute what the reservation lacks, then the answer's tokens one by one."""
        request = EngineRequest(
            id=reservation.id,
            reservation=reservation,
            sampling=SamplingParams(max_output_tokens=len(answer.token_ids)),
            sink=lambda event: None,
        )
        sequence = Sequence(request=request, arrival=self._num_submitted, submitted_at=self.clock.now)
        self._num_submitted += 1
        self._answers[reservation.id] = answer
        self.scheduler.add(sequence)
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        if not self._is_stepping:
            self._is_stepping = True
            self.clock.at(self.clock.now, self._step)

    def keep(self) -> None:
        """What the rank's server does now and then: leases and reservations end with their time, not those at work."""
        for reservation_id in self._answers:
            self.caches.renew(reservation_id)
        self.caches.expire()
        self.wake()

    def load(self) -> RankLoad:
        """What a router knows of it."""
        state = self.caches.state()
        return RankLoad(
            rank_id=self.rank_id,
            address="",
            num_free_pages=state.num_free,
            num_cached_pages=state.num_cached,
            num_running=len(self.scheduler.running),
            num_answers=len(self._answers),
            num_queued_prefill_tokens=self.scheduler.queued_prefill_tokens,
            prefill_tokens_per_s=self.costs.prefill_tokens_per_s,
            pull_bytes_per_s=0.0,
            push_bytes_per_s=0.0,
            kv_bytes_per_token=self.costs.kv_bytes_per_token,
            restore_bytes_per_s=self.costs.host_tokens_per_s * self.costs.kv_bytes_per_token,
        )

    def _step(self) -> None:
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            self._is_stepping = False
            return
        step_s = self.costs.step_s(
            [chunk.end for chunk in schedule.decode], [(chunk.first, chunk.end) for chunk in schedule.prefill]
        )
        num_steps = self._num_alike(schedule, step_s)
        self.busy_s += num_steps * step_s
        self.clock.after(num_steps * step_s, lambda: self._stepped(schedule, num_steps, step_s))

    def _num_alike(self, schedule: Schedule, step_s: float) -> int:
        """How many decode steps pass with nothing else to decide: a sequence ends, needs a page, or an event comes."""
        if schedule.prefill or any(chunk.sequence.first_token_at is None for chunk in schedule.decode):
            return 1
        num_steps = max(1, int((self.clock.next_s - self.clock.now) / step_s) if self.clock.next_s < 1e12 else 1 << 20)
        for chunk in schedule.decode:
            reservation = chunk.sequence.request.reservation
            left = len(self._answers[reservation.id].token_ids) - chunk.sequence.num_sampled
            num_steps = min(num_steps, left, reservation.capacity - len(reservation.token_ids) + 1)
        return max(1, num_steps)

    def _stepped(self, schedule: Schedule, num_steps: int, step_s: float) -> None:
        began_at = self.clock.now - num_steps * step_s
        for chunk in schedule.chunks:
            sequence, reservation = chunk.sequence, chunk.sequence.request.reservation
            if sequence.started_at is None:
                sequence.started_at = began_at
            self.num_computed += sequence.note_computed(chunk.first, chunk.end)
            if chunk.samples:
                self._sample(sequence, num_steps)
            self.caches.advance(reservation.id, chunk.end + (num_steps - 1) * chunk.samples)
            answer = self._answers[reservation.id]
            if chunk.samples and sequence.num_sampled == len(answer.token_ids):
                self.scheduler.remove(sequence)
                del self._answers[reservation.id]
                answer.on_end()
        self.clock.at(self.clock.now, self._step)  # behind what this step has set off

    def _sample(self, sequence: Sequence, num_tokens: int) -> None:
        reservation = sequence.request.reservation
        answer = self._answers[reservation.id]
        for _ in range(num_tokens):
            self.caches.append_token(reservation.id, answer.token_ids[sequence.num_sampled])
            sequence.num_sampled += 1
        if sequence.first_token_at is None:
            sequence.first_token_at = self.clock.now
            answer.on_first_token()
