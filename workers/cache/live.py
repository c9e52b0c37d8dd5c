"""The reservations of one rank that hold or wait for pages: their keys, epochs, expiry, uses and end.

A reservation that ends while a receive, a step or a send still touches its pages keeps them until the last of those
uses is over, so that a late write never hits a reused page.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seamount.wire.errors import AlreadyExists, FailedPrecondition, NotFound
from seamount.workers.cache.admission import EpochFences
from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.leases import Leases
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation, ReservationKey, ReservationState, ahead_key
from seamount.workers.cache.restores import Restores


class LiveReservations:
    """Its callers hold ``lock``, or are inside ``changing``.

    by_id: those in force; ending: those that wait for the end of a use. on_abort: called with the id of each
    reservation that a higher epoch, a later attempt or its expiry ended.
    """

    def __init__(self, cache: PrefixCache, holdings: Holdings, *, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.on_abort: Callable[[str], None] | None = None
        self.by_id: dict[str, Reservation] = {}
        self.ending: dict[str, Reservation] = {}
        self.leases = Leases(cache)
        self.fences = EpochFences()
        self.restores = Restores(cache, holdings, on_end=self._end_restore)
        self._cache, self._holdings, self._clock = cache, holdings, clock
        self._by_key: dict[ReservationKey, Reservation] = {}
        self._aborted: list[str] = []

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The lock; ``on_abort`` hears of those that were ended once it is given back, on this thread."""
        aborted: list[str] = []
        try:
            with self.lock:
                try:
                    yield
                finally:
                    aborted, self._aborted = self._aborted, []
        finally:
            if self.on_abort is not None:
                for reservation_id in aborted:
                    self.on_abort(reservation_id)

    # ---- looking up

    def get(self, reservation_id: str) -> Reservation:
        """The one in force. Raises NotFound (RESERVATION_NOT_FOUND)."""
        reservation = self.by_id.get(reservation_id)
        if reservation is None:
            raise NotFound(
                f"reservation {reservation_id} has ended or never was; reserve again",
                reason="RESERVATION_NOT_FOUND",
                metadata={"reservation_id": reservation_id},
            )
        return reservation

    def get_used(self, reservation_id: str) -> Reservation:
        """Also one whose end waits for a use: whoever uses it may finish what it does."""
        ending = self.ending.get(reservation_id)
        return ending if ending is not None else self.get(reservation_id)

    def get_active(self, reservation_id: str) -> Reservation:
        """Raises FailedPrecondition (PREEMPTED) as well."""
        reservation = self.get(reservation_id)
        if reservation.state is not ReservationState.ACTIVE:
            raise FailedPrecondition("the reservation is preempted; resume it first", reason="PREEMPTED")
        return reservation

    def by_key(self, key: ReservationKey) -> Reservation | None:
        return self._by_key.get(key)

    def of_session(self, session_id: str) -> Reservation | None:
        """The one in force that a session's turn has."""
        record = self._cache.sessions.get(session_id)
        return None if record is None or record.live_id is None else self.by_id[record.live_id]

    def all(self) -> list[Reservation]:
        """Everyone who may hold pages."""
        return [*self.by_id.values(), *self.ending.values()]

    # ---- beginning

    def repeat(self, key: ReservationKey, prompt_digest: bytes, time_to_live_s: float) -> Reservation | None:
        """Renew the one of this key, if there is one, after those whose time is over have ended.

        Raises AlreadyExists (RESERVATION_KEY_REUSED) where it is of other tokens.
        """
        now = self._clock()
        self.end_expired(now)
        known = self._by_key.get(key)
        if known is None:
            return None
        if known.prompt_digest != prompt_digest:
            raise AlreadyExists(
                "this {session, turn, epoch, attempt} has reserved other tokens; use the next attempt",
                reason="RESERVATION_KEY_REUSED",
            )
        known.time_to_live_s, known.expires_at = time_to_live_s, now + time_to_live_s
        return known

    def assign(self, reservation: Reservation, token_ids: array[int]) -> bool:
        """``Holdings.assign``, and the restore of what is below the device."""
        if not self._holdings.assign(reservation, token_ids):
            return False
        self.begin_restore(reservation)
        return True

    def begin_restore(self, reservation: Reservation) -> None:
        if reservation.is_restoring:
            self.restores.begin(reservation)

    def add(self, reservation: Reservation) -> None:
        """It is in force, for as long as it was made for."""
        reservation.expires_at = self._clock() + reservation.time_to_live_s
        self.by_id[reservation.id] = self._by_key[reservation.key] = reservation

    # ---- ending

    def end(self, reservation: Reservation, keep_len: int | None) -> None:
        """keep_len: see ``Reservations.release``."""
        del self.by_id[reservation.id], self._by_key[reservation.key]
        self._holdings.end(reservation, self._clock())
        reservation.keep_len = keep_len
        self.restores.cancel(reservation)
        if reservation.num_uses:
            self._holdings.remember(reservation, reservation.kept_len)
            reservation.state = ReservationState.ENDING
            self.ending[reservation.id] = reservation
        else:
            self._settle(reservation)

    def abort(self, reservation: Reservation) -> None:
        """End it over its owner's head."""
        self._aborted.append(reservation.id)
        self.end(reservation, None)

    def supersede(self, session_id: str) -> None:
        """The session's turn goes on elsewhere, or anew: the writer of its reservation is fenced off."""
        live = self.of_session(session_id)
        if live is not None:
            self.abort(live)

    def end_ahead(self, session_id: str, keep_len: int | None) -> None:
        """The restore ahead of the session's turn, if there is one: the turn has come, or never will."""
        ahead = self._by_key.get(ahead_key(session_id))
        if ahead is not None:
            self.end(ahead, keep_len)

    def delete_session(self, session_id: str) -> None:
        """The session is no more: its reservations end, and keep nothing."""
        live = self.of_session(session_id)
        if live is not None:
            self._aborted.append(live.id)
            self.end(live, 0)
        for reservation in self.ending.values():
            if reservation.session_id == session_id:
                reservation.keep_len = 0

    def end_expired(self, now: float) -> list[str]:
        """Leases and reservations whose time is over; returns the reservations' ids."""
        self.leases.end_expired(now)
        expired = [reservation for reservation in self.by_id.values() if reservation.expires_at <= now]
        for reservation in expired:
            self.abort(reservation)
        return [reservation.id for reservation in expired]

    def end_use(self, reservation: Reservation) -> None:
        reservation.num_uses -= 1
        if reservation.num_uses == 0 and reservation.state is ReservationState.ENDING:
            del self.ending[reservation.id]
            self._settle(reservation)

    def check_invariants(self) -> None:
        assert len(self._by_key) == len(self.by_id), "keys and live reservations differ"
        for reservation in self.by_id.values():
            assert self._by_key[reservation.key] is reservation, "a key leads to another reservation"
        for reservation in self.ending.values():
            assert reservation.num_uses > 0, "an ended reservation without uses keeps pages"

    def _settle(self, reservation: Reservation) -> None:
        if reservation.state is not ReservationState.PREEMPTED:
            self._holdings.give_back(reservation, reservation.kept_len)
        reservation.state = ReservationState.ENDED

    def _end_restore(self, reservation: Reservation) -> None:
        self.end_use(reservation)
        if reservation.is_ahead and reservation.id in self.by_id:
            self.end(reservation, None)
