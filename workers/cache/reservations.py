"""Reservations: the one door to a rank's pages (DESIGN: caches and reservations).

What is here: keys, epochs, expiry, uses and the lock; ``holdings.py`` has the pages. What still touches pages (a
receive, a step, a send) counts as a use. A reservation that ends with uses keeps its pages until the last of them is
over, so that a late write never hits a reused page.
"""

from __future__ import annotations

import secrets
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seamount.wire.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from seamount.wire.hashes import PAGE_SIZE, page_hashes, root_hash
from seamount.wire.limits import MAX_RESERVATION_S, check_range
from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.invariants import check_holdings
from seamount.workers.cache.reservation import Reservation, ReservationKey, ReservationState

MIN_RETRY_S, MAX_RETRY_S = 0.1, 2.0
MAX_FENCES = 1 << 16
"""Sessions whose highest epoch is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """num_cached: unreferenced pages that hold a prefix; num_reservations: with those whose end waits for a use."""

    num_pages: int
    num_free: int
    num_cached: int
    num_reservations: int


class Reservations:
    """The caches of one rank behind one lock; used by the gRPC loop, the engine thread and the link threads.

    num_pages, page_size: of the cache planes; fingerprint, layout: of model and planes: part of every page hash.
    clock: monotonic seconds. on_abort: called with the id of each reservation that a higher epoch, a later attempt or
    its expiry ended; outside the lock, on the thread that caused it; it may be set later.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        fingerprint: str,
        layout: str,
        clock: Callable[[], float] = time.monotonic,
        on_abort: Callable[[str], None] | None = None,
    ) -> None:
        check_range(num_pages, field="num_pages", low=1, high=1 << 31)
        check_range(page_size, field="page_size", low=1, high=1 << 16)
        self.num_pages, self.page_size = num_pages, page_size
        self.on_abort = on_abort
        self._fingerprint, self._layout, self._clock = fingerprint, layout, clock
        self._lock = threading.RLock()
        self._holdings = Holdings(num_pages=num_pages, page_size=page_size)
        self._fences: OrderedDict[str, tuple[int, str, int]] = OrderedDict()
        self._live: dict[str, Reservation] = {}
        self._ending: dict[str, Reservation] = {}
        self._by_key: dict[ReservationKey, Reservation] = {}

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
    ) -> Reservation:
        """Pin what is cached of ``token_ids`` and allocate pages for the rest and one token more, or change nothing.

        Idempotent on {session_id, turn_id, epoch, attempt}: repeated, it renews the expiry and returns the same object,
        whose ``cached_len`` tells what has arrived since. A higher epoch of the session, or a later attempt, ends the
        reservation before it, even if the new one then finds no pages, and uses the entries that it computed.
        session_id: empty for stateless use: no tail is kept, turn_id must then be unique.
        token_ids: at least one, each in [0, 2^32).

        Raises InvalidArgument (token_ids, time_to_live; EXCEEDS_CACHE if the whole pool is too small), Aborted
        (STALE_EPOCH, STALE_ATTEMPT), AlreadyExists (RESERVATION_KEY_REUSED: same key, other tokens), ResourceExhausted
        (NO_PAGES, with ``retry_after_s``).
        """
        check_range(time_to_live_s, field="time_to_live", low=0, high=MAX_RESERVATION_S, low_open=True)
        packed = _pack(token_ids)
        num_needed = len(packed) // self.page_size + 1
        if num_needed > self.num_pages:
            raise InvalidArgument(
                f"token_ids needs {num_needed} pages ({len(packed)} tokens and one more) and this rank has "
                f"{self.num_pages} in all; shorten the prompt or give the rank more pages",
                field="token_ids",
                reason="EXCEEDS_CACHE",
                metadata={"num_needed_pages": str(num_needed), "num_pages": str(self.num_pages)},
            )
        root = root_hash(salt, self._fingerprint, self._layout)
        aborted: list[str] = []
        try:
            with self._lock:
                now = self._clock()
                self._end_expired(now, aborted)
                known = self._by_key.get((session_id, turn_id, epoch, attempt))
                if known is not None:
                    return self._repeat(known, root, packed, now + time_to_live_s, time_to_live_s)
                if session_id:
                    self._pass_fence(session_id, turn_id, epoch, attempt)
                    self._supersede(session_id, aborted)
                reservation = Reservation(
                    id=secrets.token_hex(16),
                    session_id=session_id,
                    turn_id=turn_id,
                    epoch=epoch,
                    attempt=attempt,
                    root=root,
                    token_ids=packed.tolist(),
                    prompt_len=len(packed),
                    digests=page_hashes(root, packed, self.page_size),
                    common_len=self._holdings.common_len(session_id, root, packed),
                    time_to_live_s=time_to_live_s,
                    expires_at=now + time_to_live_s,
                    page_size=self.page_size,
                )
                if not self._holdings.assign(reservation, packed):
                    raise self._no_pages(num_needed, now)
                reservation.cached_len_at_first = reservation.cached_len
                self._live[reservation.id] = self._by_key[reservation.key] = reservation
                self._holdings.begin(reservation)
                return reservation
        finally:
            self._report(aborted)

    def get(self, reservation_id: str) -> Reservation:
        """The reservation in force. Raises NotFound (RESERVATION_NOT_FOUND) for one that has ended or never was."""
        with self._lock:
            return self._get(reservation_id)

    def renew(self, reservation_id: str, time_to_live_s: float | None = None) -> None:
        """Let it live for ``time_to_live_s`` from now, or for as long as it was made for. Raises NotFound."""
        with self._lock:
            reservation = self._get(reservation_id)
            if time_to_live_s is not None:
                check_range(time_to_live_s, field="time_to_live", low=0, high=MAX_RESERVATION_S, low_open=True)
                reservation.time_to_live_s = time_to_live_s
            reservation.expires_at = self._clock() + reservation.time_to_live_s

    def release(self, reservation_id: str, keep_len: int | None = None) -> None:
        """End it; idempotent: an unknown or ended one is left alone.

        Entries before ``keep_len`` (None = all that are present) stay cached: full pages in the tree, the partly filled
        last page as the session's tail. Pages beyond that this reservation computed are freed; those that it found
        here, or that others use, stay. Raises InvalidArgument if ``keep_len`` is negative.
        """
        if keep_len is not None and keep_len < 0:
            raise InvalidArgument(f"keep_len is {keep_len}; it must be at least 0", field="keep_len")
        with self._lock:
            reservation = self._live.get(reservation_id)
            if reservation is not None:
                self._end(reservation, keep_len)

    def expire(self, now: float | None = None) -> list[str]:
        """End those whose time is over, as ``release`` does; returns their ids after ``on_abort`` had each."""
        aborted: list[str] = []
        with self._lock:
            self._end_expired(self._clock() if now is None else now, aborted)
        self._report(aborted)
        return aborted

    # ---- for the engine

    def ensure_capacity(self, reservation_id: str, num_tokens: int) -> bool:
        """Allocate pages so that ``num_tokens`` fit; False, and nothing changed, if too few are left after eviction.

        Raises NotFound, FailedPrecondition (PREEMPTED).
        """
        with self._lock:
            reservation = self._get_active(reservation_id)
            return self._holdings.grow(reservation, -(-num_tokens // self.page_size))

    def append_token(self, reservation_id: str, token_id: int) -> None:
        """The sequence grows by one token, whose entry is not present yet. Raises NotFound."""
        with self._lock:
            self._get_used(reservation_id).token_ids.append(token_id)

    def advance(self, reservation_id: str, computed_len: int) -> None:
        """Entries of the positions before ``computed_len`` are present; full pages enter the tree. Never goes back.

        Raises NotFound, OutOfRange (beyond the tokens or the pages).
        """
        with self._lock:
            reservation = self._get_used(reservation_id)
            limit = min(len(reservation.token_ids), reservation.capacity)
            if computed_len > limit:
                raise OutOfRange(
                    f"computed_len is {computed_len}; the reservation has tokens and pages for {limit}",
                    reason="COMPUTED_LEN_OUT_OF_RANGE",
                )
            self._holdings.advance(reservation, computed_len)

    def preempt(self, reservation_id: str) -> bool:
        """Give all its pages back; what is computed stays cached while nobody needs the pages, ``computed_len`` is 0.

        False, and nothing changed, while a receive, step or send uses its pages. Raises NotFound.
        """
        with self._lock:
            reservation = self._get(reservation_id)
            if reservation.num_uses:
                return False
            if reservation.state is ReservationState.ACTIVE:
                self._holdings.remember(reservation, reservation.computed_len)
                self._holdings.give_back(reservation, reservation.computed_len)
                reservation.state = ReservationState.PREEMPTED
            return True

    def resume(self, reservation_id: str) -> bool:
        """Pin what is still cached of a preempted sequence and allocate the rest and one token more, or return False.

        ``computed_len`` is then what was found, at most one less than its tokens. Raises NotFound.
        """
        with self._lock:
            reservation = self._get(reservation_id)
            if reservation.state is ReservationState.PREEMPTED:
                if not self._holdings.assign(reservation, array("I", reservation.token_ids)):
                    return False
                reservation.state = ReservationState.ACTIVE
            return True

    def slots(self, reservation_id: str, first: int, end: int) -> list[int]:
        """Physical slots of the positions [first, end). Raises NotFound, OutOfRange (beyond its pages)."""
        with self._lock:
            reservation = self._get_used(reservation_id)
            _check_span(first, end, reservation.capacity)
            return reservation.slots(first, end)

    def page_table(self, reservation_id: str) -> list[int]:
        """Its physical pages in order. Raises NotFound."""
        with self._lock:
            return list(self._get_used(reservation_id).pages)

    # ---- uses: what touches pages outside the lock

    def begin_use(self, reservation_id: str) -> Reservation:
        """A step or a send is about to touch its pages: they are not reused before ``end_use``. Raises NotFound.

        Uses nest; each needs its ``end_use``. Raises FailedPrecondition (PREEMPTED).
        """
        with self._lock:
            reservation = self._get_active(reservation_id)
            reservation.num_uses += 1
            return reservation

    def end_use(self, reservation_id: str) -> None:
        """One use is over. Raises NotFound if there was none."""
        with self._lock:
            reservation = self._get_used(reservation_id)
            if reservation.num_uses - (reservation.receive is not None) < 1:
                raise FailedPrecondition("the reservation is not in use", reason="NOT_IN_USE")
            self._end_use(reservation)

    def begin_receive(self, reservation_id: str, first: int, end: int) -> None:
        """Entries of the positions [first, end) are about to be written by a transfer; one at a time a reservation.

        Raises NotFound, OutOfRange (empty or beyond tokens and pages; leaves a gap after ``computed_len``; falls into
        pages that are shared already: reserve again to learn what is present), FailedPrecondition (PREEMPTED,
        RECEIVE_IN_FLIGHT).
        """
        with self._lock:
            reservation = self._get_active(reservation_id)
            if reservation.receive is not None:
                raise FailedPrecondition(
                    "a receive into this reservation is in flight; retry when it has ended", reason="RECEIVE_IN_FLIGHT"
                )
            _check_span(first, end, min(reservation.capacity, len(reservation.token_ids)))
            shared_len = len(reservation.nodes) * self.page_size
            if first == end or not shared_len <= first <= reservation.computed_len:
                raise OutOfRange(
                    f"a receive of [{first}, {end}) must not be empty and must begin in [{shared_len}, "
                    f"{reservation.computed_len}]; reserve again to learn what is present",
                    reason="RECEIVE_OUT_OF_RANGE",
                )
            reservation.receive = (first, end)
            reservation.num_uses += 1

    def end_receive(self, reservation_id: str, verified_len: int) -> None:
        """The transfer is over, or its link destroyed: nothing of it writes any more.

        verified_len: positions before it are present and verified in every plane of every layer; anything up to the
        receive's ``first`` says that nothing arrived. Raises NotFound, FailedPrecondition (NO_RECEIVE), OutOfRange
        (``verified_len`` beyond the receive).
        """
        with self._lock:
            reservation = self._get_used(reservation_id)
            if reservation.receive is None:
                raise FailedPrecondition("no receive into this reservation is in flight", reason="NO_RECEIVE")
            end, reservation.receive = reservation.receive[1], None
            if verified_len <= end:
                self._holdings.advance(reservation, verified_len)
            self._end_use(reservation)
        if verified_len > end:
            raise OutOfRange(
                f"verified_len is {verified_len} and the receive ended at {end}: nothing of it is taken as present",
                reason="VERIFIED_LEN_OUT_OF_RANGE",
            )

    # ---- views

    def state(self) -> CacheState:
        """Counts at this moment."""
        with self._lock:
            return CacheState(
                num_pages=self.num_pages,
                num_free=self._holdings.pool.num_free,
                num_cached=self._holdings.pool.num_idle,
                num_reservations=len(self._live) + len(self._ending),
            )

    def sessions(self) -> list[str]:
        """Sessions with a live reservation or cached pages of their own here; most recent first."""
        with self._lock:
            return self._holdings.sessions.cached_sessions()

    def check_invariants(self) -> None:
        """Raise AssertionError unless each page is free, referenced as often as held, or cached and reachable."""
        with self._lock:
            held = [*self._live.values(), *self._ending.values()]
            assert len(self._by_key) == len(self._live), "keys and live reservations differ"
            for reservation in self._live.values():
                assert self._by_key[reservation.key] is reservation, "a key leads to another reservation"
            for reservation in self._ending.values():
                assert reservation.num_uses > 0, "an ended reservation without uses keeps pages"
            check_holdings(self._holdings, held)

    # ---- with the lock held

    def _repeat(
        self, known: Reservation, root: bytes, packed: array[int], expires_at: float, time_to_live_s: float
    ) -> Reservation:
        same_len = len(packed) == known.prompt_len
        if known.root != root or not same_len or known.token_ids[: known.prompt_len] != packed.tolist():
            raise AlreadyExists(
                "this {session, turn, epoch, attempt} has reserved other tokens; use the next attempt",
                reason="RESERVATION_KEY_REUSED",
            )
        known.time_to_live_s, known.expires_at = time_to_live_s, expires_at
        return known

    def _pass_fence(self, session_id: str, turn_id: str, epoch: int, attempt: int) -> None:
        seen_epoch, seen_turn, seen_attempt = self._fences.get(session_id, (epoch, turn_id, attempt))
        if epoch < seen_epoch:
            raise Aborted(
                f"epoch {epoch} of the session is stale: {seen_epoch} has been seen; read the session again",
                reason="STALE_EPOCH",
                metadata={"epoch": str(epoch), "current_epoch": str(seen_epoch)},
            )
        if epoch == seen_epoch and turn_id == seen_turn and attempt < seen_attempt:
            raise Aborted(
                f"attempt {attempt} of the turn is stale: {seen_attempt} has been seen; use a later attempt",
                reason="STALE_ATTEMPT",
                metadata={"attempt": str(attempt), "current_attempt": str(seen_attempt)},
            )
        self._fences[session_id] = (epoch, turn_id, attempt)
        self._fences.move_to_end(session_id)
        if len(self._fences) > MAX_FENCES:
            self._fences.popitem(last=False)

    def _supersede(self, session_id: str, aborted: list[str]) -> None:
        record = self._holdings.sessions.get(session_id)
        if record is not None and record.live_id is not None:
            aborted.append(record.live_id)
            self._end(self._live[record.live_id], None)

    def _end_expired(self, now: float, aborted: list[str]) -> None:
        for reservation in [r for r in self._live.values() if r.expires_at <= now]:
            aborted.append(reservation.id)
            self._end(reservation, None)

    def _end(self, reservation: Reservation, keep_len: int | None) -> None:
        end = reservation.computed_len if keep_len is None else min(keep_len, reservation.computed_len)
        if reservation.state is ReservationState.ACTIVE:
            self._holdings.remember(reservation, end)
        self._holdings.end(reservation)
        del self._live[reservation.id], self._by_key[reservation.key]
        reservation.keep_len = keep_len
        if reservation.num_uses:
            reservation.state = ReservationState.ENDING
            self._ending[reservation.id] = reservation
        else:
            self._settle(reservation)

    def _settle(self, reservation: Reservation) -> None:
        keep_len = reservation.keep_len
        end = reservation.computed_len if keep_len is None else min(keep_len, reservation.computed_len)
        self._holdings.give_back(reservation, end)
        reservation.state = ReservationState.ENDED

    def _end_use(self, reservation: Reservation) -> None:
        reservation.num_uses -= 1
        if reservation.num_uses == 0 and reservation.state is ReservationState.ENDING:
            del self._ending[reservation.id]
            self._settle(reservation)

    def _get(self, reservation_id: str) -> Reservation:
        reservation = self._live.get(reservation_id)
        if reservation is None:
            raise NotFound(
                f"reservation {reservation_id} has ended or never was; reserve again",
                reason="RESERVATION_NOT_FOUND",
                metadata={"reservation_id": reservation_id},
            )
        return reservation

    def _get_used(self, reservation_id: str) -> Reservation:
        """Also one whose end waits for a use: whoever uses it may finish what it does."""
        ending = self._ending.get(reservation_id)
        return ending if ending is not None else self._get(reservation_id)

    def _get_active(self, reservation_id: str) -> Reservation:
        reservation = self._get(reservation_id)
        if reservation.state is not ReservationState.ACTIVE:
            raise FailedPrecondition("the reservation is preempted; resume it first", reason="PREEMPTED")
        return reservation

    def _no_pages(self, num_needed: int, now: float) -> ResourceExhausted:
        pool = self._holdings.pool
        soonest_s = min((r.expires_at for r in self._live.values()), default=now) - now
        return ResourceExhausted(
            f"the prompt needs {num_needed} pages; {pool.num_free + pool.num_idle} of {pool.num_pages} are free or "
            "can be evicted; retry later or use another rank",
            reason="NO_PAGES",
            retry_after_s=min(max(soonest_s, MIN_RETRY_S), MAX_RETRY_S),
            metadata={"num_needed_pages": str(num_needed), "num_pages": str(pool.num_pages)},
        )

    def _report(self, aborted: list[str]) -> None:
        if self.on_abort is not None:
            for reservation_id in aborted:
                self.on_abort(reservation_id)


def _check_span(first: int, end: int, limit: int) -> None:
    if not 0 <= first <= end <= limit:
        raise OutOfRange(
            f"positions [{first}, {end}) are not within the reservation's [0, {limit})", reason="SPAN_OUT_OF_RANGE"
        )


def _pack(token_ids: Sequence[int]) -> array[int]:
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument("token_ids must be integers in [0, 2^32)", field="token_ids") from error
    if not packed:
        raise InvalidArgument("token_ids is empty; it must hold at least 1 token", field="token_ids")
    return packed
