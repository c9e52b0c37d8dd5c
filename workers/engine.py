"""The step loop of a rank: schedule, run the model, sample, commit.

``Engine.step`` is the whole story. One thread owns it, and with it the scheduler, the model, the gang's collectives and
every call of a sink; ``submit``, ``abort``, ``healthy`` and ``state`` may come from any other thread and never wait for
a step. Both roles run the same loop: a prefill rank's requests just do not sample.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum

from seamount.kernels.layout import CachePlanes
from seamount.wire import failpoints
from seamount.wire.errors import Internal, NotFound, SeamountError, Unavailable
from seamount.workers import scheduler as scheduling
from seamount.workers.cache.reservations import Reservations
from seamount.workers.events import EngineEvent, Failed, Finished, FinishReason, Progress, Tokens
from seamount.workers.gang import Gang, StepHeader
from seamount.workers.inbox import Inbox
from seamount.workers.requests import EngineRequest
from seamount.workers.runner import Model, Runner
from seamount.workers.sampling import Draw, Sampled, sample
from seamount.workers.scheduler import Chunk, EngineLimits, Schedule, Scheduler

_LOG = logging.getLogger(__name__)
_IDLE_WAIT_S = 60.0
_BLOCKED_WAIT_S = 0.005
"""Pages held outside the engine come free without a word to it: how long it waits before it looks again."""
_RENEW_EVERY_S = 0.5
_HEARD_S = 0.005
"""What the word that a suspect enters the batch gets to leave this process."""

Outcome = tuple[scheduling.Sequence, EngineEvent]


class StepKind(Enum):
    """What this rank computed in a step of its gang: nothing, tokens of answers, parts of prompts, or both."""

    IDLE = "idle"
    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCounts:
    """Since the start: sequences that gave their pages back, requests that ended in an error."""

    num_preemptions: int
    num_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Counters since the start, and what is there now.

    num_computed_tokens: prompt tokens, recomputation included; num_background_tokens: not among those;
    num_running, num_waiting, queued_prefill_tokens (still to compute): without background requests; num_blocked:
    requests that found no place or no pages in the last step; prefill_tokens_per_s: over recent steps that only
    computed prompts; answer_s: smoothed, from the first step of an answer to its end; both 0 before the first;
    is_resting: no rank of the gang has work.
    """

    num_steps: int
    num_computed_tokens: int
    num_sampled_tokens: int
    num_background_tokens: int
    num_running: int
    num_waiting: int
    num_blocked: int
    queued_prefill_tokens: int
    prefill_tokens_per_s: float
    answer_s: float
    is_resting: bool


class Engine:
    """One rank's engine.

    model, planes, reservations: what it computes with and where; the planes' pages are the reservations' pages.
    gang: joined already; the engine's thread uses it from ``start`` on and closes it at the end.
    eos_token_id: ends a message. vocab_limit: ids from here on are padding of the head: refused, never sampled.
    limits: ``max_context_tokens`` is also bounded by what all pages together hold.
    health_timeout_s: how old the last sign of life may be.
    on_fatal: called once, on the engine's thread, after all requests were failed, when the loop cannot go on: a peer of
    the gang is lost, or lock-step with it. on_step: told, on the engine's thread, of each step and how long it took.
    """

    def __init__(
        self,
        *,
        model: Model,
        planes: CachePlanes,
        reservations: Reservations,
        gang: Gang,
        eos_token_id: int,
        vocab_limit: int,
        limits: EngineLimits,
        health_timeout_s: float = 5.0,
        on_fatal: Callable[[SeamountError], None] | None = None,
        on_step: Callable[[StepKind, float], None] | None = None,
    ) -> None:
        capacity = reservations.num_pages * reservations.page_size
        self._limits = replace(limits, max_context_tokens=min(limits.max_context_tokens, capacity))
        self._eos_token_id = eos_token_id
        self._vocab_limit = vocab_limit
        self._health_timeout_s = health_timeout_s
        self._on_fatal = on_fatal
        self._on_step = on_step
        self._runner = Runner(model=model, planes=planes)
        self._reservations = reservations
        self._gang = gang
        self._scheduler = Scheduler(reservations=reservations, limits=self._limits)
        self._inbox = Inbox(max_known=limits.max_running + limits.max_waiting)
        self._sequences: dict[str, scheduling.Sequence] = {}
        self._batch: set[scheduling.Sequence] = set()

        self._lock = threading.Lock()  # guards the three that follow
        self._thread: threading.Thread | None = None
        self._stop_deadline: float | None = None
        self._probed_at: float | None = None

        self._resting = True
        self._leaving = False
        self._beat_at = self._renewed_at = time.monotonic()
        self._num_steps = self._num_computed_tokens = self._num_sampled_tokens = 0
        self._num_background_tokens = self._num_blocked = self._num_failed = 0
        self._recent_prefill_tokens = self._recent_prefill_s = self._answer_s = 0.0

    # ---- from any thread

    def start(self) -> None:
        """Start the loop's thread. Idempotent; an engine that has stopped does not start again."""
        with self._lock:
            if self._thread is None and self._stop_deadline is None:
                self._beat_at = time.monotonic()
                self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
                self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Fail what is outstanding with Unavailable, meet the gang, end the thread. Idempotent.

        Ranks of a gang leave together: one that stops steps on without work until all stop, at most ``timeout_s``.
        """
        self._inbox.close(_stopped())
        with self._lock:
            if self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + timeout_s
            thread = self._thread
        self._gang.ring()
        if thread is None:
            self._fail_all(_stopped())
            self._gang.close()
        elif thread is not threading.current_thread():
            thread.join(timeout_s + self._gang.timeout_s)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; its sink hears everything further, a ``Finished`` or ``Failed`` last.

        Raises InvalidArgument (see ``EngineRequest.check``), AlreadyExists (the reservation has a request already),
        ResourceExhausted (too many wait), Unavailable (stopped or failed).
        """
        request.check(vocab_limit=self._vocab_limit, max_context_tokens=self._limits.max_context_tokens)
        self._inbox.submit(request)
        self._gang.ring()

    def abort(self, request_id: str) -> None:
        """End a request within a step: its sink gets ``Finished(cancelled)``, and no step touches its pages after that.

        Unknown or finished: nothing happens.
        """
        if self._inbox.abort(request_id):
            self._gang.ring()

    def healthy(self) -> bool:
        """Whether the loop lives: a step, or the answer to a no-op, within ``health_timeout_s``. Never waits.

        An idle engine is asked to step, with its whole gang, and judged by the following calls.
        """
        now = time.monotonic()
        with self._lock:
            if self._thread is None or not self._thread.is_alive() or self._leaving:
                return False
            if not self._resting:
                return now - self._beat_at < self._health_timeout_s
            if self._probed_at is None:
                if now - self._beat_at < self._health_timeout_s / 4:
                    return True
                self._probed_at = now
                self._gang.ring()
            return now - self._probed_at < self._health_timeout_s

    def stalled(self) -> Unavailable:
        """What requests fail with when the loop does not live. In a gang any rank may be the one that hangs: only alone
        it is this one's batch that it hangs in."""
        reason = "ENGINE_STALLED" if self._gang.size == 1 else "GANG_STALLED"
        return Unavailable("the engine does not step", reason=reason, retry_after_s=1.0)

    def state(self) -> EngineState:
        """A snapshot; fields may be a step apart from each other."""
        submitted = [sequence for sequence in self._inbox.waiting() if not sequence.request.is_background]
        queued = self._scheduler.queued_prefill_tokens + sum(sequence.num_missing for sequence in submitted)
        return EngineState(
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_sampled_tokens=self._num_sampled_tokens,
            num_background_tokens=self._num_background_tokens,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(submitted),
            num_blocked=self._num_blocked,
            queued_prefill_tokens=queued,
            prefill_tokens_per_s=self._recent_prefill_tokens / (self._recent_prefill_s or 1.0),
            answer_s=self._answer_s,
            is_resting=self._resting,
        )

    def faults(self) -> FaultCounts:
        return FaultCounts(num_preemptions=self._scheduler.num_preemptions, num_failed=self._num_failed)

    # ---- the engine's thread

    def step(self) -> None:
        """One step of this rank, in lock-step with its gang.

        A rank without work joins with zero tokens; when no rank has any, all rest. Only an error of the gang, or one in
        mid-forward of a gang, leaves this function: lock-step is lost then.
        """
        began_at = time.monotonic()
        self._take_news()
        schedule = self._schedule()
        is_background = schedule.is_background
        headers = self._gang.agree(
            StepHeader(
                num_decode_tokens=len(schedule.decode),
                num_prefill_tokens=0 if is_background else schedule.num_prefill_tokens,
                num_background_tokens=schedule.num_prefill_tokens if is_background else 0,
                stop=self._stop_deadline is not None,
            )
        )
        if is_background and any(header.num_tokens for header in headers):
            schedule = schedule.without_background()
            self._give_way(schedule)
        if any(header.has_work for header in headers):
            if any(header.num_decode_tokens for header in headers):  # no stream waits for a peer's long prompt
                schedule = schedule.within(self._limits.prefill_chunk_tokens)
            self._tell_batch(schedule.chunks)
            self._deliver(self._compute(schedule.chunks))
            self._count(schedule, time.monotonic() - began_at)
        else:
            self._resting = True
            self._leaving = all(header.stop for header in headers)
        self._probed_at = None
        self._beat_at = time.monotonic()

    def _loop(self) -> None:
        error: SeamountError = _stopped()
        try:
            while not self._leaving and not self._is_late():
                if self._resting:
                    if not self._gang.wait_for_work(self._rest_s()):
                        if self._sequences:
                            self._gang.ring()
                        continue
                    self._beat_at = time.monotonic()
                    self._resting = False
                self.step()
        except Exception as cause:
            _LOG.exception("engine_failed")
            is_lost = isinstance(cause, SeamountError) and cause.reason == "GANG_LOST"
            reason = "GANG_LOST" if is_lost else "ENGINE_FAILED"
            error = Unavailable(f"this rank's engine has failed: {cause}", reason=reason, retry_after_s=1.0)
            self._fail_all(error)
            if self._on_fatal is not None:
                self._on_fatal(error)
        finally:
            self._leaving = True
            self._fail_all(error)
            self._gang.close()

    def _is_late(self) -> bool:
        """Whether it was told to stop so long ago that it leaves although its gang has not."""
        return self._stop_deadline is not None and time.monotonic() >= self._stop_deadline

    def _rest_s(self) -> float:
        if self._stop_deadline is not None:
            return max(0.0, self._stop_deadline - time.monotonic())
        return _BLOCKED_WAIT_S if self._sequences else _IDLE_WAIT_S

    def _take_news(self) -> None:
        """Requests, aborts and the stop that came since the last step; what comes from now on rings again."""
        self._gang.hush()
        news = self._inbox.take()
        for sequence in news.submitted:
            self._sequences[sequence.request.id] = sequence
            self._scheduler.add(sequence)
        now = time.monotonic()
        for request_id in news.aborted:
            if request_id in self._sequences:
                sequence = self._sequences[request_id]
                self._deliver([(sequence, sequence.finished("cancelled", now))])
        if self._stop_deadline is not None:
            self._fail_all(_stopped())
        if now - self._renewed_at >= _RENEW_EVERY_S:  # a reservation lives as long as its request does
            self._renewed_at = now
            for request_id in self._sequences:
                with suppress(NotFound):  # the scheduler meets this, too, and reports it
                    self._reservations.renew(request_id)

    def _schedule(self) -> Schedule:
        """This rank's own part of the step; a failure here fails its requests, never the step."""
        try:
            schedule = self._scheduler.schedule()
        except Exception as cause:
            _LOG.exception("schedule_failed")
            self._fail_all(_internal(cause), refuse=False)
            return Schedule()
        now = time.monotonic()
        self._deliver((sequence, Failed(error=error)) for sequence, error in schedule.lost)
        self._deliver((sequence, sequence.finished("prefilled", now)) for sequence in schedule.complete)
        self._give_way(schedule)
        self._num_blocked = self._scheduler.num_waiting
        return schedule

    def _give_way(self, schedule: Schedule) -> None:
        now = time.monotonic()
        self._deliver([(sequence, sequence.finished("cancelled", now)) for sequence in schedule.dropped])

    def _tell_batch(self, chunks: Sequence[Chunk]) -> None:
        """Tell who is in the batch from now on and who no longer, before it is computed: if this rank dies of it, its
        own batch is known."""
        batch = {chunk.sequence for chunk in chunks}
        changed = [s for s in batch ^ self._batch if s.request.id in self._sequences]
        self._batch = batch
        self._deliver([(s, Progress(num_computed=s.num_computed, in_batch=s in batch)) for s in changed])
        if any(s.is_on_probation for s in changed):
            time.sleep(_HEARD_S)

    def _compute(self, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Run the model over the chunks, sample, and record what is in the cache now."""
        outcomes: list[Outcome] = []
        with self._pages_in_use(chunks, outcomes) as held:
            try:
                batch, failure = self._runner.lay_out(held), None
            except Exception as cause:  # no collective has begun: join the gang's with zero tokens
                _LOG.exception("layout_failed")
                batch, failure = self._runner.lay_out(()), cause
            try:
                logits, hook_errors = self._runner.forward(batch, () if failure else held)
            except Exception as cause:
                if self._gang.size > 1:  # the others wait in a collective that this rank will never join
                    raise
                _LOG.exception("forward_failed")
                failure = failure or cause
            if failure is None:
                try:
                    draws = [_draw(chunk) for chunk in held if chunk.samples]
                    tokens = iter(sample(logits, draws, vocab_limit=self._vocab_limit))
                except Exception as cause:
                    _LOG.exception("sampling_failed")
                    failure = cause
            if failure is not None:
                outcomes.extend((chunk.sequence, Failed(error=_internal(failure))) for chunk in held)
                return outcomes
            for chunk in held:
                token = next(tokens) if chunk.samples else None
                outcomes.extend(self._commit(chunk, token, hook_errors.get(chunk.sequence.request.id)))
        return outcomes

    @contextmanager
    def _pages_in_use(self, chunks: Sequence[Chunk], outcomes: list[Outcome]) -> Iterator[list[Chunk]]:
        """The chunks whose reservations still hold: none of their pages goes to another before this is over."""
        held: list[Chunk] = []
        now = time.monotonic()
        try:
            for chunk in chunks:
                try:
                    self._reservations.begin_use(chunk.sequence.request.id)
                except SeamountError as error:  # ended since it was scheduled
                    outcomes.append((chunk.sequence, Failed(error=error)))
                    continue
                held.append(chunk)
                if chunk.sequence.started_at is None:
                    chunk.sequence.started_at = now
            yield held
        finally:
            for chunk in held:
                self._reservations.end_use(chunk.sequence.request.id)

    def _commit(self, chunk: Chunk, token: Sampled | None, hook_error: Exception | None) -> Iterable[Outcome]:
        """The chunk's entries are present, and its sequence may be one token longer."""
        sequence = chunk.sequence
        request = sequence.request
        try:
            if hook_error is not None:
                raise _internal(hook_error)
            self._reservations.advance(request.id, chunk.end)
            num_computed = sequence.note_computed(chunk.first, chunk.end)
            if request.is_background:
                self._num_background_tokens += num_computed
            else:
                self._num_computed_tokens += num_computed
            if not chunk.samples:
                yield sequence, Progress(num_computed=sequence.num_computed, in_batch=True)
                if sequence.num_missing == 0:
                    yield sequence, sequence.finished("prefilled", time.monotonic())
                return
            if token is None:
                raise Internal("the model's logits are not finite", reason="LOGITS_NOT_FINITE")
            self._reservations.append_token(request.id, token.token_id)
        except SeamountError as error:
            yield sequence, Failed(error=error)
            return
        now = time.monotonic()
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        failpoints.reached("rank.token", sequence.output_index)
        logprobs = () if token.logprobs is None else (token.logprobs,)
        yield sequence, Tokens(first_index=sequence.output_index, token_ids=(token.token_id,), logprobs=logprobs)
        sequence.num_sampled += 1
        self._num_sampled_tokens += 1
        reason = self._finish_reason(sequence, token.token_id)
        if reason is not None:
            yield sequence, sequence.finished(reason, now)

    def _finish_reason(self, sequence: scheduling.Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        assert sampling is not None, "only sequences that sample come here"
        if token_id == self._eos_token_id:
            return "stop"
        if token_id in sampling.stop_token_ids:
            return "stop_sequence"
        num_tokens = len(sequence.request.reservation.token_ids)
        if sequence.num_sampled >= sampling.max_output_tokens or num_tokens >= self._limits.max_context_tokens:
            return "length"
        return None

    def _deliver(self, outcomes: Iterable[Outcome]) -> None:
        """Tell each sink; the last event of a sequence takes it out of the engine first."""
        for sequence, event in outcomes:
            request = sequence.request
            if isinstance(event, Finished | Failed):
                self._num_failed += isinstance(event, Failed)
                self._note_answer(sequence, event)
                self._scheduler.remove(sequence)
                self._sequences.pop(request.id, None)
                self._inbox.forget(request.id)
            try:
                request.sink(event)
            except Exception:
                _LOG.exception("sink_failed", extra={"request_id": request.id})
                self.abort(request.id)

    def _fail_all(self, error: SeamountError, *, refuse: bool = True) -> None:
        """Fail every request in the engine and, with ``refuse``, all that are waiting to enter it or come later."""
        if refuse:
            self._inbox.close(error)
            for sequence in self._inbox.take().submitted:
                self._sequences[sequence.request.id] = sequence
        self._deliver([(sequence, Failed(error=error)) for sequence in self._sequences.values()])

    def _note_answer(self, sequence: scheduling.Sequence, event: Finished | Failed) -> None:
        if isinstance(event, Finished) and sequence.samples and sequence.num_sampled:
            took_s = event.prefill_s + event.decode_s
            self._answer_s = 0.8 * self._answer_s + 0.2 * took_s if self._answer_s else took_s

    def _count(self, schedule: Schedule, took_s: float) -> None:
        self._num_steps += 1
        if self._on_step is not None:
            self._on_step(_kind(schedule), took_s)
        if schedule.prefill and not schedule.decode:
            num_tokens = schedule.num_prefill_tokens
            keep = 0.5 ** (num_tokens / (8 * self._limits.prefill_chunk_tokens))  # half forgotten after 8 chunks
            self._recent_prefill_tokens = keep * self._recent_prefill_tokens + num_tokens
            self._recent_prefill_s = keep * self._recent_prefill_s + took_s


def _kind(schedule: Schedule) -> StepKind:
    if schedule.decode:
        return StepKind.MIXED if schedule.prefill else StepKind.DECODE
    return StepKind.PREFILL if schedule.prefill else StepKind.IDLE


def _draw(chunk: Chunk) -> Draw:
    sequence = chunk.sequence
    sampling, forced = sequence.request.sampling, sequence.request.forced_token_ids
    assert sampling is not None, "only sequences that sample come here"
    forced_id = forced[sequence.num_sampled] if sequence.num_sampled < len(forced) else None
    return Draw(params=sampling, output_index=sequence.output_index, forced_token_id=forced_id)


def _internal(cause: Exception) -> SeamountError:
    if isinstance(cause, SeamountError):
        return cause
    return Internal(f"the step failed with {type(cause).__name__}; see the rank's log", reason="STEP_FAILED")


def _stopped() -> Unavailable:
    return Unavailable("this rank is stopping; use another", reason="ENGINE_STOPPED", retry_after_s=1.0)
