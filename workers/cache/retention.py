"""What a rank keeps between the turns of its sessions, and in which tier. Pure decisions: no pages, no clock, no lock.

A lease is a promise: the pages of a session that waits for the results of its tool calls are not dropped before its
end; they may move down a tier. ``decide`` says whether one is given, where, and for how long. ``eviction_key`` orders
the pages of each tier:

    superseded pages first; then the least  cost without this copy - cost with it  x  rate of return  goes
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Where a page is kept."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


TIERS = tuple(Tier)
"""From the fastest on."""
BELOW = TIERS[1:]
"""Those below the device."""
BRING_BACK = {Tier.DEVICE: 0.0, Tier.HOST: 0.01, Tier.DISK: 0.1}
"""Cost of a token's entries from a tier, in tokens computed at an empty context.

At V3.2's sizes: 61 layers x 788 bytes over some 50 GB/s and 5 GB/s, against 8,000 tokens prefilled a second.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """num_tokens: of the session, present here; num_new_pages: that hold them and that no other session's lease holds;
    held_s, held_in: what is left of the session's present lease, 0 for none, and its tier."""

    num_tokens: int
    num_new_pages: int
    duration_s: float
    importance: Importance
    held_s: float = 0.0
    held_in: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRoom:
    """A tier below the device. num_leased_pages: of other sessions; eviction_age_s: as of ``Pressure``."""

    tier: Tier
    num_pages: int
    num_leased_pages: int
    eviction_age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """The rank as the request comes. num_leased_pages, num_leases: of other sessions; is_short: a sequence that runs
    here had to give its pages back and waits for room; eviction_age_s: how long pages that are evicted now have been
    idle, inf while none need be; prefill_tokens_per_s: measured, 0 = not yet; below: the tiers that there are, from the
    fastest on."""

    num_pages: int
    num_leased_pages: int
    num_leases: int
    is_short: bool
    eviction_age_s: float
    prefill_tokens_per_s: float
    below: tuple[TierRoom, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseDecision:
    """tier: None where denied. duration_s: from now, 0 where denied. rebuild_tokens, rebuild_s: what computing the
    session's entries again would take; rebuild_s is 0 where the rank's speed is not known yet."""

    outcome: LeaseOutcome
    tier: Tier | None
    duration_s: float
    rebuild_tokens: int
    rebuild_s: float


DENIED = LeaseDecision(outcome=LeaseOutcome.DENIED, tier=None, duration_s=0.0, rebuild_tokens=0, rebuild_s=0.0)
"""To whoever asks for a session that has gone on: there is nothing to keep for what it waited for."""


def decide(request: LeaseRequest, pressure: Pressure) -> LeaseDecision:
    """Whether a session's pages are kept for it, where, and for how long.

    The longest lease of a tier falls with the share s of its pages that would be leased:  MAX_LEASE_S x (1 - s / most),
    with the most that the importance allows; nor is it longer than MAX_EVICTION_AGES times what other pages live there.
    The first tier that can keep the pages for the whole time does, else the one that can for the longest. A lease in
    force is never shortened by asking again for at least what is left of it.
    """
    rate = pressure.prefill_tokens_per_s
    rebuild_s = rebuild_cost(0, request.num_tokens) / rate if rate > 0 else 0.0
    kept_s = min(request.held_s, request.duration_s)
    longest_s = {tier: min(request.duration_s, s) for tier, s in _longest_s(request, pressure).items()}
    longest_s[request.held_in] = max(longest_s.get(request.held_in, 0.0), kept_s)
    tier = max(longest_s, key=lambda one: longest_s[one])  # the first of equals
    duration_s = longest_s[tier]
    is_given = request.num_tokens > 0 and (duration_s == request.duration_s or duration_s >= MIN_LEASE_S or kept_s > 0)
    if not is_given:
        outcome = LeaseOutcome.DENIED
    elif duration_s < request.duration_s:
        outcome = LeaseOutcome.CLIPPED
    else:
        outcome = LeaseOutcome.ACCEPTED
    return LeaseDecision(
        outcome=outcome,
        tier=tier if is_given else None,
        duration_s=duration_s if is_given else 0.0,
        rebuild_tokens=request.num_tokens,
        rebuild_s=rebuild_s,
    )


def _longest_s(request: LeaseRequest, pressure: Pressure) -> dict[Tier, float]:
    if pressure.num_leases >= MAX_LEASES:
        return {Tier.DEVICE: 0.0}
    device = TierRoom(
        tier=Tier.DEVICE,
        num_pages=pressure.num_pages,
        num_leased_pages=pressure.num_leased_pages,
        eviction_age_s=pressure.eviction_age_s,
    )
    longest_s = {room.tier: _longest_in(room, request) for room in (device, *pressure.below)}
    return longest_s | ({Tier.DEVICE: 0.0} if pressure.is_short else {})


def _longest_in(room: TierRoom, request: LeaseRequest) -> float:
    share = (room.num_leased_pages + request.num_new_pages) / room.num_pages
    by_share_s = max(0.0, MAX_LEASE_S * (1 - share / MAX_LEASED_SHARE[request.importance]))
    return min(by_share_s, MAX_EVICTION_AGES * room.eviction_age_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A page that could go from a tier, or come to it: nothing behind it is in that tier.

    first, end: the positions whose entries it holds; waits: of the sessions whose last turn went through it, how long
    they stay away; is_superseded: a session brought it, and no turn that is remembered, or is to come, goes through it
    any more; idle_s: since it was last used; tier: which copy could go; copy: the fastest one that would be left, None
    for none; is_leased: a lease keeps it in this tier, or in one above.
    """

    first: int
    end: int
    waits: tuple[Wait, ...]
    is_superseded: bool
    idle_s: float
    tier: Tier = Tier.DEVICE
    copy: Tier | None = None
    is_leased: bool = False


def eviction_key(page: Candidate) -> tuple[int, float]:
    """The least goes first, and a page is copied into a full tier if the least there is less than it.

    (0 superseded, 1, 2 leased; what the copy saves, in tokens computed at an empty context, x rate of return).
    """
    num_tokens = page.end - page.first
    without = rebuild_cost(page.first, page.end) if page.copy is None else BRING_BACK[page.copy] * num_tokens
    saved = max(0.0, without - BRING_BACK[page.tier] * num_tokens)
    order = 2 if page.is_leased else 0 if page.is_superseded else 1
    return order, saved * return_rate(page.waits, page.idle_s)


def rebuild_cost(first: int, end: int) -> float:
    """Computing the positions [first, end) again, in tokens at an empty context: each costs 1 + position / parity."""
    return (end - first) * (1 + (first + end) / 2 / INDEXER_PARITY_TOKENS)


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a session stays away: log-normal, or for ever. sigma: of the logarithm; lost: share of the latter."""

    median_s: float
    sigma: float
    lost: float


PERSON = Wait(600.0, 1.6, 0.1)
"""Until a person's next message, of a session that nothing is known of: two of three take over 5 minutes, as coding
agents do; one of ten requests is a session's last (arXiv 2606.30560)."""
ONE_REQUEST_SHARE = 0.55
MAX_COUNTED_REQUESTS = 64
PROGRAM = Wait(2.5, 1.65, 0.01)
"""Until a program's next request, of a page that no session went through: 80% come within 10 s (arXiv 2506.02634)."""
REFUSED = Wait(2.0, 1.0, 0.01)
"""Until a turn that found no pages comes again: refusals name up to two seconds."""
TOOL_SIGMA = 1.2
TOOL_LOST = 0.01
HORIZONS_S = tuple(4.0**power for power in range(9))


@functools.cache
def person_wait(num_requests: int) -> Wait:
    """Until a person's next message, after so many of the session: 0 where they are not known.

    Over half of the sessions have one request, one of ten has 18, one of a hundred 137 (arXiv 2606.30560): who came
    back before comes back again, and  1 / (n + 5)  of the requests n = 2, 3, ... are a session's last.
    """
    if num_requests == 0:
        return PERSON
    lost = ONE_REQUEST_SHARE if num_requests == 1 else 1 / (min(num_requests, MAX_COUNTED_REQUESTS) + 5)
    return replace(PERSON, lost=lost)


def tool_wait(expected_s: float) -> Wait:
    """expected_s: nine of ten waits are shorter."""
    return Wait(expected_s / math.exp(1.2816 * TOOL_SIGMA), TOOL_SIGMA, TOOL_LOST)


def return_rate(waits: Sequence[Wait], idle_s: float) -> float:
    """Returns a second that keeping a page would see, given that its sessions, idle for ``idle_s``, are not back yet.

    For each session the best over horizons h of  P(T < t + h | T > t) / E[min(T - t, h) | T > t],  the hits that
    keeping it for at most h gives for each second that it takes room (Beckmann et al., "LHD", NSDI 2018). Sessions add
    up.
    """
    rounded_s = round(max(0.01, idle_s), 2)  # pages that were left together are looked up, not computed anew
    return sum(_return_rate(wait, rounded_s) for wait in waits)


@functools.lru_cache(maxsize=4_096)
def _return_rate(wait: Wait, idle_s: float) -> float:
    before, held_s, best = share_back(wait, idle_s), mean_up_to(wait, idle_s), 0.0
    for horizon_s in HORIZONS_S:
        back = share_back(wait, idle_s + horizon_s) - before
        best = max(best, back / (mean_up_to(wait, idle_s + horizon_s) - held_s))
    return best


def share_back(wait: Wait, limit_s: float) -> float:
    """P(T < limit)."""
    return (1 - wait.lost) * _normal(math.log(limit_s / wait.median_s) / wait.sigma)


def mean_up_to(wait: Wait, limit_s: float) -> float:
    """E[min(T, limit)]."""
    z = math.log(limit_s / wait.median_s) / wait.sigma
    known_s = wait.median_s * math.exp(wait.sigma**2 / 2) * _normal(z - wait.sigma) + limit_s * _normal(-z)
    return (1 - wait.lost) * known_s + wait.lost * limit_s


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
