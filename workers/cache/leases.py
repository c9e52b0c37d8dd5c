"""Leases of one rank: what ``retention.decide`` answers, put into force and ended."""

from __future__ import annotations

import math

from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.retention import (
    Importance,
    LeaseDecision,
    LeaseRequest,
    Pressure,
    Tier,
    TierRoom,
    decide,
)
from seamount.workers.cache.sessions import Lease


class Leases:
    """Not thread-safe: its owner holds the lock. Times are seconds of the owner's clock."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def retain(
        self,
        session_id: str,
        live: Reservation | None,
        *,
        duration_s: float,
        importance: Importance,
        is_short: bool,
        prefill_tokens_per_s: float,
        now: float,
    ) -> LeaseDecision:
        """Decide, and where a lease is given, let it take the place of the session's present one. What it waits for is
        noted in any case: pages without a lease go in the order of their return.

        live: the session's reservation in force: the lease then holds what that one leaves.
        """
        cache, pool, sessions = self._cache, self._cache.pool, self._cache.sessions
        record, present = sessions.get(session_id), sessions.leases.get(session_id)
        if record is not None:
            record.wait_for_tools(duration_s)
        nodes, num_pages, num_tokens = list[PageNode](), 0, 0
        if live is not None:
            nodes, num_pages, num_tokens = [*live.nodes, *live.to_restore], len(live.pages), live.present_len
        elif record is not None:
            nodes, tail = cache.leases.left(record)
            num_pages = len(nodes) + (tail is not None)
            num_tokens = min(num_pages * cache.page_size, len(record.left))
        own = set(present.nodes) if present is not None else set[PageNode]()
        num_others = sum(1 for node in nodes if node.num_leases > (node in own))
        by_others = cache.leases.num_pages.copy()
        if present is not None:
            by_others.subtract(_tier(node) for node in own if node.num_leases == 1)
            by_others[present.tier] -= present.num_tail_pages
        decision = decide(
            LeaseRequest(
                num_tokens=num_tokens,
                num_new_pages=num_pages - num_others,
                duration_s=duration_s,
                importance=importance,
                held_s=max(0.0, present.expires_at - now) if present is not None else 0.0,
                held_in=present.tier if present is not None else Tier.DEVICE,
            ),
            Pressure(
                num_pages=pool.num_pages,
                num_leased_pages=by_others[Tier.DEVICE],
                num_leases=len(sessions.leases) - (present is not None),
                is_short=is_short or pool.num_available == 0,
                eviction_age_s=cache.eviction.age_s(now),
                prefill_tokens_per_s=prefill_tokens_per_s,
                below=tuple(
                    TierRoom(
                        tier=tier,
                        num_pages=max(1, lower.num_pages),
                        num_leased_pages=by_others[tier],
                        eviction_age_s=math.inf if lower.num_free else lower.age.at(now),
                    )
                    for tier, lower in cache.copies.tiers.items()
                ),
            ),
        )
        if decision.tier is not None:
            given_during = live.id if live is not None else None
            expires_at = now + decision.duration_s
            cache.leases.give(
                session_id,
                Lease(expires_at=expires_at, max_pages=num_pages, given_during=given_during, tier=decision.tier),
            )
        return decision

    def is_held(self, session_id: str, now: float) -> bool:
        lease = self._cache.sessions.leases.get(session_id)
        return lease is not None and now < lease.expires_at

    def came_back(self, reservation: Reservation) -> None:
        """A turn of the session is committed: the lease that waited for it has done its work."""
        lease = self._cache.sessions.leases.get(reservation.session_id)
        if lease is not None and lease.given_during != reservation.id:
            self._cache.leases.end(reservation.session_id)

    def ending(self, until: float) -> list[str]:
        """Sessions whose lease ends by then."""
        return [name for name, lease in self._cache.sessions.leases.items() if lease.expires_at <= until]

    def end_expired(self, now: float) -> None:
        expired = [name for name, lease in self._cache.sessions.leases.items() if lease.expires_at <= now]
        for session_id in expired:
            self._cache.leases.end(session_id)
        if expired:
            self._cache.trim()


def _tier(node: PageNode) -> Tier:
    assert node.leased_in is not None, "a leased page is leased nowhere"
    return node.leased_in
