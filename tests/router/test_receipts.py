"""Why a turn had to compute what was said before, and what a session's receipts add up to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seamount.router.receipts import Found, SessionBefore, added, lease_state, miss_cause
from seamount.v1 import common_pb2, events_pb2, session_pb2

GROWN = SessionBefore(is_new=False, is_fork=False, last_rank="d0", is_reencoded=False, cuts_reasoning=False)
ALL = Found(rank="d0", num_prompt=120, num_cached=100, common_len=100, had_left=100)

CASES = {
    "FIRST_TURN": (replace(GROWN, is_new=True, last_rank=""), replace(ALL, num_cached=0, common_len=0, had_left=0)),
    "NONE": (GROWN, ALL),
    "NONE, the last prompt token is always computed": (GROWN, replace(ALL, num_prompt=100, num_cached=99)),
    "NONE, rewound": (GROWN, replace(ALL, num_prompt=60, num_cached=59, common_len=60)),
    "REASONING_CUT": (replace(GROWN, cuts_reasoning=True), replace(ALL, num_cached=64, common_len=70)),
    "REASONING_CUT, within the first page": (
        replace(GROWN, cuts_reasoning=True),
        replace(ALL, num_cached=0, common_len=40),
    ),
    "FINGERPRINT_CHANGED": (
        replace(GROWN, cuts_reasoning=True, is_reencoded=True),
        replace(ALL, num_cached=40, common_len=40),
    ),
    "CONTEXT_DISCARDED": (
        replace(GROWN, cuts_reasoning=True, discarded_from=40),
        replace(ALL, num_cached=40, common_len=40),
    ),
    "REASONING_CUT, before what is discarded": (
        replace(GROWN, cuts_reasoning=True, discarded_from=80),
        replace(ALL, num_cached=64, common_len=70),
    ),
    "OTHER": (GROWN, replace(ALL, num_cached=99, common_len=99)),
    "EVICTED": (GROWN, replace(ALL, num_cached=64)),
    "EVICTED, before the cut": (replace(GROWN, cuts_reasoning=True), replace(ALL, num_cached=0, common_len=70)),
    "EVICTED, forgotten": (GROWN, replace(ALL, num_cached=0, common_len=0, had_left=0)),
    "FIRST_TURN, after turns that only recorded": (
        replace(GROWN, last_rank=""),
        replace(ALL, num_cached=0, common_len=0, had_left=0),
    ),
    "FORKED": (replace(GROWN, is_fork=True), replace(ALL, num_cached=64, common_len=0, had_left=0)),
    "RANK_LOST": (GROWN, replace(ALL, rank="d1", num_cached=0, common_len=0, had_left=0)),
    "MOVED": (GROWN, replace(ALL, rank="d1", num_cached=0, common_len=0, had_left=0)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_miss_has_its_cause(name: str) -> None:
    before, found = CASES[name]
    cause = miss_cause(before, found, last_rank_is_alive=name.startswith("MOVED"))
    assert events_pb2.MissCause.Name(cause) == f"MISS_CAUSE_{name.partition(',')[0]}"


@pytest.mark.parametrize(
    ("outcome", "is_lost", "now_s", "state"),
    [
        ("ACCEPTED", False, 99.0, "HELD"),
        ("CLIPPED", False, 99.0, "HELD"),
        ("ACCEPTED", False, 100.0, "EXPIRED"),
        ("ACCEPTED", True, 99.0, "RANK_LOST"),
        ("ACCEPTED", True, 100.0, "EXPIRED"),  # the death took nothing away that was promised
        ("DENIED", True, 99.0, "UNSPECIFIED"),
    ],
)
def test_what_became_of_a_lease(outcome: str, is_lost: bool, now_s: float, state: str) -> None:
    lease = events_pb2.Lease(outcome=common_pb2.LeaseOutcome.Value(f"LEASE_OUTCOME_{outcome}"))
    lease.expires_at.FromSeconds(100)
    assert events_pb2.LeaseState.Name(lease_state(lease, is_lost=is_lost, now_s=now_s)) == f"LEASE_STATE_{state}"


def test_totals_are_sums() -> None:
    receipt = events_pb2.Receipt(
        num_prompt_tokens=10, num_cached_tokens=4, num_output_tokens=3, num_retries=1, idle_kv_byte_seconds=2.5
    )
    receipt.decode_time.FromMilliseconds(1500)
    totals = session_pb2.SessionTotals()
    for _ in range(3):
        totals = added(totals, receipt)
    assert (totals.num_turns, totals.num_prompt_tokens, totals.num_cached_tokens) == (3, 30, 12)
    assert (totals.num_output_tokens, totals.num_retries, totals.num_pulled_tokens) == (9, 3, 0)
    assert totals.decode_time.ToMilliseconds() == 4500
    assert totals.idle_kv_byte_seconds == 7.5
