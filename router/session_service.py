"""``SessionService``: durable conversations. Bodies of a few lines; ``turns.py`` and ``sessions.py`` do the work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from seamount.router.context_policy import context_policy_from_proto
from seamount.router.messages import message_from_proto, message_to_proto, thinking_mode_from_proto
from seamount.router.metrics import RouterMetrics
from seamount.router.model import ServedModel
from seamount.router.parameters import check_sampling
from seamount.router.retention import Retention
from seamount.router.session_view import SessionView
from seamount.router.sessions import Sessions
from seamount.router.tenants import caller
from seamount.router.turns import Turns
from seamount.v1 import common_pb2, session_pb2, session_pb2_grpc
from seamount.wire.errors import InvalidArgument
from seamount.wire.ids import SessionId, TurnId

FORCED_TOKENS_KEY = "seamount-forced-token-ids"
"""Call metadata: comma-separated ids to take instead of sampled ones; tests of plain processes only."""

Context = grpc.aio.ServicerContext[object, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionService(session_pb2_grpc.SessionServiceServicer):
    """The tenant is the authenticated caller, never a field."""

    model: ServedModel
    sessions: Sessions
    turns: Turns
    retention: Retention
    metrics: RouterMetrics

    async def CreateSession(
        self, request: session_pb2.CreateSessionRequest, context: Context
    ) -> session_pb2.CreateSessionResponse:
        self.model.check_name(request.model)
        thinking_mode_from_proto(request.thinking_mode)
        context_policy_from_proto(request.context_policy)
        check_sampling(request.defaults, field="defaults", vocab_size=self.model.vocab_size)
        tenant = caller().tenant
        session = await self.sessions.create(tenant, request, model=self.model.name)
        self.turns.admission.remember(tenant, session)
        return session_pb2.CreateSessionResponse(session=session)

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: Context
    ) -> session_pb2.GetSessionResponse:
        tenant, session_id = caller().tenant, SessionId(request.session_id)
        if not request.include_messages:
            view = await self.sessions.get(tenant, session_id)
            return session_pb2.GetSessionResponse(session=self._leased(view))
        view, history = await self.sessions.read(tenant, session_id)
        messages: list[common_pb2.Message] = []
        for record in history.records:
            messages += record.input
            if record.HasField("output"):
                messages.append(message_to_proto(message_from_proto(record.output.message)))
        receipts = [record.receipt for record in history.records if record.HasField("receipt")]
        return session_pb2.GetSessionResponse(session=self._leased(view), messages=messages, receipts=receipts)

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Context
    ) -> session_pb2.ListSessionsResponse:
        sessions, next_page_token = await self.sessions.list(
            caller().tenant, page_size=request.page_size, page_token=request.page_token
        )
        return session_pb2.ListSessionsResponse(sessions=sessions, next_page_token=next_page_token)

    async def UpdateSession(
        self, request: session_pb2.UpdateSessionRequest, context: Context
    ) -> session_pb2.UpdateSessionResponse:
        context_policy_from_proto(request.context_policy)
        if not request.context_policy:
            raise InvalidArgument("context_policy is not set; there is nothing to change", field="context_policy")
        session = await self.sessions.update(caller().tenant, request)
        return session_pb2.UpdateSessionResponse(session=session)

    async def DeleteSession(
        self, request: session_pb2.DeleteSessionRequest, context: Context
    ) -> session_pb2.DeleteSessionResponse:
        await self.turns.delete(caller().tenant, SessionId(request.session_id))
        return session_pb2.DeleteSessionResponse()

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, context: Context
    ) -> session_pb2.ForkSessionResponse:
        session = await self.turns.admission.fork(caller().tenant, request)
        return session_pb2.ForkSessionResponse(session=session)

    async def RunTurn(
        self, request: session_pb2.RunTurnRequest, context: Context
    ) -> AsyncIterator[session_pb2.RunTurnResponse]:
        stream = await self.turns.open(caller().tenant, request, forced_token_ids=forced_token_ids(context))
        with self.metrics.streams.track_inprogress():
            async with aclosing(stream.follow()) as batches:
                async for events in batches:
                    yield session_pb2.RunTurnResponse(events=events)

    async def ResumeTurn(
        self, request: session_pb2.ResumeTurnRequest, context: Context
    ) -> AsyncIterator[session_pb2.ResumeTurnResponse]:
        stream = await self.turns.resume(caller().tenant, SessionId(request.session_id), TurnId(request.turn_id))
        with self.metrics.streams.track_inprogress():
            async with aclosing(stream.follow(request.after_sequence)) as batches:
                async for events in batches:
                    yield session_pb2.ResumeTurnResponse(events=events)

    async def CancelTurn(
        self, request: session_pb2.CancelTurnRequest, context: Context
    ) -> session_pb2.CancelTurnResponse:
        cancelled = await self.turns.cancel(caller().tenant, SessionId(request.session_id), request.turn_id)
        return session_pb2.CancelTurnResponse(cancelled=cancelled)

    async def ReportToolWait(
        self, request: session_pb2.ReportToolWaitRequest, context: Context
    ) -> session_pb2.ReportToolWaitResponse:
        lease = await self.retention.report_tool_wait(caller().tenant, request)
        return session_pb2.ReportToolWaitResponse(lease=lease)

    def _leased(self, view: SessionView) -> session_pb2.Session:
        lease = self.retention.lease_of(view)
        if lease is not None:
            view.session.lease.CopyFrom(lease)
        return view.session


def forced_token_ids(context: Context) -> list[int]:
    """Ids of the call's metadata; empty without it. Raises ``InvalidArgument`` for anything but numbers."""
    for key, value in context.invocation_metadata() or ():
        if key == FORCED_TOKENS_KEY:
            parts = str(value).split(",")
            if not all(
                len(part) <= 10 and part.isascii() and part.isdecimal() and int(part) < 1 << 32 for part in parts
            ):
                raise InvalidArgument(
                    "forced token ids are comma-separated numbers from 0 to 2^32 - 1", field=FORCED_TOKENS_KEY
                )
            return [int(part) for part in parts]
    return []
