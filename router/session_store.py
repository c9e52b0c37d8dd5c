"""The session Functions, typed: one method a Function, one dataclass an answer. Bytes stay bytes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from seamount.router.store import Reply, Store
from seamount.wire.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    SeamountError,
)
from seamount.wire.ids import Epoch, RouterId, SessionId, TenantId, TurnId

MAX_RETRY_AFTER_S = 1.0
MIN_RETRY_AFTER_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTurn:
    """The turn that holds a session: who runs it, and until when at the latest by the server's clock."""

    turn_id: TurnId
    key: str
    owner: RouterId
    epoch: Epoch
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """A session's meta. rest: the state it is in when no turn runs; chain: of its last turn; last_rank: '' for none."""

    record: bytes
    rest: str
    head: int
    epoch: Epoch
    chain: bytes
    summary: bytes
    last_rank: str
    num_prompt_tokens: int
    num_output_tokens: int
    updated_ms: int
    running: RunningTurn | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A session with the entries from index ``first`` on."""

    created: str
    session: StoredSession
    first: int
    entries: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """``session`` None: its stored state is damaged, it can only be deleted."""

    session_id: SessionId
    session: StoredSession | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    turn_id: TurnId
    parameters: bytes
    session: StoredSession
    first: int
    entries: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The key's turn was committed: its entry, and the chain before it (empty: the root)."""

    session: StoredSession
    turn_id: TurnId
    index: int
    before: bytes
    entry: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The key's turn ended for good without a commit: its last event."""

    session: StoredSession
    turn_id: TurnId
    event: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginArguments:
    """``expected_head`` None = any; ``supersede_epoch`` None = only past its deadline; times in seconds."""

    key: str
    body_hash: bytes
    known_head: int
    expected_head: int | None
    turn_id: TurnId
    nonce: bytes
    owner: RouterId
    time_to_live_s: float
    grace_s: float
    supersede_epoch: Epoch | None
    parameters: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitArguments:
    key: str
    turn_id: TurnId
    epoch: Epoch
    before: bytes
    entry: bytes
    rest: str
    summary: bytes
    rank: str
    num_prompt_tokens: int
    num_output_tokens: int


class SessionStore:
    """The Functions of one namespace's sessions. Errors as ``Store.function``, and those each method names."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def create(
        self,
        tenant: TenantId,
        session_id: SessionId,
        *,
        record: bytes,
        body_hash: bytes,
        summary: bytes,
        root: bytes,
        created: str,
    ) -> Read:
        """The new session, or the one that an earlier, same call made. Lists it. ``AlreadyExists`` for another body."""
        arguments = (*_scope(tenant, session_id), record, body_hash, summary, root, created)
        reply: Reply = await self.store.function("create_session", self._keys(tenant, session_id), arguments)
        if reply[0] not in (b"CREATED", b"EXISTS"):
            raise _refusal(reply)
        found = reply[1].decode()
        # After the session, never before: whoever lists an entry without a session may then remove it.
        await self.store.command("ZADD", self._index(tenant), 0, f"{found}/{session_id}")
        session = _session(reply[2])
        return Read(created=found, session=session, first=session.head, entries=())

    async def read(self, tenant: TenantId, session_id: SessionId, *, known_head: int | None) -> Read:
        """The session, with the entries after ``known_head`` (all, where that is beyond the head; None = none)."""
        arguments = (*_scope(tenant, session_id), -1 if known_head is None else known_head)
        reply = await self.store.function("get_session", self._keys(tenant, session_id), arguments, read_only=True)
        return _read(reply)

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
            "" if turn.supersede_epoch is None else turn.supersede_epoch,
            turn.parameters,
        )
        reply: Reply = await self.store.function("begin_turn", self._keys(tenant, session_id), arguments)
        match reply:
            case [b"BEGUN", turn_id, parameters, view, first, entries]:
                return Begun(
                    turn_id=TurnId(turn_id.decode()),
                    parameters=parameters,
                    session=_session(view),
                    first=first,
                    entries=entries,
                )
            case [b"DONE", view, turn_id, index, before, entry]:
                ended = TurnId(turn_id.decode())
                return Done(session=_session(view), turn_id=ended, index=index, before=before, entry=entry)
            case [b"ENDED", view, turn_id, event]:
                return Ended(session=_session(view), turn_id=TurnId(turn_id.decode()), event=event)
            case [b"RUNNING", view]:
                running = _session(view).running
                assert running is not None
                return running
            case _:
                raise _refusal(reply)

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
        )
        keys = self._keys(tenant, session_id)
        reply: Reply = await self.store.function("commit_turn", keys, arguments, budget_s=budget_s)
        if reply[0] != b"COMMITTED":
            raise _refusal(reply)
        return _session(reply[1])

    async def fail(
        self,
        tenant: TenantId,
        session_id: SessionId,
        *,
        key: str,
        turn_id: TurnId,
        epoch: Epoch,
        event: bytes,
        budget_s: float | None,
    ) -> StoredSession:
        """End the turn without a commit; empty ``event`` forgets its key. Repeating it is harmless. ``Aborted``:
        STALE_EPOCH as in ``commit``, TURN_COMMITTED where it had been committed."""
        arguments = (*_scope(tenant, session_id), key, turn_id, epoch, event)
        keys = self._keys(tenant, session_id)
        reply: Reply = await self.store.function("fail_turn", keys, arguments, budget_s=budget_s)
        if reply[0] != b"ENDED":
            raise _refusal(reply)
        return _session(reply[1])

    async def delete(self, tenant: TenantId, session_id: SessionId) -> None:
        """Delete the session's keys, damaged ones too, then its place in the list."""
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
        replies = await self.store.functions(
            "get_session", [(self._keys(tenant, one), (*_scope(tenant, one), -1)) for one in ids]
        )
        found: list[Listed] = []
        gone: list[str] = []
        for place, session_id, reply in zip(places, ids, replies, strict=True):
            created = reply[1].decode() if reply[0] == b"OK" else ""
            if reply[0] == b"NOT_FOUND" or (created and created != place.partition("/")[0]):
                gone.append(place)
            else:
                session = _session(reply[2]) if reply[0] == b"OK" else None
                found.append(Listed(session_id=session_id, session=session))
        if gone:  # deleted by a router that died before it could take them off the list
            await self.store.command("ZREM", index, *gone)
        return found, places[-1] if len(places) == limit else ""

    def _keys(self, tenant: TenantId, session_id: SessionId) -> tuple[str, str, str]:
        tag = f"{{{quote(tenant, safe='')}/{quote(session_id, safe='')}}}"
        return self.store.key(tag, "meta"), self.store.key(tag, "turns"), self.store.key(tag, "keys")

    def _index(self, tenant: TenantId) -> str:
        return self.store.key("sessions", quote(tenant, safe=""))


def not_found() -> NotFound:
    """The one answer for an unknown session, whoever asks and whyever it is unknown."""
    return NotFound("there is no such session; check its id, and that this API key made it", reason="SESSION_NOT_FOUND")


def _scope(tenant: TenantId, session_id: SessionId) -> tuple[str, str]:
    return tenant, session_id


def _read(reply: Reply) -> Read:
    if reply[0] != b"OK":
        raise _refusal(reply)
    return Read(created=reply[1].decode(), session=_session(reply[2]), first=reply[3], entries=reply[4])


def _session(view: Sequence[Any]) -> StoredSession:
    """In the order of VIEW in functions.lua."""
    record, rest, head, epoch, chain, summary, rank, prompt, output, updated, turn, key, owner, deadline = view
    running = None
    if turn:
        running = RunningTurn(
            turn_id=TurnId(turn.decode()),
            key=key.decode(),
            owner=RouterId(owner.decode()),
            epoch=Epoch(int(epoch)),
            deadline_ms=int(deadline),
        )
    return StoredSession(
        record=record,
        rest=rest.decode(),
        head=int(head),
        epoch=Epoch(int(epoch)),
        chain=chain,
        summary=summary,
        last_rank=rank.decode(),
        num_prompt_tokens=int(prompt),
        num_output_tokens=int(output),
        updated_ms=int(updated),
        running=running,
    )


def _refusal(reply: Reply) -> SeamountError:
    details = [item.decode("utf-8", "replace") for item in reply[1:] if isinstance(item, bytes)]
    match reply[0]:
        case b"NOT_FOUND":
            return not_found()
        case b"KEY_REUSED":
            return AlreadyExists(
                "this idempotency key was used before with another request; use a new key", reason="KEY_REUSED"
            )
        case b"IN_PROGRESS":
            remaining_s = int(details[0]) / 1000
            return Aborted(
                "another turn of this session is running; retry when it has ended, or cancel it",
                reason="TURN_IN_PROGRESS",
                retry_after_s=min(max(remaining_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
                metadata={"turn_id": details[1]},
            )
        case b"HEAD_MOVED":
            return Aborted(
                f"the session stands at head {details[0]}, not at the expected one; read it, then retry",
                reason="HEAD_MOVED",
                metadata={"head": details[0]},
            )
        case b"CLOSED":
            return FailedPrecondition("the session is closed; create another", reason="SESSION_CLOSED")
        case b"STALE":
            return Aborted(
                "another attempt took this turn over; what this one made is discarded",
                reason="STALE_EPOCH",
                metadata={"epoch": details[0]},
            )
        case b"COMMITTED":
            return Aborted("the turn has been committed already", reason="TURN_COMMITTED")
        case b"DATA_LOSS":
            return DataLoss(
                f"stored state of the session is missing or damaged ({details[0]}); restore the session store from its "
                "last backup, or delete the session",
                reason="SESSION_DAMAGED",
                metadata={"part": details[0]},
            )
    return Internal("the session store gave an unknown answer", reason="STORE_PROTOCOL")
