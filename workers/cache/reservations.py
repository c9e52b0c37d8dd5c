"""Reservations: the one door to a rank's pages, from Reserve to Release and for the engine's steps in between.

``LiveReservations`` has keys, epochs, expiry, uses and the lock; ``Holdings`` says who holds which pages of the
``PrefixCache``. More doors behind the same lock: ``uses`` for what touches pages outside it, ``sessions`` for what they
leave between turns, ``tiers`` for whoever moves bytes below the device, ``handover`` for sessions on their way to
another rank.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from seamount.wire.errors import FailedPrecondition, InvalidArgument, OutOfRange, ResourceExhausted
from seamount.wire.hashes import PAGE_SIZE, root_hash
from seamount.wire.limits import MAX_RESERVATION_S, check_range
from seamount.workers.cache.admission import check_span, no_pages, pack_prompt
from seamount.workers.cache.handover import Handover
from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.invariants import check_cache
from seamount.workers.cache.live import LiveReservations
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation, ReservationState, prompt_digest
from seamount.workers.cache.retention import Tier
from seamount.workers.cache.session_door import SessionDoor
from seamount.workers.cache.tier_door import TierDoor
from seamount.workers.cache.uses import Uses


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """Of the device. num_cached: unreferenced pages that hold a prefix; num_leased: those of them that may not go,
    because they have no copy below, and a lease holds them or they wait for their first one; num_superseded: those that
    no session will come back for; num_reservations: with those whose end waits for a use."""

    num_pages: int
    num_free: int
    num_cached: int
    num_leased: int
    num_superseded: int
    num_reservations: int


class Reservations:
    """The caches of one rank behind one lock; used by the gRPC loop, the engine thread and the link threads.

    num_pages, page_size: of the cache planes; fingerprint, layout: of model and planes: part of every page hash.
    num_below: pages of each tier below the device. clock: monotonic seconds. on_abort: called with the id of each
    reservation that a higher epoch, a later attempt or its expiry ended; outside the lock, on the thread that caused
    it; it may be set later.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        fingerprint: str,
        layout: str,
        num_below: Mapping[Tier, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_abort: Callable[[str], None] | None = None,
    ) -> None:
        check_range(num_pages, field="num_pages", low=1, high=1 << 31)
        check_range(page_size, field="page_size", low=1, high=1 << 16)
        self.num_pages, self.page_size = num_pages, page_size
        self._fingerprint, self._layout, self._clock = fingerprint, layout, clock
        cache = PrefixCache(num_pages=num_pages, page_size=page_size, clock=clock, num_below=num_below)
        self._cache, self._holdings = cache, Holdings(cache, clock=clock)
        self._live = LiveReservations(cache, self._holdings, clock=clock)
        self._live.on_abort = on_abort
        self._lock, self._leases = self._live.lock, self._live.leases
        self.tiers = TierDoor(self._lock, cache, self._live.restores)
        self.sessions = SessionDoor(self._live, cache, self.tiers, clock=clock)
        self.uses = Uses(self._live, self._holdings)
        self.handover = Handover(self._live, cache, self._holdings, self.tiers, clock=clock)

    @property
    def on_abort(self) -> Callable[[str], None] | None:
        return self._live.on_abort

    @on_abort.setter
    def on_abort(self, on_abort: Callable[[str], None] | None) -> None:
        self._live.on_abort = on_abort

    # ---- from Reserve to Release

    def reserve(
        self,
        *,
        session_id: str,
        turn_id: str,
        epoch: int,
        attempt: int,
        salt: bytes,
        token_ids: Sequence[int],
        time_to_live_s: float,
        is_spare: bool = False,
        for_session: str = "",
    ) -> Reservation:
        """Pin what is cached of ``token_ids`` and allocate pages for the rest and one token more, or hold nothing.

        Idempotent on {session_id, turn_id, epoch, attempt}: repeated, it renews the expiry and returns the same object,
        whose ``cached_len`` tells what has arrived since. A higher epoch of the session, or a later attempt, uses the
        entries that the reservation before it computed, and ends it, even if there are then too few pages: its writer
        is fenced off in any case. Pages in tiers below are restored while it ``is_restoring``.
        session_id: empty for stateless use: no tail is kept, turn_id must then be unique.
        token_ids: at least one, each in [0, 2^32). is_spare: for work ahead of time: the pages of others are taken only
        where they are superseded or cold, and a live reservation of the session is not ended but comes first.
        for_session: without a session of its own, whose deletion takes the pages away.

        Raises InvalidArgument (token_ids, time_to_live; EXCEEDS_CACHE if the whole pool is too small), Aborted
        (STALE_EPOCH, STALE_ATTEMPT), AlreadyExists (RESERVATION_KEY_REUSED: same key, other tokens), ResourceExhausted
        (NO_PAGES, with ``retry_after_s``).
        """
        check_range(time_to_live_s, field="time_to_live", low=0, high=MAX_RESERVATION_S, low_open=True)
        packed = pack_prompt(token_ids, page_size=self.page_size, num_pages=self.num_pages)
        root = root_hash(salt, self._fingerprint, self._layout)
        key, digest = (session_id, turn_id, epoch, attempt), prompt_digest(root, packed)
        with self._live.changing():
            known = self._live.repeat(key, digest, time_to_live_s)
        if known is not None:
            return known
        reservation = Reservation.of_prompt(  # hashed outside the lock: the engine's step does not wait for it
            packed,
            root=root,
            key=key,
            page_size=self.page_size,
            time_to_live_s=time_to_live_s,
            salt=salt,
            is_spare=is_spare,
            for_session=for_session,
        )
        with self._live.changing():
            known = self._live.repeat(key, reservation.prompt_digest, time_to_live_s)
            if known is None:
                self._admit(reservation, packed)
            return known or reservation

    def get(self, reservation_id: str) -> Reservation:
        """The reservation in force. Raises NotFound (RESERVATION_NOT_FOUND) for one that has ended or never was."""
        with self._lock:
            return self._live.get(reservation_id)

    def renew(self, reservation_id: str, time_to_live_s: float | None = None) -> None:
        """Let it live for ``time_to_live_s`` from now, or for as long as it was made for. Raises NotFound."""
        with self._lock:
            reservation = self._live.get(reservation_id)
            if time_to_live_s is not None:
                check_range(time_to_live_s, field="time_to_live", low=0, high=MAX_RESERVATION_S, low_open=True)
                reservation.time_to_live_s = time_to_live_s
            reservation.expires_at = self._clock() + reservation.time_to_live_s

    def release(self, reservation_id: str, keep_len: int | None = None, *, reuse_len: int | None = None) -> None:
        """End it; idempotent: an unknown or ended one is left alone.

        Entries before ``keep_len`` (None = all that are present) stay cached: full pages in the tree, the partly filled
        last page as the session's tail. Pages beyond that this reservation computed are freed; those that it found
        here, or that others use or lease, stay. With ``keep_len`` the session has come back, and a lease that was given
        before this reservation ends. reuse_len: tokens that the session's next prompt can begin with at the most (None
        = all): pages beyond are the first to be evicted. Raises InvalidArgument if either is negative.
        """
        for name, length in (("keep_len", keep_len), ("reuse_len", reuse_len)):
            if length is not None and length < 0:
                raise InvalidArgument(f"{name} is {length}; it must be at least 0", field=name)
        with self._lock:
            reservation = self._live.by_id.get(reservation_id)
            if reservation is not None:
                if reuse_len is not None and reuse_len < len(reservation.token_ids):
                    reservation.num_reused_pages = reuse_len // self.page_size
                self._live.end(reservation, keep_len)
                if keep_len is not None:
                    self._leases.came_back(reservation)

    def expire(self, now: float | None = None) -> list[str]:
        """End those whose time is over, as ``release`` does, and leases; returns the ids of the reservations after
        ``on_abort`` had each. Sessions whose lease ends soon are restored."""
        with self._live.changing():
            now = self._clock() if now is None else now
            ended = self._live.end_expired(now)
            self.sessions.restore_expected(now)
            self._cache.departures.sweep()
        self.tiers.wake()
        return ended

    # ---- for the engine

    def ensure_capacity(self, reservation_id: str, num_tokens: int) -> bool:
        """Allocate pages so that ``num_tokens`` fit; False, and nothing changed, if too few are left after eviction.

        Raises NotFound, FailedPrecondition (PREEMPTED).
        """
        with self._lock:
            reservation = self._live.get_active(reservation_id)
            return self._holdings.grow(reservation, -(-num_tokens // self.page_size))

    def append_token(self, reservation_id: str, token_id: int) -> None:
        """The sequence grows by one token, whose entry is not present yet. Raises NotFound."""
        with self._lock:
            self._live.get_used(reservation_id).token_ids.append(token_id)

    def advance(self, reservation_id: str, computed_len: int) -> None:
        """Entries of the positions before ``computed_len`` are present; full pages enter the tree. Never goes back.

        Raises NotFound, OutOfRange (beyond the tokens or the pages).
        """
        with self._lock:
            reservation = self._live.get_used(reservation_id)
            limit = min(len(reservation.token_ids), reservation.capacity)
            if computed_len > limit:
                raise OutOfRange(
                    f"computed_len is {computed_len}; the reservation has tokens and pages for {limit}",
                    reason="COMPUTED_LEN_OUT_OF_RANGE",
                )
            self._holdings.advance(reservation, computed_len)
        self.tiers.wake()

    def preempt(self, reservation_id: str) -> bool:
        """Give all its pages back; what is computed stays cached while nobody needs the pages, ``computed_len`` is 0.

        False, and nothing changed, while a receive, step or send uses its pages. Raises NotFound.
        """
        with self._lock:
            reservation = self._live.get(reservation_id)
            if reservation.num_uses:
                return False
            if reservation.state is ReservationState.ACTIVE:
                self._holdings.give_back(reservation, reservation.computed_len)
                reservation.state = ReservationState.PREEMPTED
            return True

    def resume(self, reservation_id: str) -> bool:
        """Pin what is still cached of a preempted sequence and allocate the rest and one token more, or return False.

        ``computed_len`` is then what was found, at most one less than its tokens; it may be restoring. Raises NotFound.
        """
        with self._lock:
            reservation = self._live.get(reservation_id)
            if reservation.state is ReservationState.PREEMPTED:
                if not self._assign(reservation, array("I", reservation.token_ids)):
                    return False
                reservation.state = ReservationState.ACTIVE
            return True

    def slots(self, reservation_id: str, first: int, end: int) -> list[int]:
        """Physical slots of the positions [first, end). Raises NotFound, OutOfRange (beyond its pages)."""
        with self._lock:
            reservation = self._live.get_used(reservation_id)
            check_span(first, end, reservation.capacity)
            return reservation.slots(first, end)

    def page_table(self, reservation_id: str) -> list[int]:
        """Its physical pages in order. Raises NotFound."""
        with self._lock:
            return list(self._live.get_used(reservation_id).pages)

    # ---- views

    def state(self) -> CacheState:
        """Counts at this moment."""
        with self._lock:
            self._cache.first_copies.end_late(self._clock())
            return CacheState(
                num_pages=self.num_pages,
                num_free=self._cache.pool.num_free,
                num_cached=self._cache.pool.num_idle,
                num_leased=self._cache.pool.num_leased_idle,
                num_superseded=self._cache.superseded.num_pages[Tier.DEVICE],
                num_reservations=len(self._live.all()),
            )

    def check_invariants(self) -> None:
        """Raise AssertionError unless each page is free, referenced as often as held, or cached and reachable."""
        with self._lock:
            self._live.check_invariants()
            check_cache(self._cache, self._live.all())

    # ---- with the lock held

    def _admit(self, reservation: Reservation, packed: array[int]) -> None:
        session_id = reservation.session_id
        if reservation.is_spare and self._live.of_session(session_id) is not None:
            raise FailedPrecondition("a turn of the session runs here", reason="TURN_RUNNING")
        if session_id:
            self._live.fences.advance(session_id, reservation.turn_id, reservation.epoch, reservation.attempt)
            self._live.supersede(session_id)
            self._live.end_ahead(session_id, None)  # its own restore takes over
        reservation.is_leased = self._leases.is_held(session_id, self._clock())
        self._holdings.compare(reservation, packed, self._clock())
        if not self._assign(reservation, packed):
            if not reservation.is_spare:
                self._holdings.expect(session_id)
            raise self._no_pages(len(packed) // self.page_size + 1)
        reservation.cached_len_at_first = reservation.cached_len
        self._live.add(reservation)
        self._holdings.begin(reservation)

    def _assign(self, reservation: Reservation, token_ids: array[int]) -> bool:
        is_assigned = self._live.assign(reservation, token_ids)
        if is_assigned:
            self.tiers.wake()
        return is_assigned

    def _no_pages(self, num_needed: int) -> ResourceExhausted:
        now = self._clock()
        if self._cache.first_copies.is_waiting:
            return no_pages(self._cache.pool, num_needed, 0.0)
        ends = [reservation.expires_at for reservation in self._live.by_id.values()]
        ends += [lease.expires_at for lease in self._cache.sessions.leases.values()]
        return no_pages(self._cache.pool, num_needed, min(ends, default=now) - now)
