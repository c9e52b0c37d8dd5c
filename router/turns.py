"""The turns of one router: who may start, who attaches, what is replayed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from seamount.router.account import Account
from seamount.router.directory import Liveness
from seamount.router.events import TurnEvents, turn_events
from seamount.router.generation import Generation
from seamount.router.messages import (
    Message,
    check_turn,
    checked_messages,
    thinking_mode_from_proto,
    tool_calls_from_proto,
)
from seamount.router.model import ServedModel
from seamount.router.parameters import check_sampling, fit_context, resolve
from seamount.router.parsing import OutputMode
from seamount.router.ranks import Ranks
from seamount.router.rendering import Rendering
from seamount.router.replay import replayed_events
from seamount.router.session_store import RunningTurn
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import BegunTurn, Sessions, body_hash
from seamount.router.spec import RouterSpec
from seamount.router.turn import FAIL_BUDGET_S, Turn, TurnParts, run_turn
from seamount.router.turn_stream import TurnStream
from seamount.router.watcher import DirectoryWatcher
from seamount.v1 import common_pb2, events_pb2, session_pb2
from seamount.wire import limits
from seamount.wire.errors import Aborted, FailedPrecondition, InvalidArgument, SeamountError, Unavailable
from seamount.wire.hashes import tenant_salt
from seamount.wire.ids import Epoch, RankId, SessionId, TenantId, TurnId

MAX_KNOWN_DEFAULTS = 65_536
ATTACH_RETRY_S = 0.5
BEGIN_WAIT_S = 5.0
"""How long a request waits for one before it that begins a turn in the same session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """A RunTurn that passed every check which needs no session."""

    proto: session_pb2.RunTurnRequest
    session_id: SessionId
    messages: Sequence[Message]
    deadline_s: float
    deadline: float
    """``deadline_s`` after its arrival, by ``time.monotonic()``."""
    forced_token_ids: Sequence[int] = ()


@dataclass(slots=True, kw_only=True)
class _Running:
    turn: Turn
    task: asyncio.Task[None]


@dataclass(slots=True, kw_only=True)
class Turns:
    """Owner of the turns that run here. ``open`` starts or finds one; the turn goes on whoever listens."""

    spec: RouterSpec
    model: ServedModel
    sessions: Sessions
    ranks: Ranks
    watcher: DirectoryWatcher
    rendering: Rendering
    secret: bytes
    _running: dict[TurnId, _Running] = field(default_factory=dict)
    _defaults: OrderedDict[tuple[TenantId, SessionId], common_pb2.SamplingParameters] = field(
        default_factory=OrderedDict
    )
    _locks: WeakValueDictionary[tuple[TenantId, SessionId], asyncio.Lock] = field(default_factory=WeakValueDictionary)
    _is_leaving: bool = False

    async def open(
        self, tenant: TenantId, request: session_pb2.RunTurnRequest, *, forced_token_ids: Sequence[int] = ()
    ) -> TurnStream:
        """The stream of the turn that this request starts, attaches to, or repeats.

        Raises typed errors, with nothing changed, for whatever is wrong with the request or the session's state.
        """
        self._refuse_if_leaving()
        checked = await self._check(request, forced_token_ids)
        async with self._alone(tenant, checked.session_id):
            begun = await self._begin_resolved(tenant, checked)
            match begun:
                case BegunTurn():
                    return await self._start(begun, checked)
                case RunningTurn():
                    return self._attach(begun)
        return await self._replay(begun)

    def remember(self, tenant: TenantId, session: session_pb2.Session) -> None:
        """A session of this deployment's model was made or read: its first turn here need not read it again."""
        self._defaults[tenant, SessionId(session.id)] = session.defaults
        if len(self._defaults) > MAX_KNOWN_DEFAULTS:
            self._defaults.popitem(last=False)

    async def cancel(self, tenant: TenantId, session_id: SessionId, turn_id: str) -> bool:
        """End a running turn, wherever it runs; False where no such turn is running (any more)."""
        async with self._alone(tenant, session_id):
            running = (await self.sessions.get(tenant, session_id)).running
            if running is None or (turn_id and running.turn_id != turn_id):
                return False
            here = self._running.get(running.turn_id)
            if here is None:  # its owner will find the session in other hands when it commits
                return await self._fail_elsewhere(tenant, session_id, running)
        if here.turn.is_ending:
            return False
        await self._cancel([here])
        return True

    async def delete(self, tenant: TenantId, session_id: SessionId) -> None:
        """Delete a session; a turn of it that runs here ends, one elsewhere is refused when it commits."""
        async with self._alone(tenant, session_id):
            await self.sessions.delete(tenant, session_id)
            self._defaults.pop((tenant, session_id), None)
            scope = (tenant, session_id)
            doomed = [r for r in self._running.values() if (r.turn.begun.tenant, r.turn.begun.session_id) == scope]
        await self._cancel(doomed)

    async def stop(self, grace_s: float) -> None:
        """Take no more turns, let those that run end for ``grace_s``, then give their sessions back."""
        self._is_leaving = True
        await self._ended(self._running.values(), grace_s)
        for running in list(self._running.values()):
            if not running.turn.is_ending:
                running.task.cancel()
        await self._ended(self._running.values(), FAIL_BUDGET_S)
        for running in list(self._running.values()):  # the store is away: the turns' deadlines free their sessions
            running.task.cancel()
        await asyncio.gather(*(running.task for running in self._running.values()), return_exceptions=True)

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

    async def _fail_elsewhere(self, tenant: TenantId, session_id: SessionId, running: RunningTurn) -> bool:
        finished = events_pb2.TurnFinished(reason=common_pb2.FINISH_REASON_CANCELLED)
        event = events_pb2.TurnEvent(turn_id=running.turn_id, sequence=1, finished=finished)
        try:
            await self.sessions.fail_turn(tenant, session_id, running, event)
        except Aborted:  # it has been committed, or another took it over, since we looked
            return False
        return True

    # ---- admission

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

    async def _check(self, request: session_pb2.RunTurnRequest, forced_token_ids: Sequence[int]) -> TurnRequest:
        messages = await self.rendering.run(request.ByteSize(), lambda: checked_messages(request.messages))
        check_sampling(request.sampling, field="sampling", vocab_size=self.model.vocab_size)
        deadline_s = self.spec.turn_deadline_s
        if request.HasField("deadline"):
            deadline_s = request.deadline.ToTimedelta().total_seconds()
            limits.check_range(deadline_s, field="deadline", low=0, low_open=True, high=limits.MAX_TURN_DEADLINE_S)
        if forced_token_ids and not self.spec.allow_forced_tokens:
            raise InvalidArgument(
                "forced token ids are for tests: this router was not started for them", field="forced_token_ids"
            )
        return TurnRequest(
            proto=request,
            session_id=SessionId(request.session_id),
            messages=messages,
            deadline_s=deadline_s,
            deadline=time.monotonic() + deadline_s,
            forced_token_ids=forced_token_ids,
        )

    async def _session_defaults(self, tenant: TenantId, session_id: SessionId) -> common_pb2.SamplingParameters:
        """A session's defaults never change, so they are read once."""
        known = self._defaults.get((tenant, session_id))
        if known is None:
            view = await self.sessions.get(tenant, session_id)
            if view.session.model != self.model.name:
                raise FailedPrecondition(
                    f"the session is of model {view.session.model}, which this deployment does not serve",
                    reason="MODEL_NOT_SERVED",
                )
            known = view.session.defaults
            self.remember(tenant, view.session)
        return known

    async def _begin_resolved(self, tenant: TenantId, checked: TurnRequest) -> BegunTurn | ReplayedTurn | RunningTurn:
        """Begin with every parameter resolved."""
        given = checked.proto.sampling
        defaults = await self._session_defaults(tenant, checked.session_id)
        begun = await self._begin(tenant, checked, resolve(given, defaults, self.spec.defaults))
        if not isinstance(begun, BegunTurn) or begun.view.session.defaults == defaults:
            return begun
        # Deleted and made anew under its old key, elsewhere: what was known of the first one does not hold.
        self.remember(tenant, begun.view.session)
        await self.sessions.abandon_turn(begun)
        return await self._begin(tenant, checked, resolve(given, begun.view.session.defaults, self.spec.defaults))

    async def _begin(
        self, tenant: TenantId, checked: TurnRequest, sampling: common_pb2.SamplingParameters
    ) -> BegunTurn | ReplayedTurn | RunningTurn:
        """Take the session, also from a turn (of this key or another) on which nobody works any more."""
        try:
            begun = await self._begin_once(tenant, checked, sampling, supersede_epoch=None)
        except Aborted as error:
            if error.reason != "TURN_IN_PROGRESS":
                raise
            running = (await self.sessions.get(tenant, checked.session_id)).running
            if running is None or not self._owner_is_gone(running):
                raise
            return await self._begin_once(tenant, checked, sampling, supersede_epoch=running.epoch)
        if isinstance(begun, RunningTurn) and self._owner_is_gone(begun):
            return await self._begin_once(tenant, checked, sampling, supersede_epoch=begun.epoch)
        return begun

    async def _begin_once(
        self,
        tenant: TenantId,
        checked: TurnRequest,
        sampling: common_pb2.SamplingParameters,
        *,
        supersede_epoch: Epoch | None,
    ) -> BegunTurn | ReplayedTurn | RunningTurn:
        proto = checked.proto
        return await self.sessions.begin_turn(
            tenant,
            checked.session_id,
            key=proto.idempotency_key,
            body_hash=body_hash(proto),
            parameters=sampling.SerializeToString(),
            time_to_live_s=checked.deadline_s,
            expected_head=proto.expected_head if proto.HasField("expected_head") else None,
            supersede_epoch=supersede_epoch,
        )

    def _owner_is_gone(self, running: RunningTurn) -> bool:
        """Whether nobody works on a running turn: its router is dead, or is this one and knows nothing of it."""
        if running.owner == self.spec.router_id:
            return running.turn_id not in self._running
        return self.watcher.liveness(running.owner) in (Liveness.DEAD, Liveness.ABSENT)

    # ---- the three outcomes

    async def _start(self, begun: BegunTurn, checked: TurnRequest) -> TurnStream:
        try:
            turn = await self._make(begun, checked)
            self._refuse_if_leaving()
        except BaseException:
            with suppress(SeamountError):  # the turn's deadline frees the session if Redis went away just now
                await self.sessions.abandon_turn(begun)
            raise
        parts = TurnParts(sessions=self.sessions, rendering=self.rendering, tokenizer=self.model.tokenizer)
        task = asyncio.create_task(run_turn(turn, parts), name=f"turn {begun.turn_id}")
        running = self._running[begun.turn_id] = _Running(turn=turn, task=task)

        def forget(_: asyncio.Task[None]) -> None:
            if self._running.get(begun.turn_id) is running:  # not one that took it over past its deadline
                del self._running[begun.turn_id]

        task.add_done_callback(forget)
        return turn.stream

    async def _make(self, begun: BegunTurn, checked: TurnRequest) -> Turn:
        session = begun.view.session
        mode = thinking_mode_from_proto(session.thinking_mode)
        sampling = common_pb2.SamplingParameters.FromString(begun.parameters)
        plan = check_turn(tool_calls_from_proto(session.pending_tool_calls), checked.messages)
        prompt = await self.rendering.prompt(begun.records, checked.messages, mode, num_bytes=checked.proto.ByteSize())
        room = fit_context(sampling, num_prompt_tokens=len(prompt), max_context_tokens=self.spec.max_context_tokens)
        generation = None
        if plan.generates:
            generation = Generation(
                ranks=self.ranks,
                rules=self.spec.rules,
                session_id=begun.session_id,
                turn_id=begun.turn_id,
                epoch=begun.epoch,
                cache_salt=tenant_salt(self.secret, begun.tenant),
                prompt=prompt,
                sampling=room,
                preferred=RankId(begun.view.last_rank) if begun.view.last_rank else None,
                account=Account(started=time.monotonic()),
                max_attempts=self.spec.max_attempts,
                deadline=checked.deadline,
                eos_token_id=self.model.tokenizer.eos_token_id,
                forced_token_ids=checked.forced_token_ids,
            )
        return Turn(
            begun=begun,
            input=list(checked.proto.messages),
            plan=plan,
            mode=mode,
            model=self.model.name,
            sampling=sampling,
            num_prompt_tokens=len(prompt),
            generation=generation,
            events=turn_events(begun.turn_id, OutputMode.of(mode), sampling, self.model.tokenizer)
            if plan.generates
            else TurnEvents(begun.turn_id, None),
            deadline=checked.deadline,
        )

    def _attach(self, running: RunningTurn) -> TurnStream:
        here = self._running.get(running.turn_id)
        if here is None:
            raise Aborted(
                "this turn is running at another router; retry with the same key",
                reason="TURN_RUNNING_ELSEWHERE",
                retry_after_s=ATTACH_RETRY_S,
                metadata={"turn_id": running.turn_id},
            )
        return here.turn.stream

    async def _replay(self, replayed: ReplayedTurn) -> TurnStream:
        """The same events as the first time, from the stored ids; nothing is computed."""
        stream, record, tokenizer = TurnStream(), replayed.record, self.model.tokenizer
        if record is None:
            stream.append([replayed.final_event])
        else:
            told = await self.rendering.run(
                record.output.ByteSize(), lambda: replayed_events(replayed, record, tokenizer)
            )
            stream.append(told)
        stream.close()
        return stream
