"""The turns of one router: who may start, who attaches, what is replayed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from seamount.router.directory import Liveness
from seamount.router.events import TurnEvents, call_id_prefix
from seamount.router.generation import Account, Generation
from seamount.router.messages import (
    Message,
    ThinkingMode,
    check_messages,
    check_turn,
    messages_from_proto,
    thinking_mode_from_proto,
    tool_calls_from_proto,
)
from seamount.router.model import ServedModel
from seamount.router.parameters import check_sampling, fit_context, resolve
from seamount.router.parsing import OutputMode, TurnParser
from seamount.router.ranks import Ranks
from seamount.router.session_store import RunningTurn
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import BegunTurn, Sessions, body_hash
from seamount.router.spec import RouterSpec
from seamount.router.turn import Turn, TurnParts, run_turn
from seamount.router.turn_stream import TurnStream
from seamount.router.watcher import DirectoryWatcher
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2
from seamount.wire import limits
from seamount.wire.errors import Aborted, FailedPrecondition, InvalidArgument, SeamountError, Unavailable
from seamount.wire.hashes import tenant_salt
from seamount.wire.ids import Epoch, RankId, SessionId, TenantId, TurnId

MAX_KNOWN_DEFAULTS = 65_536
ATTACH_RETRY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """A RunTurn that passed every check which needs no session."""

    proto: session_pb2.RunTurnRequest
    session_id: SessionId
    messages: Sequence[Message]
    deadline_s: float
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
    secret: bytes
    _running: dict[TurnId, _Running] = field(default_factory=dict)
    _defaults: OrderedDict[tuple[TenantId, SessionId], common_pb2.SamplingParameters] = field(
        default_factory=OrderedDict
    )
    _is_leaving: bool = False

    async def open(
        self, tenant: TenantId, request: session_pb2.RunTurnRequest, *, forced_token_ids: Sequence[int] = ()
    ) -> TurnStream:
        """The stream of the turn that this request starts, attaches to, or repeats.

        Raises typed errors, with nothing changed, for whatever is wrong with the request or the session's state.
        """
        if self._is_leaving:
            raise Unavailable("this router is leaving; retry", reason="ROUTER_LEAVING", retry_after_s=0.1)
        checked = self._check(request, forced_token_ids)
        sampling = resolve(
            request.sampling, await self._session_defaults(tenant, checked.session_id), self.spec.defaults
        )
        begun = await self._begin(tenant, checked, sampling)
        match begun:
            case BegunTurn():
                return await self._start(begun, checked)
            case ReplayedTurn():
                return self._replay(begun)
            case RunningTurn():
                return self._attach(begun)

    def remember(self, tenant: TenantId, session: session_pb2.Session) -> None:
        """A session of this deployment's model was made or read: its first turn here need not read it again."""
        self._defaults[tenant, SessionId(session.id)] = session.defaults
        if len(self._defaults) > MAX_KNOWN_DEFAULTS:
            self._defaults.popitem(last=False)

    async def cancel(self, tenant: TenantId, session_id: SessionId, turn_id: str) -> bool:
        """End a running turn, wherever it runs; False where no such turn is running (any more)."""
        view = await self.sessions.get(tenant, session_id)
        running = view.running
        if running is None or (turn_id and running.turn_id != turn_id):
            return False
        here = self._running.get(running.turn_id)
        if here is None:  # its owner will find the session in other hands when it commits
            event = events_pb2.TurnEvent(
                turn_id=running.turn_id,
                sequence=1,
                finished=events_pb2.TurnFinished(reason=common_pb2.FINISH_REASON_CANCELLED),
            )
            await self.sessions.fail_turn(tenant, session_id, running, event)
            return True
        if here.turn.is_committing:
            return False
        here.turn.cancelled_by_client = True
        here.task.cancel()
        await asyncio.wait({here.task})
        return True

    async def delete(self, tenant: TenantId, session_id: SessionId) -> None:
        """Delete a session; a turn of it that runs here ends, one elsewhere is refused when it commits."""
        await self.sessions.delete(tenant, session_id)
        self._defaults.pop((tenant, session_id), None)
        doomed = [
            r for r in self._running.values() if (r.turn.begun.tenant, r.turn.begun.session_id) == (tenant, session_id)
        ]
        for running in doomed:
            running.turn.cancelled_by_client = True
            running.task.cancel()
        if doomed:
            await asyncio.wait({running.task for running in doomed})

    async def stop(self, grace_s: float) -> None:
        """Take no more turns, let those that run end for ``grace_s``, then give their sessions back."""
        self._is_leaving = True
        tasks = {running.task for running in self._running.values()}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_running(self) -> int:
        return len(self._running)

    # ---- admission

    def _check(self, request: session_pb2.RunTurnRequest, forced_token_ids: Sequence[int]) -> TurnRequest:
        messages = messages_from_proto(request.messages)
        check_messages(messages)
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

    async def _begin(
        self, tenant: TenantId, checked: TurnRequest, sampling: common_pb2.SamplingParameters
    ) -> BegunTurn | ReplayedTurn | RunningTurn:
        """Take the session, also from a turn (of this key or another) on which nobody works any more."""
        try:
            begun = await self._begin_once(tenant, checked, sampling, supersede_epoch=None)
        except Aborted as error:
            running = (await self.sessions.get(tenant, checked.session_id)).running
            if error.reason != "TURN_IN_PROGRESS" or running is None or not self._owner_is_gone(running):
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
            turn = self._make(begun, checked)
        except SeamountError:
            with suppress(SeamountError):  # the turn's deadline frees the session if Redis went away just now
                await self.sessions.abandon_turn(begun)
            raise
        parts = TurnParts(sessions=self.sessions, history=self.model.history, tokenizer=self.model.tokenizer)
        task = asyncio.create_task(run_turn(turn, parts), name=f"turn {begun.turn_id}")
        self._running[begun.turn_id] = _Running(turn=turn, task=task)
        task.add_done_callback(lambda _: self._running.pop(begun.turn_id, None))
        return turn.stream

    def _make(self, begun: BegunTurn, checked: TurnRequest) -> Turn:
        session = begun.view.session
        mode = thinking_mode_from_proto(session.thinking_mode)
        sampling = common_pb2.SamplingParameters.FromString(begun.parameters)
        plan = check_turn(tool_calls_from_proto(session.pending_tool_calls), checked.messages)
        prompt = self.model.history.prompt(begun.records, checked.messages, mode).token_ids
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
            events=self._events(begun.turn_id, mode, sampling) if plan.generates else TurnEvents(begun.turn_id, None),
            deadline_s=checked.deadline_s,
        )

    def _events(self, turn_id: TurnId, mode: ThinkingMode, sampling: common_pb2.SamplingParameters) -> TurnEvents:
        parser = TurnParser(
            self.model.tokenizer,
            OutputMode.of(mode),
            call_id_prefix=call_id_prefix(turn_id),
            stop_strings=sampling.stop_strings,
            stop_token_ids=sampling.stop_token_ids,
        )
        return TurnEvents(turn_id, parser)

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

    def _replay(self, replayed: ReplayedTurn) -> TurnStream:
        """The same events as the first time, from the stored ids; nothing is computed."""
        stream = TurnStream()
        stream.append(
            [replayed.final_event] if replayed.record is None else self._replayed_events(replayed, replayed.record)
        )
        stream.close()
        return stream

    def _replayed_events(self, replayed: ReplayedTurn, record: record_pb2.TurnRecord) -> list[events_pb2.TurnEvent]:
        session, output = replayed.view.session, record.output
        generated = record.HasField("output")
        mode = thinking_mode_from_proto(session.thinking_mode)
        events = (
            self._events(replayed.turn_id, mode, record.sampling) if generated else TurnEvents(replayed.turn_id, None)
        )
        told = [
            events.started(
                session_id=session.id,
                model=session.model,
                num_prompt_tokens=record.num_prompt_tokens,
                seed=record.seed,
            )
        ]
        finished = record.final_event.finished
        usage = events_pb2.Usage(num_prompt_tokens=record.num_prompt_tokens)
        if generated:
            no_logprobs = [common_pb2.TokenLogprobs()] * len(output.cut_token_ids)
            logprobs = [*output.logprobs, *no_logprobs] if output.logprobs else []
            told += events.tokens([*output.token_ids, *output.cut_token_ids], logprobs)
            told += events.output_ended(finished.reason)[0]
            usage.num_cached_tokens = record.receipt.num_cached_tokens
            usage.num_output_tokens = len(output.token_ids)
            usage.num_reasoning_tokens = output.num_reasoning_tokens
        return told + events.finished(finished.reason, usage, finished.receipt if generated else None)
