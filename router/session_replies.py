"""What the session Functions of Redis answer, and the typed errors of their refusals. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seamount.router.store import Reply
from seamount.router.stored import Read, RunningTurn, StoredSession
from seamount.wire.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    SeamountError,
)
from seamount.wire.ids import Epoch, RouterId, TurnId

MAX_RETRY_AFTER_S = 1.0
MIN_RETRY_AFTER_S = 0.05


def read_reply(reply: Reply) -> Read:
    """Of get_session. Raises the refusal that it may be."""
    if reply[0] != b"OK":
        raise refusal(reply)
    return Read(created=reply[1].decode(), session=session_of(reply[2]), first=reply[3], entries=reply[4])


def session_of(view: Sequence[Any]) -> StoredSession:
    """In the order of VIEW in functions.lua, then lease and options."""
    record, rest, head, epoch, chain, summary, rank, prompt, output, updated, turn, key, owner, deadline = view[:14]
    lease, options = view[14:]
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
        lease=lease,
        options=options,
        running=running,
    )


def refusal(reply: Reply) -> SeamountError:
    """Of any Function: the typed error of an answer that is not the wanted one."""
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
        case b"LOGGED":
            return Aborted(
                "more of the turn is logged than its last event counts",
                reason="TOKENS_LOGGED",
                metadata={"log_end": details[0]},
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


def not_found() -> NotFound:
    """The one answer for an unknown session, whoever asks and whyever it is unknown."""
    return NotFound("there is no such session; check its id, and that this API key made it", reason="SESSION_NOT_FOUND")
