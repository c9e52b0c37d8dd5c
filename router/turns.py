"""The turns of one router: who may start, who attaches or resumes, what is replayed, what is taken over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from seamount.router.admission import Admission, TurnRequest
from seamount.router.begun_turn import BegunTurn
from seamount.router.cut_ahead import CutAhead
from seamount.router.deletions import Deletions
from seamount.router.followed_turns import FollowedTurns
from seamount.router.logged_turn import LogEvents, LoggedTurn
from seamount.router.messages import checked_messages
from seamount.router.metrics import Outcome, RouterMetrics
from seamount.router.model import ServedModel
from seamount.router.rendering import Rendering
from seamount.router.retention import Retention
from seamount.router.running_index import IndexedTurn
from seamount.router.sessions import Sessions
from seamount.router.stored import LogEntry, RunningTurn
from seamount.router.turn import FAIL_BUDGET_S, Turn, TurnParts, run_turn
from seamount.router.turn_maker import TurnMaker
from seamount.router.turn_stream import TurnStream
from seamount.v1 import record_pb2, session_pb2
from seamount.wire import failpoints
from seamount.wire.errors import Aborted, Cancelled, DataLoss, NotFound, SeamountError, Unavailable
from seamount.wire.ids import SessionId, TenantId, TurnId

BEGIN_WAIT_S = 5.0
"""How long a request waits for one before it that begins a turn in the same session."""
ATTACH_RETRY_S = 0.5
MAX_CANCEL_ATTEMPTS = 50
"""A turn that runs elsewhere may log tokens between a look at its log and the attempt to end it there."""


@dataclass(slots=True, kw_only=True)
class _Running:
    turn: Turn
    task: asyncio.Task[None]


@dataclass(slots=True, kw_only=True)
class Turns:
    """Owner of the turns that run here. ``open`` starts or finds one; the turn goes on whoever listens."""

    model: ServedModel
    sessions: Sessions
    rendering: Rendering
    admission: Admission
    maker: TurnMaker
    followed: FollowedTurns
    retention: Retention
    cut_ahead: CutAhead
    deletions: Deletions
    metrics: RouterMetrics
    _running: dict[TurnId, _Running] = field(default_factory=dict)
    _locks: WeakValueDictionary[tuple[TenantId, SessionId], asyncio.Lock] = field(default_factory=WeakValueDictionary)
    _is_leaving: bool = False

    async def open(
        self, tenant: TenantId, request: session_pb2.RunTurnRequest, *, forced_token_ids: Sequence[int] = ()
    ) -> TurnStream:
        """The stream of the turn that this request starts, attaches to, or repeats.

        Raises typed errors, with nothing changed, for whatever is wrong with the request or the session's state.
        """
        self._refuse_if_leaving()
        checked = await self.admission.check(request, forced_token_ids)
        async with self._alone(tenant, checked.session_id):
            begun, start = await self.admission.begin(tenant, checked)
            match begun:
                case BegunTurn():
                    return await self._start(begun, start, checked)
                case RunningTurn():
                    return self._told(tenant, checked.session_id, begun.turn_id)
        return await self.followed.replay(tenant, checked.session_id, begun)

    async def resume(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> TurnStream:
        """The stream of a turn that has begun, wherever it runs or ran. Raises ``NotFound`` for an unknown session or
        turn, and for one that ended without a result when its log had expired."""
        self._refuse_if_leaving()
        running = (await self.sessions.get(tenant, session_id)).running
        if running is not None and running.turn_id == turn_id:
            return self._told(tenant, session_id, turn_id)
        return await self.followed.ended(tenant, session_id, turn_id)

    async def cancel(self, tenant: TenantId, session_id: SessionId, turn_id: str) -> bool:
        """End a running turn, wherever it runs; False where no such turn is running (any more)."""
        async with self._alone(tenant, session_id):
            running = (await self.sessions.get(tenant, session_id)).running
            if running is None or (turn_id and running.turn_id != turn_id):
                return False
            here = self._running.get(running.turn_id)
            if here is None:
                return await self._cancel_elsewhere(tenant, session_id, running)
        if here.turn.is_ending:
            return False
        await self._cancel([here])
        return True

    async def delete(self, tenant: TenantId, session_id: SessionId) -> None:
        """Delete a session; a turn of it that runs here ends, one elsewhere is refused when it logs or commits. Ranks
        are told first: should this router die in between, its client asks again."""
        async with self._alone(tenant, session_id):
            with suppress(NotFound):  # nor is another tenant's told of
                await self.deletions.note(session_id, await self._last_epoch(tenant, session_id))
            await self.sessions.delete(tenant, session_id)
            self.admission.forget(tenant, session_id)
            scope = (tenant, session_id)
            doomed = [r for r in self._running.values() if (r.turn.begun.tenant, r.turn.begun.session_id) == scope]
        await self._cancel(doomed)

    async def _last_epoch(self, tenant: TenantId, session_id: SessionId) -> int:
        try:
            return (await self.sessions.get(tenant, session_id)).epoch
        except DataLoss:  # damaged ones can be deleted, too: no epoch is above the present microsecond
            return time.time_ns() // 1000

    async def take_over(self, indexed: IndexedTurn) -> bool:
        """Go on with a turn whose owner is judged dead, or that nobody here works on; False where that was not so.

        Raises as ``Sessions.take_over``, and ``Unavailable``: it is still to be taken.
        """
        tenant, session_id = indexed.tenant, indexed.session_id
        async with self._alone(tenant, session_id):
            self._refuse_if_leaving()
            view = await self.sessions.get(tenant, session_id)
            running = view.running
            if running is None or running.turn_id != indexed.turn_id or running.turn_id in self._running:
                return False
            if view.session.model != self.model.name:
                raise Unavailable("the turn is of a model that is served elsewhere", reason="MODEL_NOT_SERVED")
            failpoints.reached("router.take_over", running.epoch)
            begun, remaining_s = await self.sessions.take_over(tenant, session_id, running)
            failpoints.reached("router.taken", begun.epoch)
            deadline = time.monotonic() + remaining_s
            logged, entries = LoggedTurn(), list[LogEntry]()
            try:
                entries = await self.sessions.read_log(tenant, session_id, running.turn_id)
                logged.take(entries)
                if not logged.is_known:
                    raise DataLoss("the turn's log is gone; run the turn again", reason="LOG_DAMAGED")
                messages = checked_messages(logged.start.input)
                turn = await self.maker.make(begun, logged.start, messages, deadline=deadline, logged=logged)
            except SeamountError as error:
                if not isinstance(error, Unavailable):  # what it needs is lost, or fits no more
                    await self._fail(begun, logged, error, log_end=entries[-1].id if entries else "")
                raise
            if turn.generation is not None:
                turn.generation.account.num_retries += 1
            self.metrics.take_overs.inc()
            self._go(turn, logged.start)
            return True

    async def stop(self, grace_s: float) -> None:
        """Take no more turns, let those that run end for ``grace_s``, then hand them over."""
        self._is_leaving = True
        await self._ended(self._running.values(), grace_s)
        for running in list(self._running.values()):
            if not running.turn.is_ending:
                running.task.cancel()
        await self._ended(self._running.values(), FAIL_BUDGET_S)
        for running in list(self._running.values()):  # the store is away: the turns are found when it is back
            running.task.cancel()
        await asyncio.gather(*(running.task for running in self._running.values()), return_exceptions=True)
        await self.followed.stop()
        await self.retention.close()
        await self.cut_ahead.close()

    def runs(self, turn_id: TurnId) -> bool:
        """Whether this router works on the turn."""
        return turn_id in self._running

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def _cancel(self, turns: Sequence[_Running]) -> None:
        for running in turns:
            if not running.turn.is_ending:
                running.turn.cancelled_by_client = True
                running.task.cancel()
        await self._ended(turns, None)

    async def _ended(self, turns: Iterable[_Running], timeout_s: float | None) -> None:
        if tasks := {running.task for running in turns}:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def _cancel_elsewhere(self, tenant: TenantId, session_id: SessionId, running: RunningTurn) -> bool:
        """End it in the store; its router learns of that when it logs or commits the next time."""
        session = (await self.sessions.get(tenant, session_id)).session
        logged = LoggedTurn()
        for _ in range(MAX_CANCEL_ATTEMPTS):
            logged.take(await self.sessions.read_log(tenant, session_id, running.turn_id, after=logged.end))
            events = LogEvents(running.turn_id, session, self.model.tokenizer, logged)
            events.news()
            failpoints.reached("router.end_read", logged.end)
            try:
                await self.sessions.fail_turn(tenant, session_id, running, events.cancelled()[-1], log_end=logged.end)
                return True
            except Aborted as error:
                if error.reason != "TOKENS_LOGGED":  # it has been committed, or another took it over, since we looked
                    return False
        raise Aborted("the turn runs at another router and moves on too fast; retry", reason="TURN_RUNNING_ELSEWHERE")

    async def _fail(self, begun: BegunTurn, logged: LoggedTurn, error: SeamountError, *, log_end: str) -> None:
        events = LogEvents(begun.turn_id, begun.view.session, self.model.tokenizer, logged)
        events.news()
        with suppress(SeamountError):  # the turn's deadline frees the session if Redis went away just now
            await self.sessions.fail_turn(begun.tenant, begun.session_id, begun, events.failed(error), log_end=log_end)

    def _refuse_if_leaving(self) -> None:
        if self._is_leaving:
            raise Unavailable("this router is leaving; retry", reason="ROUTER_LEAVING", retry_after_s=0.1)

    @asynccontextmanager
    async def _alone(self, tenant: TenantId, session_id: SessionId) -> AsyncIterator[None]:
        """One request at a time begins a turn in a session, or ends one: while the store knows a turn of ours and
        ``_running`` does not yet, nobody may take it for one without an owner."""
        lock = self._locks.setdefault((tenant, session_id), asyncio.Lock())
        try:
            async with asyncio.timeout(BEGIN_WAIT_S):
                await lock.acquire()
        except TimeoutError:
            raise Aborted(
                "another request to this session has not begun its turn yet; retry",
                reason="TURN_IN_PROGRESS",
                retry_after_s=ATTACH_RETRY_S,
            ) from None
        try:
            yield
        finally:
            lock.release()

    async def _start(self, begun: BegunTurn, start: record_pb2.TurnStart, checked: TurnRequest) -> TurnStream:
        failpoints.reached("router.begun", begun.epoch)
        try:
            turn = await self.maker.make(begun, start, checked.messages, deadline=checked.deadline)
            self._refuse_if_leaving()
        except BaseException:
            with suppress(SeamountError):  # the turn's deadline frees the session if Redis went away just now
                await self.sessions.abandon_turn(begun)
            raise
        turn.arrived = checked.deadline - checked.deadline_s
        return self._go(turn, start)

    def _go(self, turn: Turn, start: record_pb2.TurnStart) -> TurnStream:
        begun = turn.begun
        task = asyncio.create_task(self._run(turn), name=f"turn {begun.turn_id}")
        running = self._running[begun.turn_id] = _Running(turn=turn, task=task)
        turn.log.on_refused = lambda: self._refused(running)
        if start.on_disconnect == session_pb2.DISCONNECT_POLICY_CANCEL:
            turn.stream.on_left = lambda: self._left(running)
        return turn.stream

    async def _run(self, turn: Turn) -> None:
        begun = turn.begun
        running = self._running[begun.turn_id]
        parts = TurnParts(
            sessions=self.sessions,
            retention=self.retention,
            rendering=self.rendering,
            tokenizer=self.model.tokenizer,
            metrics=self.metrics,
        )
        try:
            is_over = await run_turn(turn, parts)
            self._count(turn, is_over=is_over)
            self.cut_ahead.after(turn)
        finally:
            if self._running.get(begun.turn_id) is running:  # not one that took it over past its deadline
                del self._running[begun.turn_id]
        if not is_over:
            self.followed.go_on(begun.tenant, begun.session_id, begun.turn_id, turn.stream)

    def _count(self, turn: Turn, *, is_over: bool) -> None:
        outcome = Outcome.HANDED_OVER
        if is_over and turn.failure is not None:
            is_cancelled = isinstance(turn.failure, Cancelled)
            outcome = Outcome.CANCELLED if is_cancelled else Outcome.FAILED
        elif is_over:
            outcome = Outcome.FINISHED if turn.generation is not None else Outcome.RECORDED
        took_s = None
        if turn.arrived is not None and outcome is not Outcome.HANDED_OVER:
            took_s = time.monotonic() - turn.arrived
        self.metrics.turn_ended(outcome, took_s)
        if outcome is Outcome.FAILED and turn.failure is not None:
            self.metrics.failed(turn.failure)
        if turn.generation is not None and outcome is not Outcome.HANDED_OVER:  # else the next router counts all of it
            num_output = len(turn.generation.token_ids)
            self.metrics.answered(turn.generation.account, num_prompt=turn.num_prompt_tokens, num_output=num_output)

    def _refused(self, running: _Running) -> None:
        """Its log is closed to this router: the turn was cancelled, deleted or taken over elsewhere."""
        if not running.turn.is_ending:
            running.task.cancel()

    def _left(self, running: _Running) -> None:
        """The last client went away from a turn that is to end with it."""
        if not running.turn.is_ending:
            running.turn.cancelled_by_client = True
            running.task.cancel()

    def _told(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> TurnStream:
        """The stream of a running turn: this router's own, or one fed from its log."""
        here = self._running.get(turn_id)
        if here is not None:
            return here.turn.stream
        return self.followed.live(tenant, session_id, turn_id)
