"""What is kept, as a table: no pages, no clock."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from seamount.workers.cache.retention import (
    HORIZONS_S,
    INDEXER_PARITY_TOKENS,
    MAX_EVICTION_AGES,
    MAX_LEASE_S,
    MAX_LEASES,
    MIN_LEASE_S,
    PERSON,
    PROGRAM,
    Candidate,
    Importance,
    LeaseOutcome,
    LeaseRequest,
    Pressure,
    Tier,
    Wait,
    decide,
    eviction_key,
    person_wait,
    rebuild_cost,
    return_rate,
    tool_wait,
)

ASKED = LeaseRequest(num_tokens=640, num_new_pages=10, duration_s=30.0, importance=Importance.NORMAL)
CALM = Pressure(
    num_pages=1000,
    num_leased_pages=0,
    num_leases=0,
    is_short=False,
    eviction_age_s=math.inf,
    prefill_tokens_per_s=1000.0,
)
ACCEPTED, CLIPPED, DENIED = LeaseOutcome.ACCEPTED, LeaseOutcome.CLIPPED, LeaseOutcome.DENIED

DECISIONS = [
    # request, pressure, outcome, seconds
    ({}, {}, ACCEPTED, 30.0),
    ({"duration_s": 0.2}, {}, ACCEPTED, 0.2),
    ({"duration_s": 3600.0, "num_new_pages": 0}, {}, CLIPPED, MAX_LEASE_S),
    ({"duration_s": 3600.0}, {"num_leased_pages": 240}, CLIPPED, MAX_LEASE_S / 2),
    ({"duration_s": 3600.0}, {"num_leased_pages": 489}, CLIPPED, MAX_LEASE_S / 500),
    ({"duration_s": 3600.0}, {"num_leased_pages": 490}, DENIED, 0.0),
    ({"duration_s": 3600.0, "importance": Importance.LOW}, {"num_leased_pages": 115}, CLIPPED, MAX_LEASE_S / 2),
    ({"duration_s": 30.0, "importance": Importance.LOW}, {"num_leased_pages": 240}, DENIED, 0.0),
    ({"duration_s": 3600.0, "importance": Importance.HIGH}, {"num_leased_pages": 365}, CLIPPED, MAX_LEASE_S / 2),
    ({"num_new_pages": 0}, {"num_leased_pages": 500}, DENIED, 0.0),
    ({"num_tokens": 0, "num_new_pages": 0}, {}, DENIED, 0.0),
    ({}, {"is_short": True}, DENIED, 0.0),
    ({}, {"num_leases": MAX_LEASES - 1}, ACCEPTED, 30.0),
    ({}, {"num_leases": MAX_LEASES}, DENIED, 0.0),
    ({}, {"eviction_age_s": 30.0 / MAX_EVICTION_AGES}, ACCEPTED, 30.0),
    ({}, {"eviction_age_s": 5.0}, CLIPPED, 5.0 * MAX_EVICTION_AGES),
    ({}, {"eviction_age_s": 0.9 / MAX_EVICTION_AGES}, DENIED, 0.0),
    ({"num_new_pages": 500}, {"eviction_age_s": 0.0}, DENIED, 0.0),
    # What is in force is not shortened by asking again for as much or more, and is by asking for less.
    ({"held_s": 12.0}, {"is_short": True}, CLIPPED, 12.0),
    ({"held_s": 0.3}, {"is_short": True}, CLIPPED, 0.3),
    ({"held_s": 50.0}, {"is_short": True}, ACCEPTED, 30.0),
]


@pytest.mark.parametrize(("request_changes", "pressure_changes", "outcome", "duration_s"), DECISIONS)
def test_decisions(
    request_changes: dict[str, object], pressure_changes: dict[str, object], outcome: LeaseOutcome, duration_s: float
) -> None:
    request, pressure = replace(ASKED, **request_changes), replace(CALM, **pressure_changes)  # type: ignore[arg-type]
    decision = decide(request, pressure)
    assert decision.outcome is outcome
    assert decision.duration_s == pytest.approx(duration_s)
    assert decision.tier is (None if outcome is DENIED else Tier.DEVICE)
    assert decision.rebuild_tokens == request.num_tokens


def test_a_clipped_lease_is_worth_having_or_denied() -> None:
    few = replace(ASKED, duration_s=MIN_LEASE_S, num_new_pages=0)
    assert decide(few, replace(CALM, num_leased_pages=499)).outcome is ACCEPTED
    tight = Pressure(
        num_pages=10_000,
        num_leased_pages=4_995,
        num_leases=1,
        is_short=False,
        eviction_age_s=math.inf,
        prefill_tokens_per_s=0.0,
    )
    assert decide(few, tight).outcome is DENIED
    assert decide(few, tight).rebuild_s == 0.0, "not known yet"


def test_rebuilding_takes_longer_the_deeper_the_tokens_lie() -> None:
    assert rebuild_cost(0, 1) == pytest.approx(1.0, abs=1e-4)
    whole = rebuild_cost(0, 2 * INDEXER_PARITY_TOKENS)
    assert whole == pytest.approx(4 * INDEXER_PARITY_TOKENS)
    assert rebuild_cost(0, 1000) + rebuild_cost(1000, 5000) == pytest.approx(rebuild_cost(0, 5000))
    request = replace(ASKED, num_tokens=2 * INDEXER_PARITY_TOKENS)
    assert decide(request, CALM).rebuild_s == pytest.approx(whole / 1000.0)


@pytest.mark.parametrize("idle", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("wait", [PERSON, PROGRAM, tool_wait(60.0)])
def test_the_rate_of_return_is_that_of_waits_drawn_at_random(wait: Wait, idle: float) -> None:
    rng, idle_s = random.Random(5), idle * wait.median_s
    draws = [
        math.inf if rng.random() < wait.lost else wait.median_s * math.exp(wait.sigma * rng.gauss(0.0, 1.0))
        for _ in range(100_000)
    ]
    left = [draw - idle_s for draw in draws if draw > idle_s]
    rates = [
        sum(one < horizon_s for one in left) / sum(min(one, horizon_s) for one in left) for horizon_s in HORIZONS_S
    ]
    assert return_rate((wait,), idle_s) == pytest.approx(max(rates), rel=0.08)


def test_nine_of_ten_waits_for_a_tool_are_as_expected() -> None:
    rng, wait = random.Random(6), tool_wait(30.0)
    draws = [wait.median_s * math.exp(wait.sigma * rng.gauss(0.0, 1.0)) for _ in range(50_000)]
    assert sum(draw < 30.0 for draw in draws) / len(draws) == pytest.approx(0.9, abs=0.01)


def test_persons_who_came_back_before_come_back_again() -> None:
    """Of sessions with n requests at least, those with more: from the published quantiles (1 at p50, 18, 137)."""
    share, shares = 1.0, {1: 1.0}
    for number in range(1, 138):
        share *= 1 - person_wait(number).lost
        shares[number + 1] = share
    assert shares[2] == pytest.approx(0.45)
    assert 0.05 < shares[18] < 0.2
    assert 0.003 < shares[137] < 0.03
    assert person_wait(0) == PERSON, "of an unknown session"
    lost = [person_wait(number).lost for number in range(1, 200)]
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("wait", [PERSON, PROGRAM, person_wait(1), tool_wait(0.25), tool_wait(3600.0)])
def test_the_rate_is_finite_at_any_age_and_falls_in_the_end(wait: Wait) -> None:
    rates = [return_rate((wait,), idle_s) for idle_s in (-1.0, 0.0, 1e-9, 1.0, 1e3, 1e6, 1e9)]
    assert all(0 <= rate < 1e3 for rate in rates)
    assert rates[-1] <= rates[-2] < max(rates) / 100
    assert return_rate((wait, wait), 5.0) == pytest.approx(2 * return_rate((wait,), 5.0))


def page(
    first: int = 0,
    num: int = 64,
    *,
    waits: tuple[Wait, ...] = (PROGRAM,),
    superseded: bool = False,
    idle_s: float = 10.0,
) -> Candidate:
    return Candidate(first=first, end=first + num, waits=waits, is_superseded=superseded, idle_s=idle_s)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (page(100_000, superseded=True, idle_s=0.0), page(0, idle_s=1e6)),
        (page(0, idle_s=11.0), page(0, idle_s=10.0)),
        (page(0), page(64)),
        (page(0, num=3, idle_s=0.0), page(0, num=64, idle_s=30.0)),
        (page(0, waits=(PROGRAM,)), page(0, waits=(PROGRAM, PERSON))),
        (page(0, idle_s=60.0), page(INDEXER_PARITY_TOKENS, idle_s=100.0)),
        (page(0, superseded=True, idle_s=11.0), page(0, superseded=True, idle_s=10.0)),
        (page(0, waits=(PERSON,), idle_s=1.0), page(0, waits=(tool_wait(30.0),), idle_s=20.0)),
        (page(0, waits=(tool_wait(600.0),)), page(0, waits=(tool_wait(10.0),))),
        (page(0, waits=(PERSON,), idle_s=3_600.0), page(0, waits=(PERSON,), idle_s=600.0)),
        (page(0, waits=(person_wait(1),), idle_s=60.0), page(0, waits=(person_wait(2),), idle_s=60.0)),
        (page(0, waits=(person_wait(2),), idle_s=600.0), page(0, waits=(person_wait(20),), idle_s=600.0)),
        (page(0, waits=(tool_wait(2.0),), idle_s=900.0), page(0, waits=(tool_wait(900.0),), idle_s=500.0)),
    ],
)
def test_order_of_eviction(first: Candidate, then: Candidate) -> None:
    assert eviction_key(first) < eviction_key(then)
