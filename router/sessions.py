"""Sessions as the rest of the router sees them: protos and verified histories over the Functions of Redis.

Idempotency keys of RunTurn, by what became of the key's turn:

    committed               the stored record is replayed
    cancelled               the cancellation is replayed
    failed for good         (deadline passed, refused …) the failure is replayed
    failed for now          (Unavailable, ResourceExhausted, Aborted, Internal, DataLoss) forgotten: a retry runs anew
    running                 the caller learns who runs it and attaches, waits or supersedes
    another request's body  AlreadyExists

The server's secret makes ids from keys and signs page tokens. Without it a retried CreateSession would not find its
session again; sessions stay readable by their ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from seamount.router import chain
from seamount.router.chain import History, HistoryCache
from seamount.router.session_names import SessionNames, check_session_id, is_session_id, random_name
from seamount.router.session_store import (
    BeginArguments,
    Begun,
    CommitArguments,
    Done,
    Ended,
    RunningTurn,
    SessionStore,
)
from seamount.router.session_view import ReplayedTurn, SessionView, joined, replayed, view_of, whole
from seamount.router.store import Store
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2
from seamount.wire import limits
from seamount.wire.errors import DataLoss, InvalidArgument, ResourceExhausted, SeamountError
from seamount.wire.ids import Epoch, RouterId, SessionId, TenantId, TurnId

MAX_RECORD_BYTES = 128 << 20
DEFAULT_PAGE_SIZE = 50
_SECRET_BYTES = 32
_log = logging.getLogger(__name__)
_ABANDON_BUDGET_S = 5.0
_FAILED_FOR_NOW = frozenset(
    code.value[0]
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DATA_LOSS,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunTurn:
    """This router holds the session under ``epoch``. ``parameters`` are those to use: where a turn was taken over
    under its own key they are the first attempt's, and so is the turn's id."""

    tenant: TenantId
    session_id: SessionId
    key: str
    turn_id: TurnId
    epoch: Epoch
    parameters: bytes
    view: SessionView
    history: History

    @property
    def head(self) -> int:
        return self.history.head

    @property
    def records(self) -> tuple[record_pb2.TurnRecord, ...]:
        return self.history.records


def body_hash(request: Message) -> bytes:
    """SHA-256 that is equal for equal requests; 32 bytes."""
    name = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\0" + request.SerializeToString(deterministic=True)).digest()


async def load_or_create_secret(store: Store) -> bytes:
    """The namespace's secret of 32 bytes, made by whoever comes first; for deployments that bring none of their own."""
    key = store.key("secret")
    await store.command("SET", key, secrets.token_bytes(_SECRET_BYTES), "NX")
    secret: bytes | None = await store.command("GET", key)
    if secret is None or len(secret) != _SECRET_BYTES:
        raise DataLoss(f"the server secret under {key} is missing or damaged; restore it", reason="SECRET_DAMAGED")
    return secret


class Sessions:
    """Sessions of one namespace, for one router. Errors as ``Store.function``; an unknown session and another
    tenant's are the same ``NotFound``; damaged or missing state is ``DataLoss``."""

    def __init__(
        self,
        store: Store,
        *,
        secret: bytes,
        router_id: RouterId,
        cache_bytes: int = 256 << 20,
        deadline_grace_s: float = 2.0,
    ) -> None:
        """router_id: unique to this process, also over restarts; deadline_grace_s: how long after its deadline a
        running turn still holds its session, for the owner to end it itself."""
        self._store = SessionStore(store)
        self._names = SessionNames(secret)
        self._router_id = router_id
        self._cache = HistoryCache(cache_bytes)
        self._grace_s = deadline_grace_s
        self._abandoning: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for the turns whose callers went away while they began; bounded by their own budgets."""
        await asyncio.gather(*self._abandoning, return_exceptions=True)

    async def create(
        self, tenant: TenantId, request: session_pb2.CreateSessionRequest, *, model: str
    ) -> session_pb2.Session:
        """A new session on ``model`` (resolved). With a key, a retry finds the first one; ``AlreadyExists`` where the
        key came with another body. After a DeleteSession the key makes a new session."""
        key = request.idempotency_key
        limits.check_length(key.encode(), field="idempotency_key", high=limits.MAX_IDEMPOTENCY_KEY_BYTES, unit="bytes")
        session_id = self._names.session_id(tenant, key)
        record = record_pb2.SessionRecord(
            session_id=session_id,
            tenant_id=tenant,
            model=model,
            thinking_mode=request.thinking_mode or common_pb2.THINKING_MODE_THINKING,
            defaults=request.defaults,
        )
        created_ns = time.time_ns()
        record.created_at.FromNanoseconds(created_ns)
        stored = record.SerializeToString()
        read = await self._store.create(
            tenant,
            session_id,
            record=stored,
            body_hash=body_hash(request),
            summary=b"",
            root=chain.root(stored),
            created=f"{created_ns // 1000000:015d}",
        )
        return view_of(tenant, session_id, read.session).session

    async def get(self, tenant: TenantId, session_id: SessionId) -> SessionView:
        """The session without its history."""
        check_session_id(session_id)
        read = await self._store.read(tenant, session_id, known_head=None)
        return view_of(tenant, session_id, read.session)

    async def read(self, tenant: TenantId, session_id: SessionId) -> tuple[SessionView, History]:
        """The session with its verified history, as of one moment."""
        check_session_id(session_id)
        known = self._cache.get(tenant, session_id)
        read = await self._store.read(tenant, session_id, known_head=known.head if known else 0)
        view = view_of(tenant, session_id, read.session)
        history = joined(known, read.session, read.first, read.entries)
        if history is None:
            read = await self._store.read(tenant, session_id, known_head=0)
            view = view_of(tenant, session_id, read.session)
            history = whole(read.session, read.first, read.entries)
        self._cache.put(tenant, session_id, history)
        return view, history

    async def list(
        self, tenant: TenantId, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[session_pb2.Session], str]:
        """A page of the tenant's sessions, newest first, and the token of the next ('' = no more).

        A session whose stored state is damaged is listed by its id alone, state unspecified, so that it can be
        deleted. Raises ``InvalidArgument`` for a page size beyond the limit and a token that was not made here.
        """
        limits.check_range(page_size, field="page_size", low=0, high=limits.MAX_PAGE_SIZE)
        before = self._names.opened_token(tenant, page_token) if page_token else ""
        listed, place = await self._store.list(tenant, before=before, limit=page_size or DEFAULT_PAGE_SIZE)
        sessions = [
            view_of(tenant, one.session_id, one.session).session
            if one.session
            else session_pb2.Session(id=one.session_id)
            for one in listed
        ]
        return sessions, self._names.page_token(tenant, place) if place else ""

    async def delete(self, tenant: TenantId, session_id: SessionId) -> None:
        """Delete session and history; a turn that still runs is refused when it commits. Repeating it is harmless."""
        if not is_session_id(session_id):
            return
        self._cache.drop(tenant, session_id)
        await self._store.delete(tenant, session_id)

    async def begin_turn(
        self,
        tenant: TenantId,
        session_id: SessionId,
        *,
        key: str,
        body_hash: bytes,
        parameters: bytes,
        time_to_live_s: float,
        expected_head: int | None = None,
        supersede_epoch: Epoch | None = None,
    ) -> BegunTurn | ReplayedTurn | RunningTurn:
        """Take the session for a new turn, or learn what became of the key's.

        parameters: every resolved parameter of the turn, opaque; time_to_live_s: the turn's deadline from now, by the
        server's clock; supersede_epoch: the running epoch, where its owner is judged dead, or is this router and
        knows nothing of it (the answer of an earlier call was lost): that turn is ended and its session taken.
        A ``RunningTurn`` is the key's own, still going on. ``Aborted``: TURN_IN_PROGRESS (another key's, with a retry
        time), HEAD_MOVED; ``AlreadyExists``: KEY_REUSED; ``FailedPrecondition``: SESSION_CLOSED.
        """
        encoded = key.encode()
        limits.check_length(
            encoded, field="idempotency_key", low=1, high=limits.MAX_IDEMPOTENCY_KEY_BYTES, unit="bytes"
        )
        check_session_id(session_id)
        known = self._cache.get(tenant, session_id)
        arguments = BeginArguments(
            key=key,
            body_hash=body_hash,
            known_head=known.head if known else 0,
            expected_head=expected_head,
            turn_id=TurnId(f"turn_{random_name()}"),
            nonce=secrets.token_bytes(16),
            owner=self._router_id,
            time_to_live_s=time_to_live_s,
            grace_s=self._grace_s,
            supersede_epoch=supersede_epoch,
            parameters=parameters,
        )
        reply = await self._begin_or_abandon(tenant, session_id, arguments)
        if isinstance(reply, RunningTurn):
            return reply
        if not isinstance(reply, Begun):
            return replayed(tenant, session_id, reply)
        try:
            view = view_of(tenant, session_id, reply.session)
            history = joined(known, reply.session, reply.first, reply.entries)
            if history is None:
                read = await self._store.read(tenant, session_id, known_head=0)
                history = whole(read.session, read.first, read.entries)
        except BaseException:
            self._abandon_later(self._abandon(tenant, session_id, key, reply.turn_id, reply.session.epoch))
            raise
        self._cache.put(tenant, session_id, history)
        return BegunTurn(
            tenant=tenant,
            session_id=session_id,
            key=key,
            turn_id=reply.turn_id,
            epoch=reply.session.epoch,
            parameters=reply.parameters,
            view=view,
            history=history,
        )

    async def commit_turn(
        self,
        turn: BegunTurn,
        record: record_pb2.TurnRecord,
        *,
        rank: str,
        num_context_tokens: int,
        budget_s: float | None = None,
    ) -> SessionView:
        """Append the turn to the history, durably. Repeat it with the same record until it answers: ``Unavailable``
        leaves the outcome open. The session then waits for tools if the record has pending calls.

        rank: the decode rank that holds the session's caches now. Raises ``Aborted`` (STALE_EPOCH) where another
        attempt holds the session, ``NotFound`` where it was deleted meanwhile.
        """
        stored = record.SerializeToString()
        if len(stored) > MAX_RECORD_BYTES:
            raise ResourceExhausted(
                f"the turn's record has {len(stored)} bytes, more than {MAX_RECORD_BYTES}; send fewer messages a turn",
                reason="TURN_TOO_LARGE",
            )
        summary = session_pb2.Session(
            pending_tool_calls=record.pending_tool_calls, num_context_tokens=num_context_tokens
        )
        entry = chain.entry(turn.history.end, stored)
        session = await self._store.commit(
            turn.tenant,
            turn.session_id,
            CommitArguments(
                key=turn.key,
                turn_id=turn.turn_id,
                epoch=turn.epoch,
                before=turn.history.end,
                entry=entry,
                rest="waiting_for_tools" if record.pending_tool_calls else "idle",
                summary=summary.SerializeToString(),
                rank=rank,
                num_prompt_tokens=record.num_prompt_tokens,
                num_output_tokens=len(record.output.token_ids),
            ),
            budget_s=budget_s,
        )
        if session.chain == entry[: chain.CHAIN_BYTES]:
            self._cache.put(turn.tenant, turn.session_id, turn.history.appended(record, entry))
        return view_of(turn.tenant, turn.session_id, session)

    async def fail_turn(
        self,
        tenant: TenantId,
        session_id: SessionId,
        turn: BegunTurn | RunningTurn,
        final_event: events_pb2.TurnEvent,
        *,
        budget_s: float | None = None,
    ) -> SessionView:
        """End a running turn with ``finished`` (cancelled) or ``failed``; the head stays, the key as the table above.

        Repeating it is harmless. Raises ``Aborted``: STALE_EPOCH as in ``commit_turn``, TURN_COMMITTED where it
        was committed before (an earlier, timed-out commit came through).
        """
        event = final_event.SerializeToString() if _is_for_good(final_event) else b""
        session = await self._store.fail(
            tenant,
            session_id,
            key=turn.key,
            turn_id=turn.turn_id,
            epoch=turn.epoch,
            event=event,
            budget_s=budget_s,
        )
        return view_of(tenant, session_id, session)

    async def abandon_turn(self, turn: BegunTurn) -> None:
        """Give back a session whose turn was refused after all: head and key as if it had never begun."""
        await self._abandon(turn.tenant, turn.session_id, turn.key, turn.turn_id, turn.epoch)

    async def _begin_or_abandon(
        self, tenant: TenantId, session_id: SessionId, arguments: BeginArguments
    ) -> Begun | Done | Ended | RunningTurn:
        """Begin; where the caller is cancelled meanwhile, let it end and give the session back."""
        task = asyncio.ensure_future(self._store.begin(tenant, session_id, arguments))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:

            async def abandon() -> None:
                reply = await task
                if isinstance(reply, Begun):
                    await self._abandon(tenant, session_id, arguments.key, reply.turn_id, reply.session.epoch)

            self._abandon_later(abandon())
            raise

    async def _abandon(self, tenant: TenantId, session_id: SessionId, key: str, turn_id: TurnId, epoch: Epoch) -> None:
        await self._store.fail(
            tenant,
            session_id,
            key=key,
            turn_id=turn_id,
            epoch=epoch,
            event=b"",
            budget_s=_ABANDON_BUDGET_S,
        )

    def _abandon_later(self, abandon: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await abandon
            except SeamountError as error:  # the turn's deadline frees the session then
                _log.warning("turn_not_abandoned", extra={"reason": error.reason})

        task = asyncio.create_task(run())
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)


def _is_for_good(event: events_pb2.TurnEvent) -> bool:
    match event.WhichOneof("event"):
        case "finished":
            return True
        case "failed":
            return event.failed.status.code not in _FAILED_FOR_NOW
    raise InvalidArgument("a turn ends with `finished` or `failed`", field="final_event")
