"""Sessions as the rest of the router sees them: protos and verified histories over the Functions of Redis.

The server's secret makes ids from keys and signs page tokens. Without it a retried CreateSession would not find its
session again; sessions stay readable by their ids.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from seamount.router import chain
from seamount.router.chain import History
from seamount.router.idempotency import body_hash
from seamount.router.session_names import SessionNames, check_session_id, is_session_id
from seamount.router.session_turns import SessionTurns
from seamount.router.session_view import SessionView, joined, view_of, whole
from seamount.router.store import Store
from seamount.v1 import common_pb2, record_pb2, session_pb2
from seamount.wire import limits
from seamount.wire.ids import RouterId, SessionId, TenantId

DEFAULT_PAGE_SIZE = 50


class Sessions(SessionTurns):
    """Sessions of one namespace, for one router: made, updated, read, listed, deleted, and their turns.

    Errors as ``Store.function``; an unknown session and another tenant's are the same ``NotFound``; damaged or missing
    state is ``DataLoss``.
    """

    def __init__(
        self,
        store: Store,
        *,
        secret: bytes,
        router_id: RouterId,
        cluster: str = "seamount",
        cache_bytes: int = 256 << 20,
        deadline_grace_s: float = 2.0,
        log_kept_s: float = 600.0,
    ) -> None:
        """router_id: unique to this process, also over restarts; cluster: name of the directory that it stands in;
        deadline_grace_s: how long after its deadline a running turn still holds its session, for the owner to end it
        itself; log_kept_s: how long the token log of an ended turn is kept."""
        super().__init__(
            store,
            router_id=router_id,
            cluster=cluster,
            cache_bytes=cache_bytes,
            deadline_grace_s=deadline_grace_s,
            log_kept_s=log_kept_s,
        )
        self._names = SessionNames(secret)

    async def create(
        self, tenant: TenantId, request: session_pb2.CreateSessionRequest, *, model: str
    ) -> session_pb2.Session:
        """A new session on ``model`` (resolved). With a key, a retry finds the first one; ``AlreadyExists`` where the
        key came with another body. After a DeleteSession the key makes a new session."""
        record = record_pb2.SessionRecord(
            tenant_id=tenant,
            model=model,
            thinking_mode=request.thinking_mode or common_pb2.THINKING_MODE_THINKING,
            defaults=request.defaults,
        )
        options = record_pb2.SessionOptions(context_policy=request.context_policy)
        return await self._create(
            tenant, request, record, summary=session_pb2.Session(), options=options, records=(), rank=""
        )

    async def update(self, tenant: TenantId, request: session_pb2.UpdateSessionRequest) -> session_pb2.Session:
        """The session with its options changed, from its next turn on. A retry under the same key changes nothing more.

        Raises ``InvalidArgument``, ``AlreadyExists`` where the key came with another body, ``Aborted``
        (TURN_IN_PROGRESS) while a turn runs.
        """
        key = request.idempotency_key
        limits.check_length(
            key.encode(), field="idempotency_key", low=1, high=limits.MAX_IDEMPOTENCY_KEY_BYTES, unit="bytes"
        )
        session_id = SessionId(request.session_id)
        check_session_id(session_id)
        options = record_pb2.SessionOptions(context_policy=request.context_policy)
        stored = await self._store.update(
            tenant, session_id, key=key, body_hash=body_hash(request), options=options.SerializeToString()
        )
        return view_of(tenant, session_id, stored).session

    async def fork(
        self,
        tenant: TenantId,
        request: session_pb2.ForkSessionRequest,
        origin: SessionView,
        records: Sequence[record_pb2.TurnRecord],
        *,
        num_context_tokens: int,
    ) -> session_pb2.Session:
        """A new session that begins with these first turns of another; as ``create`` for its key.

        Its turns draw on a seed of their own, also where the other one's defaults name one. num_context_tokens: of
        these turns.
        """
        record = record_pb2.SessionRecord(
            tenant_id=tenant,
            model=origin.session.model,
            thinking_mode=origin.session.thinking_mode,
            defaults=origin.session.defaults,
            forked_from=session_pb2.ForkOrigin(session_id=origin.session.id, at_turn=len(records)),
        )
        if record.defaults.HasField("seed"):
            record.defaults.seed = secrets.randbits(63)
        pending = records[-1].pending_tool_calls if records else ()
        summary = session_pb2.Session(pending_tool_calls=pending, num_context_tokens=num_context_tokens)
        return await self._create(
            tenant,
            request,
            record,
            summary=summary,
            options=record_pb2.SessionOptions(context_policy=origin.session.context_policy),
            records=records,
            rank=origin.last_rank if records else "",
        )

    async def _create(
        self,
        tenant: TenantId,
        request: session_pb2.CreateSessionRequest | session_pb2.ForkSessionRequest,
        record: record_pb2.SessionRecord,
        *,
        summary: session_pb2.Session,
        options: record_pb2.SessionOptions,
        records: Sequence[record_pb2.TurnRecord],
        rank: str,
    ) -> session_pb2.Session:
        key = request.idempotency_key
        limits.check_length(key.encode(), field="idempotency_key", high=limits.MAX_IDEMPOTENCY_KEY_BYTES, unit="bytes")
        session_id = record.session_id = self._names.session_id(tenant, key)
        created_ns = time.time_ns()
        record.created_at.FromNanoseconds(created_ns)
        stored = record.SerializeToString()
        entries: list[bytes] = []
        for turn in records:
            before = entries[-1][: chain.CHAIN_BYTES] if entries else chain.root(stored)
            entries.append(chain.entry(before, turn.SerializeToString()))
        read = await self._store.create(
            tenant,
            session_id,
            record=stored,
            body_hash=body_hash(request),
            summary=summary.SerializeToString(),
            chain=entries[-1][: chain.CHAIN_BYTES] if entries else chain.root(stored),
            created=f"{created_ns // 1000000:015d}",
            rest="waiting_for_tools" if summary.pending_tool_calls else "idle",
            rank=rank,
            options=options.SerializeToString(),
            entries=entries,
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
        """Delete session, history and logs; a turn that still runs is refused when it logs or commits. Repeating it
        is harmless."""
        if not is_session_id(session_id):
            return
        self._cache.drop(tenant, session_id)
        await self._store.delete(tenant, session_id)
