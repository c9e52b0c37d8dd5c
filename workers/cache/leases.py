"""Leases of one rank: what ``retention.decide`` answers, put into force and ended."""

from __future__ import annotations

from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.retention import Importance, LeaseDecision, LeaseOutcome, LeaseRequest, Pressure, decide
from seamount.workers.cache.sessions import Lease


class Leases:
    """Not thread-safe: its owner holds the lock. Times are seconds of the owner's clock."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

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
        """Decide, and where a lease is given, let it take the place of the session's present one.

        live: the session's reservation in force: the lease then holds what that one leaves.
        """
        pool, sessions = self._holdings.pool, self._holdings.sessions
        record, present = sessions.get(session_id), sessions.leases.get(session_id)
        own = set(present.pages) if present is not None else set[int]()
        pages, num_tokens = list[int](), 0
        if live is not None:
            pages, num_tokens = live.pages, live.computed_len
        elif record is not None:
            pages = self._holdings.left_pages(record)
            num_tokens = min(len(pages) * self._holdings.page_size, len(record.left))
        num_own_alone = sum(1 for page in own if pool.num_leases(page) == 1)
        leased_by_others = [page for page in pages if pool.num_leases(page) > (page in own)]
        decision = decide(
            LeaseRequest(
                num_tokens=num_tokens,
                num_new_pages=len(pages) - len(leased_by_others),
                duration_s=duration_s,
                importance=importance,
                held_s=max(0.0, present.expires_at - now) if present is not None else 0.0,
            ),
            Pressure(
                num_pages=pool.num_pages,
                num_leased_pages=pool.num_leased - num_own_alone,
                num_leases=len(sessions.leases) - (present is not None),
                is_short=is_short or pool.num_available == 0,
                eviction_age_s=self._holdings.eviction_age_s(now),
                prefill_tokens_per_s=prefill_tokens_per_s,
            ),
        )
        if decision.outcome is not LeaseOutcome.DENIED:
            given_during = live.id if live is not None else None
            expires_at = now + decision.duration_s
            self._holdings.lease(
                session_id, Lease(expires_at=expires_at, max_pages=len(pages), given_during=given_during)
            )
        return decision

    def is_held(self, session_id: str, now: float) -> bool:
        lease = self._holdings.sessions.leases.get(session_id)
        return lease is not None and now < lease.expires_at

    def came_back(self, reservation: Reservation) -> None:
        """A turn of the session is committed: the lease that waited for it has done its work."""
        lease = self._holdings.sessions.leases.get(reservation.session_id)
        if lease is not None and lease.given_during != reservation.id:
            self._holdings.end_lease(reservation.session_id)

    def end_expired(self, now: float) -> None:
        expired = [name for name, lease in self._holdings.sessions.leases.items() if lease.expires_at <= now]
        for session_id in expired:
            self._holdings.end_lease(session_id)
        if expired:
            self._holdings.trim()
