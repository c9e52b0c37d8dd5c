"""Sessions as a rank sees them between their turns: what they left is leased, brought up ahead of their return, or
deleted."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable
from itertools import islice

from seamount.wire.limits import MAX_RESERVATION_S, MAX_TOOL_WAIT_S, check_range
from seamount.workers.cache.live import LiveReservations
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation, ReservationState, ahead_key
from seamount.workers.cache.retention import DENIED, Importance, LeaseDecision
from seamount.workers.cache.tier_door import TierDoor

AHEAD_S = 2.0
"""Before a lease ends its pages are brought up: its end is when the session is expected."""
AHEAD_SHARE = 0.5
"""Of the pages that are available: more are not taken ahead of need."""


class SessionDoor:
    """Made by ``Reservations``, whose lock it takes; calls may come from any thread. clock: monotonic seconds."""

    def __init__(
        self, live: LiveReservations, cache: PrefixCache, tiers: TierDoor, *, clock: Callable[[], float]
    ) -> None:
        self._live, self._cache, self._tiers, self._clock = live, cache, tiers, clock

    def retain(
        self,
        session_id: str,
        *,
        duration_s: float,
        importance: Importance,
        prefill_tokens_per_s: float,
        epoch: int | None = None,
    ) -> LeaseDecision:
        """Lease the pages of what a session left here, or is about to leave, as ``retention.decide`` says.

        Until the lease ends nobody else gets these pages, at the price of refusing others (NO_PAGES). It ends with its
        time, with the session's next commit, or with another one in its place; a denied request leaves it alone.
        duration_s: over 0, at most MAX_TOOL_WAIT_S; epoch: of the turn that it is asked for: denied where a later one
        has come, which nobody would end the lease after. Raises InvalidArgument.
        """
        check_range(duration_s, field="duration", low=0, low_open=True, high=MAX_TOOL_WAIT_S)
        with self._live.lock:
            now = self._clock()
            self._live.leases.end_expired(now)
            if epoch is not None and self._live.fences.seen(session_id) > epoch:
                return DENIED
            return self._live.leases.retain(
                session_id,
                self._live.of_session(session_id),
                duration_s=duration_s,
                importance=importance,
                is_short=any(r.state is ReservationState.PREEMPTED for r in self._live.by_id.values()),
                prefill_tokens_per_s=prefill_tokens_per_s,
                now=now,
            )

    def restore_ahead(self, session_id: str) -> bool:
        """Bring what the session left here up to the device, because it is about to come back.

        Whether anything is on its way: not where the session is at work, or most pages that are available would go.
        """
        with self._live.lock:
            reservation = self._ahead(session_id)
            if reservation is None or not self._live.assign(reservation, array("I", reservation.token_ids)):
                return False
            self._tiers.wake()
            self._live.add(reservation)
            if not reservation.is_restoring:
                self._live.end(reservation, None)
            return True

    def restore_expected(self, now: float) -> None:
        """Bring up what leases keep that end soon: their sessions are expected."""
        with self._live.lock:
            for session_id in self._live.leases.ending(now + AHEAD_S):
                self.restore_ahead(session_id)

    def delete(self, session_id: str, epoch: int) -> None:
        """The session is no more: its turn here ends, its writers up to ``epoch`` are fenced off, and its pages go from
        every tier, as soon as nobody uses them; those that other sessions' last turns went through stay.

        Idempotent, and harmless for a session that is not known here. Nothing happens where a later epoch has been
        seen: the session was made anew under its old id.
        """
        with self._live.changing():
            if self._live.fences.seen(session_id) > epoch + 1:
                return
            self._live.fences.close(session_id, epoch)
            self._live.end_ahead(session_id, 0)
            self._live.delete_session(session_id)
            self._cache.departures.delete(session_id)
            self._cache.departures.sweep()
        self._tiers.wake()

    def cached(self, limit: int | None = None) -> list[str]:
        """Sessions with a live reservation or cached pages of their own here, the most recent ones first; at most
        ``limit`` of them."""
        with self._live.lock:
            return list(islice(self._cache.sessions.cached_sessions(), limit))

    def _ahead(self, session_id: str) -> Reservation | None:
        record = self._cache.sessions.get(session_id)
        key = ahead_key(session_id)
        if record is None or record.live_id is not None or self._live.by_key(key) is not None:
            return None
        nodes, _ = self._cache.leases.left(record)
        num_below = sum(1 for node in nodes if node.page is None)
        if not 0 < num_below <= AHEAD_SHARE * self._cache.pool.num_available:
            return None
        return Reservation(
            id=secrets.token_hex(16),
            session_id=key[0],
            turn_id=key[1],
            epoch=key[2],
            attempt=key[3],
            root=record.left_root,
            token_ids=[*record.left[: len(nodes) * self._cache.page_size], 0],  # the last token is never restored
            prompt_len=len(nodes) * self._cache.page_size + 1,
            prompt_digest=b"",
            digests=[node.digest for node in nodes],
            page_size=self._cache.page_size,
            time_to_live_s=MAX_RESERVATION_S,
            is_ahead=True,
        )
