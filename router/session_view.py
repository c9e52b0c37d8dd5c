"""From what Redis holds to protos and verified histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from seamount.router import chain
from seamount.router.chain import History
from seamount.router.stored import Done, Ended, RunningTurn, StoredSession
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2
from seamount.wire.errors import DataLoss
from seamount.wire.ids import Epoch, SessionId, TenantId, TurnId

_RESTING = {
    "idle": session_pb2.SESSION_STATE_IDLE,
    "waiting_for_tools": session_pb2.SESSION_STATE_WAITING_FOR_TOOLS,
    "closed": session_pb2.SESSION_STATE_CLOSED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """A session and what clients don't see of it. last_rank: decode rank of its last turn, '' for none; lease: what
    was answered to the last request for one since that turn; totals over all committed turns."""

    session: session_pb2.Session
    epoch: Epoch
    running: RunningTurn | None
    last_rank: str
    lease: record_pb2.StoredLease | None
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedTurn:
    """The key's turn ended earlier: with a record if it was committed, else with its last event only."""

    turn_id: TurnId
    record: record_pb2.TurnRecord | None
    final_event: events_pb2.TurnEvent
    view: SessionView


def view_of(tenant: TenantId, session_id: SessionId, stored: StoredSession) -> SessionView:
    """What Redis holds, as the client's proto and the router's own facts. ``DataLoss`` where the record is not that
    session's."""
    try:
        record = record_pb2.SessionRecord.FromString(stored.record)
        summary = session_pb2.Session.FromString(stored.summary)
        lease = record_pb2.StoredLease.FromString(stored.lease) if stored.lease else None
        options = record_pb2.SessionOptions.FromString(stored.options)
    except DecodeError as error:
        raise _damaged("record") from error
    if (record.session_id, record.tenant_id) != (session_id, tenant) or stored.rest not in _RESTING:
        raise _damaged("record")
    session = session_pb2.Session(
        id=session_id,
        model=record.model,
        state=session_pb2.SESSION_STATE_RUNNING if stored.running else _RESTING[stored.rest],
        head=stored.head,
        thinking_mode=record.thinking_mode,
        defaults=record.defaults,
        created_at=record.created_at,
        pending_tool_calls=summary.pending_tool_calls,
        running_turn_id=stored.running.turn_id if stored.running else "",
        num_context_tokens=summary.num_context_tokens,
        totals=summary.totals,
        forked_from=record.forked_from if record.HasField("forked_from") else None,
        context_policy=options.context_policy or common_pb2.CONTEXT_POLICY_ERROR,
    )
    session.updated_at.FromMilliseconds(stored.updated_ms)
    return SessionView(
        session=session,
        epoch=stored.epoch,
        running=stored.running,
        last_rank=stored.last_rank,
        lease=lease,
        num_prompt_tokens=stored.num_prompt_tokens,
        num_output_tokens=stored.num_output_tokens,
    )


def joined(known: History | None, stored: StoredSession, first: int, entries: Sequence[bytes]) -> History | None:
    """The known history with what was read after it; None where it is another session's (deleted and made anew)."""
    if first == 0:
        return whole(stored, first, entries)
    if known is None or known.head != first or known.root != chain.root(stored.record):
        return None
    try:
        history = known.extended(entries)
    except DataLoss:
        return None
    return history if history.end == stored.chain else None


def whole(stored: StoredSession, first: int, entries: Sequence[bytes]) -> History:
    """The history that starts with the session. Raises ``DataLoss`` where it doesn't end as the session says."""
    history = History.start(stored.record).extended(entries)
    if first != 0 or history.end != stored.chain:
        raise _damaged("chain")
    return history


def replayed(tenant: TenantId, session_id: SessionId, reply: Done | Ended) -> ReplayedTurn:
    """What is replayed for a key whose turn ended. ``DataLoss`` where it is damaged."""
    view = view_of(tenant, session_id, reply.session)
    if isinstance(reply, Done):
        before = reply.before or chain.root(reply.session.record)
        _, record = chain.verified(before, reply.entry, index=reply.index)
        return ReplayedTurn(turn_id=reply.turn_id, record=record, final_event=record.final_event, view=view)
    try:
        event = events_pb2.TurnEvent.FromString(reply.event)
    except DecodeError as error:
        raise _damaged("outcome") from error
    return ReplayedTurn(turn_id=reply.turn_id, record=None, final_event=event, view=view)


def _damaged(part: str) -> DataLoss:
    return DataLoss(
        f"stored state of the session is damaged ({part}); restore the session store from its last backup, or delete "
        "the session",
        reason="SESSION_DAMAGED",
        metadata={"part": part},
    )
