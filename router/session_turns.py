"""The transitions of a session's turns, over the Functions of Redis: begun, taken over, logged, committed, failed."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any

from seamount.router import chain
from seamount.router.begun_turn import BegunTurn
from seamount.router.chain import History, HistoryCache
from seamount.router.idempotency import is_for_good
from seamount.router.receipts import added
from seamount.router.running_index import IndexedTurn, RunningIndex
from seamount.router.session_names import check_session_id, random_name
from seamount.router.session_store import SessionStore
from seamount.router.session_view import ReplayedTurn, SessionView, joined, replayed, view_of, whole
from seamount.router.store import Store
from seamount.router.stored import (
    AppendArguments,
    BeginArguments,
    Begun,
    CommitArguments,
    Done,
    Ended,
    LogEntry,
    RunningTurn,
    Taken,
)
from seamount.v1 import events_pb2, record_pb2, session_pb2
from seamount.wire import limits
from seamount.wire.errors import ResourceExhausted, SeamountError, Unavailable
from seamount.wire.ids import Epoch, RouterId, SessionId, TenantId, TurnId

MAX_RECORD_BYTES = 128 << 20
_log = logging.getLogger(__name__)
_ABANDON_BUDGET_S = 5.0


class SessionTurns:
    """What a router does to the turns of its namespace's sessions. Errors as ``Sessions``."""

    def __init__(
        self,
        store: Store,
        *,
        router_id: RouterId,
        cluster: str,
        cache_bytes: int,
        deadline_grace_s: float,
        log_kept_s: float,
    ) -> None:
        self._store = SessionStore(store, cluster=cluster, log_kept_s=log_kept_s)
        self._router_id = router_id
        self._cache = HistoryCache(cache_bytes)
        self._grace_s = deadline_grace_s
        self._cleaning: set[asyncio.Task[None]] = set()

    @property
    def index(self) -> RunningIndex:
        return self._store.index

    async def close(self) -> None:
        """Wait for what is being cleaned up, such as turns whose callers went away while they began; bounded."""
        await asyncio.gather(*self._cleaning, return_exceptions=True)

    async def begin_turn(
        self,
        tenant: TenantId,
        session_id: SessionId,
        *,
        key: str,
        body_hash: bytes,
        start: record_pb2.TurnStart,
        time_to_live_s: float,
        expected_head: int | None = None,
    ) -> BegunTurn | ReplayedTurn | RunningTurn:
        """Take the session for a new turn, or learn what became of the key's.

        start: what the turn is, for whoever continues it; time_to_live_s: the turn's deadline from now, by the
        server's clock, past which another turn may take the session.
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
            start=start.SerializeToString(),
        )
        try:
            reply = await self._begin_or_abandon(tenant, session_id, arguments)
        except SeamountError as error:
            if not isinstance(error, Unavailable):  # after which the turn may run: somebody has to find it
                self._remove_later(tenant, session_id, self._router_id, arguments.turn_id)
            raise
        if not isinstance(reply, Begun):
            self._remove_later(tenant, session_id, self._router_id, arguments.turn_id)
            return reply if isinstance(reply, RunningTurn) else replayed(tenant, session_id, reply)
        try:
            return await self._begun(tenant, session_id, reply.turn_id, key, reply, known)
        except BaseException:
            self._later(self._abandon(tenant, session_id, key, reply.turn_id, reply.session.epoch))
            raise

    async def take_over(self, tenant: TenantId, session_id: SessionId, running: RunningTurn) -> tuple[BegunTurn, float]:
        """Take a running turn whose owner is judged dead, or is this router and knows nothing of it; the old owner
        is refused from now on. Also returns the seconds until the turn's deadline, negative where it has passed.

        Raises ``Aborted`` (STALE_EPOCH) where it has ended or another was faster, ``DataLoss`` where its log is gone.
        """
        known = self._cache.get(tenant, session_id)
        taken = await self._store.take_over(
            tenant, session_id, running, known_head=known.head if known else 0, owner=self._router_id
        )
        begun = await self._begun(tenant, session_id, running.turn_id, running.key, taken, known)
        return begun, taken.remaining_s

    async def _begun(
        self,
        tenant: TenantId,
        session_id: SessionId,
        turn_id: TurnId,
        key: str,
        reply: Begun | Taken,
        known: History | None,
    ) -> BegunTurn:
        view = view_of(tenant, session_id, reply.session)
        history = joined(known, reply.session, reply.first, reply.entries)
        if history is None:
            read = await self._store.read(tenant, session_id, known_head=0)
            history = whole(read.session, read.first, read.entries)
        self._cache.put(tenant, session_id, history)
        return BegunTurn(
            tenant=tenant,
            session_id=session_id,
            key=key,
            turn_id=turn_id,
            epoch=reply.session.epoch,
            view=view,
            history=history,
        )

    async def append_tokens(self, appends: Sequence[AppendArguments]) -> list[SeamountError | None]:
        """``SessionStore.append_tokens``."""
        return await self._store.append_tokens(appends)

    async def read_log(
        self, tenant: TenantId, session_id: SessionId, turn_id: TurnId, *, after: str = ""
    ) -> list[LogEntry]:
        """``SessionStore.read_log``, of a well-formed session id."""
        check_session_id(session_id)
        return await self._store.read_log(tenant, session_id, turn_id, after=after)

    async def commit_turn(
        self,
        turn: BegunTurn,
        record: record_pb2.TurnRecord,
        *,
        rank: str,
        num_context_tokens: int,
        lease: record_pb2.StoredLease | None = None,
        budget_s: float | None = None,
    ) -> SessionView:
        """Append the turn to the history, durably. Repeat it with the same record until it answers: ``Unavailable``
        leaves the outcome open. The session then waits for tools if the record has pending calls.

        rank: the decode rank that holds the session's caches now; lease: what it answered about keeping them. Raises
        ``Aborted`` (STALE_EPOCH) where another attempt holds the session, ``NotFound`` where it was deleted meanwhile.
        """
        stored = record.SerializeToString()
        if len(stored) > MAX_RECORD_BYTES:
            raise ResourceExhausted(
                f"the turn's record has {len(stored)} bytes, more than {MAX_RECORD_BYTES}; send fewer messages a turn",
                reason="TURN_TOO_LARGE",
            )
        summary = session_pb2.Session(
            pending_tool_calls=record.pending_tool_calls,
            num_context_tokens=num_context_tokens,
            totals=added(turn.view.session.totals, record.receipt)
            if record.HasField("receipt")
            else turn.view.session.totals,
        )
        entry = chain.entry(turn.history.end, stored)
        session = await self._store.commit(
            turn.tenant,
            turn.session_id,
            CommitArguments(
                key=turn.key,
                turn_id=turn.turn_id,
                owner=self._router_id,
                epoch=turn.epoch,
                before=turn.history.end,
                entry=entry,
                rest="waiting_for_tools" if record.pending_tool_calls else "idle",
                summary=summary.SerializeToString(),
                rank=rank,
                num_prompt_tokens=record.num_prompt_tokens,
                num_output_tokens=len(record.output.token_ids),
                lease=lease.SerializeToString() if lease is not None else b"",
            ),
            budget_s=budget_s,
        )
        if session.chain == entry[: chain.CHAIN_BYTES]:
            self._cache.put(turn.tenant, turn.session_id, turn.history.appended(record, entry))
        return view_of(turn.tenant, turn.session_id, session)

    async def note_lease(
        self, tenant: TenantId, session_id: SessionId, *, head: int, lease: record_pb2.StoredLease
    ) -> None:
        """``SessionStore.note_lease``."""
        await self._store.note_lease(tenant, session_id, head=head, lease=lease.SerializeToString())

    async def fail_turn(
        self,
        tenant: TenantId,
        session_id: SessionId,
        turn: BegunTurn | RunningTurn,
        final_event: events_pb2.TurnEvent,
        *,
        log_end: str,
        budget_s: float | None = None,
    ) -> events_pb2.TurnEvent:
        """End a running turn with ``finished`` (cancelled) or ``failed``; the head stays, the key is answered as in
        ``idempotency``.

        Returns the event it did end with: another one where it had been ended before. log_end: id of the
        log's last entry that the event counts. Repeating it is harmless. Raises ``Aborted``: STALE_EPOCH as in
        ``commit_turn``; TURN_COMMITTED where it was committed before (an earlier, timed-out commit came through);
        TOKENS_LOGGED, with the id that is the last in its metadata.
        """
        _, event = await self._store.fail(
            tenant,
            session_id,
            key=turn.key,
            turn_id=turn.turn_id,
            epoch=turn.epoch,
            event=final_event.SerializeToString(),
            for_good=is_for_good(final_event),
            log_end=log_end,
            budget_s=budget_s,
        )
        owner = turn.owner if isinstance(turn, RunningTurn) else self._router_id
        self._remove_later(tenant, session_id, owner, turn.turn_id)
        return events_pb2.TurnEvent.FromString(event)

    async def abandon_turn(self, turn: BegunTurn) -> None:
        """Give back a session whose turn was refused after all: head and key as if it had never begun."""
        await self._abandon(turn.tenant, turn.session_id, turn.key, turn.turn_id, turn.epoch)

    async def release_turn(self, turn: BegunTurn, *, budget_s: float) -> None:
        """Let whoever looks for turns without a router find this one at once."""
        await self.index.release(
            IndexedTurn(owner=self._router_id, tenant=turn.tenant, session_id=turn.session_id, turn_id=turn.turn_id),
            budget_s=budget_s,
        )

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

            self._later(abandon())
            raise

    async def _abandon(self, tenant: TenantId, session_id: SessionId, key: str, turn_id: TurnId, epoch: Epoch) -> None:
        await self._store.fail(
            tenant,
            session_id,
            key=key,
            turn_id=turn_id,
            epoch=epoch,
            event=b"",
            for_good=False,
            log_end="",
            budget_s=_ABANDON_BUDGET_S,
        )
        self._remove_later(tenant, session_id, self._router_id, turn_id)

    def _remove_later(self, tenant: TenantId, session_id: SessionId, owner: RouterId, turn_id: TurnId) -> None:
        """Take a turn out of the index, with nobody waiting; whoever looks for turns of the dead does it, else."""
        turn = IndexedTurn(owner=owner, tenant=tenant, session_id=session_id, turn_id=turn_id)
        self._later(self.index.remove(turn))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except SeamountError as error:  # the turn's deadline frees the session, a take-over cleans the index
                _log.warning("cleanup_failed", extra={"reason": error.reason})

        task = asyncio.create_task(run())
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)
