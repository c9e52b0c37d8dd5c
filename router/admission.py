"""Who may begin a turn, or a fork: the request's own checks, its parameters resolved, then the step in the store."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from seamount.router.begun_turn import BegunTurn
from seamount.router.idempotency import body_hash
from seamount.router.messages import Message, checked_messages, thinking_mode_from_proto
from seamount.router.model import ServedModel
from seamount.router.parameters import check_sampling, resolve
from seamount.router.rendering import Rendering
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import Sessions
from seamount.router.spec import RouterSpec
from seamount.router.stored import RunningTurn
from seamount.v1 import common_pb2, record_pb2, session_pb2
from seamount.wire import limits
from seamount.wire.errors import FailedPrecondition, InvalidArgument, OutOfRange
from seamount.wire.ids import SessionId, TenantId

MAX_KNOWN_DEFAULTS = 65_536


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
class Admission:
    """Of one router. Sessions' defaults never change, so it remembers them."""

    spec: RouterSpec
    model: ServedModel
    sessions: Sessions
    rendering: Rendering
    _defaults: OrderedDict[tuple[TenantId, SessionId], common_pb2.SamplingParameters] = field(
        default_factory=OrderedDict
    )

    def remember(self, tenant: TenantId, session: session_pb2.Session) -> None:
        """A session of this deployment's model was made or read: its first turn here need not read it again."""
        self._defaults[tenant, SessionId(session.id)] = session.defaults
        if len(self._defaults) > MAX_KNOWN_DEFAULTS:
            self._defaults.popitem(last=False)

    def forget(self, tenant: TenantId, session_id: SessionId) -> None:
        """The session was deleted."""
        self._defaults.pop((tenant, session_id), None)

    async def check(self, request: session_pb2.RunTurnRequest, forced_token_ids: Sequence[int]) -> TurnRequest:
        """Raises ``InvalidArgument`` that names the field."""
        messages = await self.rendering.run(request.ByteSize(), lambda: checked_messages(request.messages))
        check_sampling(request.sampling, field="sampling", vocab_size=self.model.vocab_size)
        if request.on_disconnect not in session_pb2.DisconnectPolicy.values():
            raise InvalidArgument("on_disconnect is not known; use finish or cancel", field="on_disconnect")
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

    async def fork(self, tenant: TenantId, request: session_pb2.ForkSessionRequest) -> session_pb2.Session:
        """A new session with the first turns of another. Raises ``OutOfRange`` for a turn that is not committed."""
        view, history = await self.sessions.read(tenant, SessionId(request.session_id))
        self._check_model(view.session)
        at_turn = request.at_turn if request.HasField("at_turn") else history.head
        if at_turn > history.head:
            raise OutOfRange(
                f"at_turn is {at_turn}; the session has {history.head} turns",
                reason="NO_SUCH_TURN",
                field="at_turn",
                metadata={"head": str(history.head)},
            )
        records = history.records[:at_turn]
        mode = thinking_mode_from_proto(view.session.thinking_mode)
        num_context_tokens = await self.rendering.num_context_tokens(records, mode) if records else 0
        session = await self.sessions.fork(tenant, request, view, records, num_context_tokens=num_context_tokens)
        self.remember(tenant, session)
        return session

    async def begin(
        self, tenant: TenantId, checked: TurnRequest
    ) -> tuple[BegunTurn | ReplayedTurn | RunningTurn, record_pb2.TurnStart]:
        """Take the session with every parameter resolved, or learn what became of the key's turn.

        Raises as ``Sessions.begin_turn`` does, and ``FailedPrecondition`` for a session of another model.
        """
        defaults = await self._session_defaults(tenant, checked.session_id)
        begun, start = await self._begin(tenant, checked, defaults)
        if not isinstance(begun, BegunTurn) or begun.view.session.defaults == defaults:
            return begun, start
        # Deleted and made anew under its old key, elsewhere: what was known of the first one does not hold.
        self.remember(tenant, begun.view.session)
        await self.sessions.abandon_turn(begun)
        return await self._begin(tenant, checked, begun.view.session.defaults)

    async def _session_defaults(self, tenant: TenantId, session_id: SessionId) -> common_pb2.SamplingParameters:
        known = self._defaults.get((tenant, session_id))
        if known is None:
            view = await self.sessions.get(tenant, session_id)
            self._check_model(view.session)
            known = view.session.defaults
            self.remember(tenant, view.session)
        return known

    def _check_model(self, session: session_pb2.Session) -> None:
        if session.model != self.model.name:
            raise FailedPrecondition(
                f"the session is of model {session.model}, which this deployment does not serve",
                reason="MODEL_NOT_SERVED",
            )

    async def _begin(
        self, tenant: TenantId, checked: TurnRequest, defaults: common_pb2.SamplingParameters
    ) -> tuple[BegunTurn | ReplayedTurn | RunningTurn, record_pb2.TurnStart]:
        proto = checked.proto
        start = record_pb2.TurnStart(
            input=proto.messages,
            sampling=resolve(proto.sampling, defaults, self.spec.defaults),
            on_disconnect=proto.on_disconnect,
            forced_token_ids=checked.forced_token_ids,
        )
        begun = await self.sessions.begin_turn(
            tenant,
            checked.session_id,
            key=proto.idempotency_key,
            body_hash=body_hash(proto),
            start=start,
            time_to_live_s=checked.deadline_s,
            expected_head=proto.expected_head if proto.HasField("expected_head") else None,
        )
        return begun, start
