"""Where a lease is kept, and which copy goes, as tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from seamount.workers.cache.retention import (
    BRING_BACK,
    MAX_EVICTION_AGES,
    MAX_LEASE_S,
    PROGRAM,
    TIERS,
    Candidate,
    Importance,
    LeaseOutcome,
    LeaseRequest,
    Pressure,
    Tier,
    TierRoom,
    decide,
    eviction_key,
    return_rate,
)

ASKED = LeaseRequest(num_tokens=640, num_new_pages=10, duration_s=60.0, importance=Importance.NORMAL)
HOST = TierRoom(tier=Tier.HOST, num_pages=1000, num_leased_pages=0, eviction_age_s=math.inf)
DISK = TierRoom(tier=Tier.DISK, num_pages=4000, num_leased_pages=0, eviction_age_s=math.inf)
CALM = Pressure(
    num_pages=100,
    num_leased_pages=0,
    num_leases=0,
    is_short=False,
    eviction_age_s=math.inf,
    prefill_tokens_per_s=1000.0,
    below=(HOST, DISK),
)
ACCEPTED, CLIPPED, DENIED = LeaseOutcome.ACCEPTED, LeaseOutcome.CLIPPED, LeaseOutcome.DENIED


@pytest.mark.parametrize(
    ("request_changes", "pressure_changes", "outcome", "tier", "duration_s"),
    [
        ({}, {}, ACCEPTED, Tier.DEVICE, 60.0),
        ({}, {"num_leased_pages": 40}, ACCEPTED, Tier.HOST, 60.0),
        ({}, {"is_short": True}, ACCEPTED, Tier.HOST, 60.0),
        ({}, {"eviction_age_s": 5.0}, ACCEPTED, Tier.HOST, 60.0),
        ({}, {"is_short": True, "below": (replace(HOST, num_leased_pages=490), DISK)}, ACCEPTED, Tier.DISK, 60.0),
        ({}, {"is_short": True, "below": (replace(HOST, eviction_age_s=1.0), DISK)}, ACCEPTED, Tier.DISK, 60.0),
        ({}, {"is_short": True, "below": ()}, DENIED, None, 0.0),
        # Nobody can for the whole time: the one that can for the longest.
        (
            {"duration_s": 3600.0},
            {"below": (replace(HOST, num_leased_pages=240),)},
            CLIPPED,
            Tier.DEVICE,
            0.8 * MAX_LEASE_S,
        ),
        (
            {"duration_s": 3600.0},
            {"eviction_age_s": 10.0, "below": (replace(HOST, num_leased_pages=240),)},
            CLIPPED,
            Tier.HOST,
            MAX_LEASE_S / 2,
        ),
        (
            {"duration_s": 3600.0},
            {"eviction_age_s": 10.0, "below": (replace(HOST, eviction_age_s=9.0),)},
            CLIPPED,
            Tier.DEVICE,
            10.0 * MAX_EVICTION_AGES,
        ),
        # What is in force stays where it is, for as long as it is.
        ({"held_s": 12.0, "held_in": Tier.HOST}, {"is_short": True, "below": ()}, CLIPPED, Tier.HOST, 12.0),
        ({"held_s": 90.0, "held_in": Tier.DISK}, {"is_short": True, "below": ()}, ACCEPTED, Tier.DISK, 60.0),
    ],
)
def test_the_first_tier_with_room_keeps_the_lease(
    request_changes: dict[str, object],
    pressure_changes: dict[str, object],
    outcome: LeaseOutcome,
    tier: Tier | None,
    duration_s: float,
) -> None:
    decision = decide(replace(ASKED, **request_changes), replace(CALM, **pressure_changes))  # type: ignore[arg-type]
    assert (decision.outcome, decision.tier) == (outcome, tier)
    assert decision.duration_s == pytest.approx(duration_s)


def page(
    tier: Tier, copy: Tier | None, *, leased: bool = False, superseded: bool = False, idle_s: float = 10.0
) -> Candidate:
    return Candidate(
        first=640,
        end=704,
        waits=(PROGRAM,),
        is_superseded=superseded,
        idle_s=idle_s,
        tier=tier,
        copy=copy,
        is_leased=leased,
    )


@pytest.mark.parametrize(
    ("first", "then"),
    [
        # The device gives up what has a copy before what has none, and what is in host memory before what is on disk.
        (page(Tier.DEVICE, Tier.HOST), page(Tier.DEVICE, Tier.DISK)),
        (page(Tier.DEVICE, Tier.DISK), page(Tier.DEVICE, None)),
        (page(Tier.DEVICE, Tier.DISK, idle_s=0.0), page(Tier.DEVICE, None, idle_s=12.0)),
        # Host memory gives up what the device uses, then what is on disk, then the last copy.
        (page(Tier.HOST, Tier.DEVICE), page(Tier.HOST, Tier.DISK)),
        (page(Tier.HOST, Tier.DISK), page(Tier.HOST, None)),
        (page(Tier.DISK, Tier.HOST), page(Tier.DISK, None)),
        # Leases last, superseded pages first, whatever else there is of them.
        (page(Tier.HOST, None), page(Tier.HOST, Tier.DISK, leased=True)),
        (page(Tier.DEVICE, None, superseded=True), page(Tier.DEVICE, Tier.HOST)),
    ],
)
def test_order_of_eviction_by_what_is_left(first: Candidate, then: Candidate) -> None:
    assert eviction_key(first) < eviction_key(then)


def test_a_copy_saves_the_difference_between_the_two_ways_back() -> None:
    assert [BRING_BACK[tier] for tier in TIERS] == sorted(BRING_BACK[tier] for tier in TIERS)
    rate = return_rate((PROGRAM,), 10.0)
    _, saved = eviction_key(page(Tier.HOST, Tier.DISK))
    assert saved == pytest.approx(64 * (BRING_BACK[Tier.DISK] - BRING_BACK[Tier.HOST]) * rate)
    assert eviction_key(page(Tier.HOST, Tier.DEVICE)) == (1, 0.0)
