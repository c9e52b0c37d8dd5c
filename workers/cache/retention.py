"""What a rank keeps between the turns of its sessions. Pure decisions: no pages, no clock, no lock.

A lease is a promise: the pages of a session that waits for the results of its tool calls are not evicted before its
end. ``decide`` says whether one is given, and for how long. ``eviction_key`` orders everything that no lease holds:

    superseded pages first; then the least  rebuild cost x chance of return  goes
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MAX_LEASE_S = 600.0
"""Of one lease, on a rank where nothing is leased. A longer wait is reported again before the lease ends."""
MIN_LEASE_S = 1.0
"""A clipped lease that is shorter is denied: the client then knows."""
MAX_LEASES = 4_096
"""Of one rank: leases of sessions that share pages cost no page each."""
INDEXER_PARITY_TOKENS = 74_000
"""Context length at which scoring it with the indexer costs as much as the rest of a token.

At V3.2's sizes: 2 x 37e9 operations a token against 61 layers x 64 heads x 128 x 2 for each earlier token.
"""
TYPICAL_WAIT_S = 2.5
"""Of T / (T + idle): four of five come back within 4 T, and of programs' requests that is 10 s (arXiv 2506.02634)."""
MAX_EVICTION_AGES = 2.0
"""A lease much longer than unleased pages live here takes more from others than it saves."""


class Importance(Enum):
    """What losing the caches would mean; decides up to which share of the rank's pages leases are given."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


MAX_LEASED_SHARE = {Importance.LOW: 0.25, Importance.NORMAL: 0.5, Importance.HIGH: 0.75}


class LeaseOutcome(Enum):
    ACCEPTED = "accepted"
    CLIPPED = "clipped"
    """Given for a shorter time than asked."""
    DENIED = "denied"


class Tier(Enum):
    """Where leased pages are kept."""

    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """num_tokens: of the session, present here; num_new_pages: that hold them and that no other session's lease holds;
    held_s: what is left of the session's present lease, 0 for none."""

    num_tokens: int
    num_new_pages: int
    duration_s: float
    importance: Importance
    held_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """The rank as the request comes. num_leased_pages, num_leases: of other sessions; is_short: a sequence that runs
    here had to give its pages back and waits for room; eviction_age_s: how long pages that are evicted now have been
    idle, inf while none need be; prefill_tokens_per_s: measured, 0 = not yet."""

    num_pages: int
    num_leased_pages: int
    num_leases: int
    is_short: bool
    eviction_age_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseDecision:
    """tier: None where denied. duration_s: from now, 0 where denied. rebuild_tokens, rebuild_s: what computing the
    session's entries again would take; rebuild_s is 0 where the rank's speed is not known yet."""

    outcome: LeaseOutcome
    tier: Tier | None
    duration_s: float
    rebuild_tokens: int
    rebuild_s: float


def decide(request: LeaseRequest, pressure: Pressure) -> LeaseDecision:
    """Whether a session's pages are kept for it, where, and for how long.

    The longest lease falls with the share s of pages that would be leased:  MAX_LEASE_S x (1 - s / most), with the most
    that the importance allows; nor is it longer than MAX_EVICTION_AGES times what other pages live here. A lease in
    force is never shortened by asking again for at least what is left of it.
    """
    rate = pressure.prefill_tokens_per_s
    rebuild_s = rebuild_cost(0, request.num_tokens) / rate if rate > 0 else 0.0
    kept_s = min(request.held_s, request.duration_s)
    longest_s = max(_longest_s(request, pressure), kept_s)
    duration_s = min(request.duration_s, longest_s)
    is_given = request.num_tokens > 0 and (duration_s == request.duration_s or duration_s >= MIN_LEASE_S or kept_s > 0)
    if not is_given:
        outcome = LeaseOutcome.DENIED
    elif duration_s < request.duration_s:
        outcome = LeaseOutcome.CLIPPED
    else:
        outcome = LeaseOutcome.ACCEPTED
    return LeaseDecision(
        outcome=outcome,
        tier=Tier.DEVICE if is_given else None,
        duration_s=duration_s if is_given else 0.0,
        rebuild_tokens=request.num_tokens,
        rebuild_s=rebuild_s,
    )


def _longest_s(request: LeaseRequest, pressure: Pressure) -> float:
    if pressure.is_short or pressure.num_leases >= MAX_LEASES:
        return 0.0
    share = (pressure.num_leased_pages + request.num_new_pages) / pressure.num_pages
    by_share_s = max(0.0, MAX_LEASE_S * (1 - share / MAX_LEASED_SHARE[request.importance]))
    return min(by_share_s, MAX_EVICTION_AGES * pressure.eviction_age_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A page that could go: nobody uses or leases it, nothing cached lies behind it.

    first, end: the positions whose entries it holds; num_sessions: whose last turn went through it; is_superseded: a
    session brought it, and none that is remembered goes through it any more; idle_s: since it was last used.
    """

    first: int
    end: int
    num_sessions: int
    is_superseded: bool
    idle_s: float


def eviction_key(page: Candidate) -> tuple[bool, float]:
    """The least goes first."""
    value = rebuild_cost(page.first, page.end) * chance_of_return(page.num_sessions, page.idle_s)
    return not page.is_superseded, value


def rebuild_cost(first: int, end: int) -> float:
    """Computing the positions [first, end) again, in tokens at an empty context: each costs 1 + position / parity."""
    return (end - first) * (1 + (first + end) / 2 / INDEXER_PARITY_TOKENS)


def chance_of_return(num_sessions: int, idle_s: float) -> float:
    """That the page is asked for again: waits are heavy-tailed, so p = T / (T + idle) for each session by itself.

    A page that no session went through (of stateless requests) counts as one session's.
    """
    return_of_one = TYPICAL_WAIT_S / (TYPICAL_WAIT_S + max(0.0, idle_s))
    return float(1 - (1 - return_of_one) ** max(1, num_sessions))
