"""What a rank refuses before any page changes hands: malformed prompts, stale writers, prompts that do not fit."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from seamount.wire.errors import Aborted, InvalidArgument, OutOfRange, ResourceExhausted
from seamount.workers.cache.pages import PagePool

MAX_FENCES = 1 << 16
"""Sessions whose highest epoch is remembered."""
MIN_RETRY_S, MAX_RETRY_S = 0.1, 2.0


class EpochFences:
    """The highest {epoch, attempt} seen of each session; the least recently used sessions are forgotten.

    Not thread-safe: its owner holds the lock.
    """

    def __init__(self, max_sessions: int = MAX_FENCES) -> None:
        self._max_sessions = max_sessions
        self._seen: OrderedDict[str, tuple[int, str, int]] = OrderedDict()

    def seen(self, session_id: str) -> int:
        """The session's highest epoch; 0 where none is remembered."""
        return self._seen.get(session_id, (0, "", 0))[0]

    def close(self, session_id: str, epoch: int) -> None:
        """Let nothing through up to this epoch: the session is no more."""
        if epoch >= self.seen(session_id):
            self._note(session_id, (epoch + 1, "", 0))

    def advance(self, session_id: str, turn_id: str, epoch: int, attempt: int) -> None:
        """Let the newest through. Raises Aborted (STALE_EPOCH, STALE_ATTEMPT) for an older one."""
        seen_epoch, seen_turn, seen_attempt = self._seen.get(session_id, (epoch, turn_id, attempt))
        if epoch < seen_epoch:
            raise Aborted(
                f"epoch {epoch} of the session is stale: {seen_epoch} has been seen; read the session again",
                reason="STALE_EPOCH",
                metadata={"epoch": str(epoch), "current_epoch": str(seen_epoch)},
            )
        if epoch == seen_epoch and turn_id == seen_turn and attempt < seen_attempt:
            raise Aborted(
                f"attempt {attempt} of the turn is stale: {seen_attempt} has been seen; use a later attempt",
                reason="STALE_ATTEMPT",
                metadata={"attempt": str(attempt), "current_attempt": str(seen_attempt)},
            )
        self._note(session_id, (epoch, turn_id, attempt))

    def _note(self, session_id: str, seen: tuple[int, str, int]) -> None:
        self._seen[session_id] = seen
        self._seen.move_to_end(session_id)
        if len(self._seen) > self._max_sessions:
            self._seen.popitem(last=False)


def pack_prompt(token_ids: Sequence[int], *, page_size: int, num_pages: int | None) -> array[int]:
    """The ids as uint32. num_pages: None where none are to be allocated. Raises InvalidArgument (empty, not uint32;
    EXCEEDS_CACHE: more than all pages)."""
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument("token_ids must be integers in [0, 2^32)", field="token_ids") from error
    if not packed:
        raise InvalidArgument("token_ids is empty; it must hold at least 1 token", field="token_ids")
    num_needed = len(packed) // page_size + 1
    if num_pages is not None and num_needed > num_pages:
        raise InvalidArgument(
            f"token_ids needs {num_needed} pages ({len(packed)} tokens and one more) and this rank has {num_pages} in "
            "all; shorten the prompt or give the rank more pages",
            field="token_ids",
            reason="EXCEEDS_CACHE",
            metadata={"num_needed_pages": str(num_needed), "num_pages": str(num_pages)},
        )
    return packed


def no_pages(pool: PagePool, num_needed: int, soonest_expiry_s: float) -> ResourceExhausted:
    """The refusal of a prompt that would fit if others ended; soonest_expiry_s: of a reservation or lease, from now."""
    return ResourceExhausted(
        f"the prompt needs {num_needed} pages, cached ones included; {pool.num_available} of "
        f"{pool.num_pages} are free or can be evicted, {pool.num_leased_idle} are leased; retry later or use another "
        "rank",
        reason="NO_PAGES",
        retry_after_s=min(max(soonest_expiry_s, MIN_RETRY_S), MAX_RETRY_S),
        metadata={"num_needed_pages": str(num_needed), "num_pages": str(pool.num_pages)},
    )


def check_span(first: int, end: int, limit: int) -> None:
    """Raise OutOfRange (SPAN_OUT_OF_RANGE) unless ``0 <= first <= end <= limit``."""
    if not 0 <= first <= end <= limit:
        raise OutOfRange(
            f"positions [{first}, {end}) are not within the reservation's [0, {limit})", reason="SPAN_OUT_OF_RANGE"
        )
