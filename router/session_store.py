"""The session Functions, typed: one method a Function. Bytes stay bytes here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote

from seamount.router.running_index import RunningIndex
from seamount.router.session_replies import read_reply, refusal, session_of
from seamount.router.store import Reply, Store, called
from seamount.router.stored import (
    AppendArguments,
    BeginArguments,
    Begun,
    CommitArguments,
    Done,
    Ended,
    Listed,
    LogEntry,
    Read,
    RunningTurn,
    StoredSession,
    Taken,
)
from seamount.wire.errors import SeamountError
from seamount.wire.ids import Epoch, RouterId, SessionId, TenantId, TurnId


class SessionStore:
    """The Functions of one namespace's sessions. Errors as ``Store.function``, and those each method names.

    cluster: whose routers take over the turns that begin here; log_kept_s: how long the token log of an ended turn is
    kept.
    """

    def __init__(self, store: Store, *, cluster: str, log_kept_s: float) -> None:
        self.store = store
        self.index = RunningIndex(store, cluster)
        self._log_kept_ms = round(log_kept_s * 1000)

    async def create(
        self,
        tenant: TenantId,
        session_id: SessionId,
        *,
        record: bytes,
        body_hash: bytes,
        summary: bytes,
        chain: bytes,
        created: str,
        rest: str,
        rank: str,
        options: bytes,
        entries: Sequence[bytes],
    ) -> Read:
        """The new session, or the one that an earlier, same call made. Lists it. ``AlreadyExists`` for another body.

        options: SessionOptions; entries: the turns it begins with; chain: after them.
        """
        arguments: list[bytes | str | int] = [*_scope(tenant, session_id), record, body_hash, summary, chain]
        arguments += [created, rest, rank, options, *entries]
        reply: Reply = await self.store.function("create_session", self._keys(tenant, session_id), arguments)
        if reply[0] not in (b"CREATED", b"EXISTS"):
            raise refusal(reply)
        found = reply[1].decode()
        # After the session, never before: whoever lists an entry without a session may then remove it.
        await self.store.command("ZADD", self._index(tenant), 0, f"{found}/{session_id}")
        session = session_of(reply[2])
        return Read(created=found, session=session, first=session.head, entries=())

    async def read(self, tenant: TenantId, session_id: SessionId, *, known_head: int | None) -> Read:
        """The session, with the entries after ``known_head`` (all, where that is beyond the head; None = none)."""
        arguments = (*_scope(tenant, session_id), -1 if known_head is None else known_head)
        reply = await self.store.function("get_session", self._keys(tenant, session_id), arguments, read_only=True)
        return read_reply(reply)

    async def update(
        self, tenant: TenantId, session_id: SessionId, *, key: str, body_hash: bytes, options: bytes
    ) -> StoredSession:
        """Set the session's options, once for each key. ``AlreadyExists`` for another body, ``Aborted``
        (TURN_IN_PROGRESS) while a turn runs, ``FailedPrecondition`` for a closed session."""
        arguments = (*_scope(tenant, session_id), key, body_hash, options)
        reply: Reply = await self.store.function("update_session", self._keys(tenant, session_id), arguments)
        if reply[0] != b"UPDATED":
            raise refusal(reply)
        return session_of(reply[1])

    async def begin(
        self, tenant: TenantId, session_id: SessionId, turn: BeginArguments
    ) -> Begun | Done | Ended | RunningTurn:
        """Begin a turn, or say what became of the key's. A ``RunningTurn`` is the key's own; ``AlreadyExists`` for
        another body, ``Aborted`` for another turn or a moved head, ``FailedPrecondition`` for a closed session."""
        arguments = (
            *_scope(tenant, session_id),
            turn.key,
            turn.body_hash,
            turn.known_head,
            "" if turn.expected_head is None else turn.expected_head,
            turn.turn_id,
            turn.nonce,
            turn.owner,
            max(0, round(turn.time_to_live_s * 1000)),
            max(0, round(turn.grace_s * 1000)),
            turn.start,
            self._log_kept_ms,
        )
        keys = self._keys(tenant, session_id, turn.turn_id)
        entered = self.index.entry(turn.owner, tenant, session_id, turn.turn_id)
        _, reply = await self.store.pipeline([entered, called("begin_turn", keys, arguments)])
        match reply:
            case [b"BEGUN", turn_id, view, first, entries]:
                return Begun(turn_id=TurnId(turn_id.decode()), session=session_of(view), first=first, entries=entries)
            case [b"DONE", view, turn_id, index, before, entry]:
                ended = TurnId(turn_id.decode())
                return Done(session=session_of(view), turn_id=ended, index=index, before=before, entry=entry)
            case [b"ENDED", view, turn_id, event]:
                return Ended(session=session_of(view), turn_id=TurnId(turn_id.decode()), event=event)
            case [b"RUNNING", view]:
                running = session_of(view).running
                assert running is not None
                return running
            case _:
                raise refusal(reply)

    async def take_over(
        self, tenant: TenantId, session_id: SessionId, running: RunningTurn, *, known_head: int, owner: RouterId
    ) -> Taken:
        """Take a running turn from its owner, under the next epoch. Repeating it is harmless. ``Aborted``
        (STALE_EPOCH) where it has ended or another was faster, ``DataLoss`` where its log is gone."""
        arguments = (*_scope(tenant, session_id), known_head, running.turn_id, running.epoch, owner)
        keys = self._keys(tenant, session_id, running.turn_id)
        entered = self.index.entry(owner, tenant, session_id, running.turn_id)
        _, reply = await self.store.pipeline([entered, called("take_over_turn", keys, arguments)])
        if reply[0] != b"TAKEN":
            raise refusal(reply)
        return Taken(session=session_of(reply[2]), first=reply[3], entries=reply[4], remaining_s=int(reply[1]) / 1000)

    async def append_tokens(self, appends: Sequence[AppendArguments]) -> list[SeamountError | None]:
        """Append to the logs of several turns in one round trip, tried once; what was appended before is passed over.

        One answer each: None, or ``Aborted`` (STALE_EPOCH: the turn is another's, or over), ``NotFound``, ``DataLoss``.
        """
        calls = [
            called(
                "append_tokens",
                _log_keys(self.store.namespace, one.tenant, one.session_id, one.turn_id),
                (one.turn_id, one.epoch, one.before, one.id, one.tokens),
            )
            for one in appends
        ]
        replies = await self.store.functions(calls)
        return [None if reply[0] == b"LOGGED" else refusal(reply) for reply in replies]

    async def read_log(
        self, tenant: TenantId, session_id: SessionId, turn_id: TurnId, *, after: str = ""
    ) -> list[LogEntry]:
        """The log's entries behind the one of that id ('' = all); none where there is no log (any more)."""
        start = f"({after}" if after else "-"
        entries = await self.store.command("XRANGE", self._log(tenant, session_id, turn_id), start, "+")
        return [
            LogEntry(id=entry_id.decode(), kind=kind.decode(), value=value)
            for entry_id, fields in entries
            for kind, value in fields.items()
        ]

    async def commit(
        self, tenant: TenantId, session_id: SessionId, turn: CommitArguments, *, budget_s: float | None
    ) -> StoredSession:
        """Append the turn. Repeating it is harmless. ``Aborted`` (STALE_EPOCH) where another holds the session."""
        arguments = (
            *_scope(tenant, session_id),
            turn.key,
            turn.turn_id,
            turn.epoch,
            turn.before,
            turn.entry,
            turn.rest,
            turn.summary,
            turn.rank,
            turn.num_prompt_tokens,
            turn.num_output_tokens,
            self._log_kept_ms,
            turn.lease,
        )
        keys = self._keys(tenant, session_id, turn.turn_id)
        left = self.index.removal(turn.owner, tenant, session_id, turn.turn_id)
        commands = [called("commit_turn", keys, arguments), left]
        reply, _ = await self.store.pipeline(commands, budget_s=budget_s)
        if reply[0] != b"COMMITTED":
            raise refusal(reply)
        return session_of(reply[1])

    async def note_lease(self, tenant: TenantId, session_id: SessionId, *, head: int, lease: bytes) -> None:
        """Store what was answered about a lease. ``Aborted`` (HEAD_MOVED) where the session has gone on meanwhile."""
        arguments = (*_scope(tenant, session_id), head, lease)
        reply: Reply = await self.store.function("note_lease", self._keys(tenant, session_id), arguments)
        if reply[0] != b"NOTED":
            raise refusal(reply)

    async def fail(
        self,
        tenant: TenantId,
        session_id: SessionId,
        *,
        key: str,
        turn_id: TurnId,
        epoch: Epoch,
        event: bytes,
        for_good: bool,
        log_end: str,
        budget_s: float | None,
    ) -> tuple[StoredSession, bytes]:
        """End the turn without a commit, by its last event (empty: as if it had never begun); ``for_good``: its key
        is answered by that from now on. Returns the event that it did end with. Repeating it is harmless. ``Aborted``:
        STALE_EPOCH as in ``commit``, TURN_COMMITTED where it had been committed, TOKENS_LOGGED where ``log_end`` is
        not the id of the log's last entry."""
        good = "1" if for_good else ""
        arguments = (*_scope(tenant, session_id), key, turn_id, epoch, event, good, log_end, self._log_kept_ms)
        keys = self._keys(tenant, session_id, turn_id)
        reply: Reply = await self.store.function("fail_turn", keys, arguments, budget_s=budget_s)
        if reply[0] != b"ENDED":
            raise refusal(reply)
        return session_of(reply[1]), reply[2]

    async def delete(self, tenant: TenantId, session_id: SessionId) -> None:
        """Delete the session's keys, damaged ones too, and its turns' logs, then its place in the list."""
        keys = self._keys(tenant, session_id)
        reply: Reply = await self.store.function("delete_session", keys, ())
        if reply[1]:
            await self.store.command("ZREM", self._index(tenant), f"{reply[1].decode()}/{session_id}")

    async def list(self, tenant: TenantId, *, before: str, limit: int) -> tuple[list[Listed], str]:
        """Up to ``limit`` sessions, newest first, after the place ``before`` ('' = from the start), and the place
        where the next page goes on ('' = no more). Deleted sessions are left out."""
        index = self._index(tenant)
        bound = f"({before}" if before else "+"
        members = await self.store.command("ZRANGE", index, bound, "-", "BYLEX", "REV", "LIMIT", 0, limit)
        places = [member.decode() for member in members]
        ids = [SessionId(place.partition("/")[2]) for place in places]
        calls = [(self._keys(tenant, one), (*_scope(tenant, one), -1)) for one in ids]
        replies = await self.store.pipeline([called("get_session", *one, read_only=True) for one in calls])
        found: list[Listed] = []
        gone: list[str] = []
        for place, session_id, reply in zip(places, ids, replies, strict=True):
            created = reply[1].decode() if reply[0] == b"OK" else ""
            if reply[0] == b"NOT_FOUND" or (created and created != place.partition("/")[0]):
                gone.append(place)
            else:
                session = session_of(reply[2]) if reply[0] == b"OK" else None
                found.append(Listed(session_id=session_id, session=session))
        if gone:  # deleted by a router that died before it could take them off the list
            await self.store.command("ZREM", index, *gone)
        return found, places[-1] if len(places) == limit else ""

    def _keys(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId | None = None) -> tuple[str, ...]:
        tag = _tag(tenant, session_id)
        keys = self.store.key(tag, "meta"), self.store.key(tag, "turns"), self.store.key(tag, "keys")
        return keys if turn_id is None else (*keys, self._log(tenant, session_id, turn_id))

    def _log(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> str:
        return _log_keys(self.store.namespace, tenant, session_id, turn_id)[1]

    def _index(self, tenant: TenantId) -> str:
        return self.store.key("sessions", quote(tenant, safe=""))


def _tag(tenant: TenantId, session_id: SessionId) -> str:
    return f"{{{quote(tenant, safe='')}/{quote(session_id, safe='')}}}"


@lru_cache(maxsize=4096)
def _log_keys(namespace: str, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> tuple[str, str]:
    """Of a session's meta and of a turn's log; asked for with each entry."""
    tag = _tag(tenant, session_id)
    return f"{namespace}:{tag}:meta", f"{namespace}:{tag}:log:{quote(turn_id, safe='')}"


def _scope(tenant: TenantId, session_id: SessionId) -> tuple[str, str]:
    return tenant, session_id
