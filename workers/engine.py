"""The step loop of a rank: schedule, run the model, sample, commit.

``Engine.step`` is the whole story. One thread owns it, and with it the scheduler, the model, the gang's collectives and
every call of a sink; ``submit``, ``abort``, ``healthy`` and ``state`` may come from any other thread and never wait for
a step. Both roles run the same loop: a prefill rank's requests just do not sample.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from seamount.kernels.layout import CachePlanes
from seamount.wire.errors import NotFound, SeamountError, Unavailable
from seamount.workers.cache.reservations import Reservations
from seamount.workers.computation import Computation, step_failed
from seamount.workers.engine_counts import EngineCounts, EngineState, FaultCounts, StepKind
from seamount.workers.events import Failed
from seamount.workers.gang import Gang, StepHeader
from seamount.workers.heartbeat import Heartbeat
from seamount.workers.inbox import Inbox
from seamount.workers.outstanding import Outstanding
from seamount.workers.requests import EngineRequest
from seamount.workers.runner import Model, Runner
from seamount.workers.schedule import Schedule
from seamount.workers.scheduler import EngineLimits, Scheduler

_LOG = logging.getLogger(__name__)
_IDLE_WAIT_S = 60.0
_BLOCKED_WAIT_S = 0.005
"""Pages held outside the engine come free without a word to it: how long it waits before it looks again."""
_RENEW_EVERY_S = 0.5


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
        self._vocab_limit = vocab_limit
        self._on_fatal = on_fatal
        self._on_step = on_step
        self._reservations = reservations
        self._counts = EngineCounts()
        self._computation = Computation(
            Runner(model=model, planes=planes),
            reservations,
            self._counts,
            is_alone=gang.size == 1,
            eos_token_id=eos_token_id,
            vocab_limit=vocab_limit,
            max_context_tokens=self._limits.max_context_tokens,
        )
        self._gang = gang
        self._scheduler = Scheduler(reservations=reservations, limits=self._limits)
        self._inbox = Inbox(max_known=limits.max_running + limits.max_waiting)
        self._outstanding = Outstanding(
            scheduler=self._scheduler, inbox=self._inbox, counts=self._counts, abort=self.abort
        )
        self._heartbeat = Heartbeat(timeout_s=health_timeout_s, ring=gang.ring)

        self._lock = threading.Lock()  # guards the two that follow
        self._thread: threading.Thread | None = None
        self._stop_deadline: float | None = None

        self._leaving = False
        self._renewed_at = time.monotonic()

    # ---- from any thread

    def start(self) -> None:
        """Start the loop's thread. Idempotent; an engine that has stopped does not start again."""
        with self._lock:
            if self._thread is None and self._stop_deadline is None:
                self._heartbeat.start()
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
            self._outstanding.fail_all(_stopped())
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
        with self._lock:
            if self._thread is None or not self._thread.is_alive() or self._leaving:
                return False
        return self._heartbeat.is_recent()

    def stalled(self) -> Unavailable:
        """What requests fail with when the loop does not live. In a gang any rank may be the one that hangs: only alone
        it is this one's batch that it hangs in."""
        reason = "ENGINE_STALLED" if self._gang.size == 1 else "GANG_STALLED"
        return Unavailable("the engine does not step", reason=reason, retry_after_s=1.0)

    def state(self) -> EngineState:
        """A snapshot; fields may be a step apart from each other."""
        counts = self._counts
        submitted = [sequence for sequence in self._inbox.waiting() if not sequence.request.is_background]
        queued = self._scheduler.queued_prefill_tokens + sum(sequence.num_missing for sequence in submitted)
        return EngineState(
            num_steps=counts.num_steps,
            num_computed_tokens=counts.num_computed_tokens,
            num_sampled_tokens=counts.num_sampled_tokens,
            num_background_tokens=counts.num_background_tokens,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(submitted),
            num_blocked=counts.num_blocked,
            queued_prefill_tokens=queued,
            prefill_tokens_per_s=counts.pieces.per_s,
            answer_s=counts.answer_s,
            is_resting=self._heartbeat.is_resting,
        )

    def faults(self) -> FaultCounts:
        return FaultCounts(num_preemptions=self._scheduler.num_preemptions, num_failed=self._counts.num_failed)

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
            self._outstanding.cancel(schedule.dropped)
        if any(header.has_work for header in headers):
            if any(header.num_decode_tokens for header in headers):  # no stream waits for a peer's long prompt
                schedule = schedule.within(self._limits.prefill_chunk_tokens)
            self._outstanding.tell_batch(schedule.chunks)
            self._outstanding.deliver(self._computation.run(schedule.chunks))
            self._count(schedule, time.monotonic() - began_at)
        else:
            self._heartbeat.rest()
            self._leaving = all(header.stop for header in headers)
        self._heartbeat.beat()

    def _loop(self) -> None:
        error: SeamountError = _stopped()
        try:
            while not self._leaving and not self._is_late():
                if self._heartbeat.is_resting:
                    if not self._gang.wait_for_work(self._rest_s()):
                        if self._outstanding:
                            self._gang.ring()
                        continue
                    self._heartbeat.wake()
                self.step()
        except Exception as cause:
            _LOG.exception("engine_failed")
            is_lost = isinstance(cause, SeamountError) and cause.reason == "GANG_LOST"
            reason = "GANG_LOST" if is_lost else "ENGINE_FAILED"
            error = Unavailable(f"this rank's engine has failed: {cause}", reason=reason, retry_after_s=1.0)
            self._outstanding.fail_all(error)
            if self._on_fatal is not None:
                self._on_fatal(error)
        finally:
            self._leaving = True
            self._outstanding.fail_all(error)
            self._gang.close()

    def _is_late(self) -> bool:
        """Whether it was told to stop so long ago that it leaves although its gang has not."""
        return self._stop_deadline is not None and time.monotonic() >= self._stop_deadline

    def _rest_s(self) -> float:
        if self._stop_deadline is not None:
            return max(0.0, self._stop_deadline - time.monotonic())
        return _BLOCKED_WAIT_S if self._outstanding else _IDLE_WAIT_S

    def _take_news(self) -> None:
        """Requests, aborts and the stop that came since the last step; what comes from now on rings again."""
        self._gang.hush()
        self._outstanding.take()
        if self._stop_deadline is not None:
            self._outstanding.fail_all(_stopped())
        now = time.monotonic()
        if now - self._renewed_at >= _RENEW_EVERY_S:  # a reservation lives as long as its request does
            self._renewed_at = now
            for request_id in self._outstanding:
                with suppress(NotFound):  # the scheduler meets this, too, and reports it
                    self._reservations.renew(request_id)

    def _schedule(self) -> Schedule:
        """This rank's own part of the step; a failure here fails its requests, never the step."""
        try:
            schedule = self._scheduler.schedule()
        except Exception as cause:
            _LOG.exception("schedule_failed")
            self._outstanding.fail_all(step_failed(cause), refuse=False)
            return Schedule()
        now = time.monotonic()
        self._outstanding.deliver((sequence, Failed(error=error)) for sequence, error in schedule.lost)
        self._outstanding.deliver((sequence, sequence.finished("prefilled", now)) for sequence in schedule.complete)
        self._outstanding.cancel(schedule.dropped)
        self._counts.num_blocked = self._scheduler.num_waiting
        return schedule

    def _count(self, schedule: Schedule, took_s: float) -> None:
        self._counts.step(schedule, took_s)
        if self._on_step is not None:
            self._on_step(StepKind.of(schedule), took_s)


def _stopped() -> Unavailable:
    return Unavailable("this rank is stopping; use another", reason="ENGINE_STOPPED", retry_after_s=1.0)
