"""What a turn cost and why, as its receipt says it, and what a session's receipts add up to."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import duration_pb2

from seamount.v1 import common_pb2, events_pb2, session_pb2
from seamount.wire.durations import duration
from seamount.wire.hashes import PAGE_SIZE

_COUNTS = (
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_host_tokens",
    "num_disk_tokens",
    "num_decode_computed_tokens",
    "num_prefill_computed_tokens",
    "num_pulled_tokens",
    "num_pushed_tokens",
    "num_migrated_tokens",
    "num_prepared_tokens",
    "num_output_tokens",
    "num_retries",
)
_TIMES = ("queue_time", "prefill_time", "transfer_time", "decode_time")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBefore:
    """A session as a turn found it. is_fork: it begins with another one's turns, and no turn of its own has come yet;
    last_rank: decode rank of its last turn, '' for none; is_reencoded: ids of an earlier turn were made under another
    fingerprint; cuts_reasoning: the turn's messages end earlier reasoning; lease: the last one asked for;
    discarded_from: first position at which what the context policy discards for this turn changes the prompt, None
    where it discards nothing; num_discarded: tokens."""

    is_new: bool
    is_fork: bool
    last_rank: str
    is_reencoded: bool
    cuts_reasoning: bool
    lease: events_pb2.Lease | None = None
    discarded_from: int | None = None
    num_discarded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a decode rank answered to the turn's first Reserve. had_left: the rank's ``left_len``."""

    rank: str
    num_prompt: int
    num_cached: int
    common_len: int
    had_left: int


def miss_cause(before: SessionBefore, found: Found, *, last_rank_is_alive: bool) -> events_pb2.MissCause:
    """Why not the whole of what came before the turn was found in the caches.

    An earlier position counts before a later one: pages that were evicted lie before the first differing token.
    """
    if before.is_new:
        return events_pb2.MISS_CAUSE_FIRST_TURN
    if before.is_fork:
        return events_pb2.MISS_CAUSE_FORKED
    if before.last_rank and before.last_rank != found.rank:
        return events_pb2.MISS_CAUSE_MOVED if last_rank_is_alive else events_pb2.MISS_CAUSE_RANK_LOST
    if not found.had_left:  # a session that only recorded so far, or one that the rank has forgotten
        return events_pb2.MISS_CAUSE_EVICTED if before.last_rank else events_pb2.MISS_CAUSE_FIRST_TURN
    is_continued = found.common_len == min(found.had_left, found.num_prompt)
    usable = min(found.common_len, found.num_prompt - 1)
    if found.common_len < found.had_left:  # of a page that differs further on nothing can be used
        usable -= usable % PAGE_SIZE
    if found.num_cached < usable:
        return events_pb2.MISS_CAUSE_EVICTED
    if is_continued:
        return events_pb2.MISS_CAUSE_NONE
    if before.discarded_from is not None and before.discarded_from <= found.common_len:
        return events_pb2.MISS_CAUSE_CONTEXT_DISCARDED
    if before.is_reencoded:
        return events_pb2.MISS_CAUSE_FINGERPRINT_CHANGED
    return events_pb2.MISS_CAUSE_REASONING_CUT if before.cuts_reasoning else events_pb2.MISS_CAUSE_OTHER


def lease_state(lease: events_pb2.Lease, *, is_lost: bool, now_s: float) -> events_pb2.LeaseState:
    """What has become of a lease; is_lost: the process that gave it is dead, or does not know of it."""
    if lease.outcome == common_pb2.LEASE_OUTCOME_DENIED:
        return events_pb2.LEASE_STATE_UNSPECIFIED
    if now_s >= lease.expires_at.ToNanoseconds() / 1e9:
        return events_pb2.LEASE_STATE_EXPIRED
    return events_pb2.LEASE_STATE_RANK_LOST if is_lost else events_pb2.LEASE_STATE_HELD


def added(totals: session_pb2.SessionTotals, receipt: events_pb2.Receipt) -> session_pb2.SessionTotals:
    """The totals with one receipt more."""
    result = session_pb2.SessionTotals()
    result.CopyFrom(totals)
    result.num_turns += 1
    for name in _COUNTS:
        setattr(result, name, getattr(totals, name) + getattr(receipt, name))
    for name in _TIMES:
        getattr(result, name).CopyFrom(_sum(getattr(totals, name), getattr(receipt, name)))
    result.idle_kv_byte_seconds += receipt.idle_kv_byte_seconds
    return result


def _sum(one: duration_pb2.Duration, other: duration_pb2.Duration) -> duration_pb2.Duration:
    return duration((one.ToTimedelta() + other.ToTimedelta()).total_seconds())
