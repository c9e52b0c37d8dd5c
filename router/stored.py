"""What the session Functions take and answer: one dataclass each. Bytes stay bytes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seamount.wire.ids import Epoch, RouterId, SessionId, TenantId, TurnId


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
    """A session's meta. rest: the state it is in when no turn runs; chain: of its last turn; last_rank: '' for none;
    lease: a StoredLease, options: SessionOptions, empty for none."""

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
    lease: bytes
    options: bytes
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
    session: StoredSession
    first: int
    entries: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A running turn that is ours now. remaining_s: until its deadline, negative where that has passed."""

    session: StoredSession
    first: int
    entries: Sequence[bytes]
    remaining_s: float


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
    """``expected_head`` None = any; ``start``: the log's first entry; times in seconds."""

    key: str
    body_hash: bytes
    known_head: int
    expected_head: int | None
    turn_id: TurnId
    nonce: bytes
    owner: RouterId
    time_to_live_s: float
    grace_s: float
    start: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitArguments:
    key: str
    turn_id: TurnId
    owner: RouterId
    epoch: Epoch
    before: bytes
    entry: bytes
    rest: str
    summary: bytes
    rank: str
    num_prompt_tokens: int
    num_output_tokens: int
    lease: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendArguments:
    """An entry of a turn's log. before, id: of the entry before it, and its own; tokens: ``LoggedTokens``."""

    tenant: TenantId
    session_id: SessionId
    turn_id: TurnId
    epoch: Epoch
    before: str
    id: str
    tokens: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One entry of a turn's log. kind: ``start``, ``tokens``, ``ended``, ``committed``; see functions.lua."""

    id: str
    kind: str
    value: bytes
