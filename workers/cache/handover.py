"""Sessions on their way to another rank: what they left here is pinned, read by the peer, and given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from seamount.wire.limits import MAX_RESERVATION_S, check_range
from seamount.workers.cache.admission import pack_prompt
from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.live import LiveReservations
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.tier_door import TierDoor


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftSession:
    """A session whose caches wait here, as far as its first page is there. epoch: the last one seen; leased_s: what is
    left of its lease, 0 for none."""

    session_id: str
    salt: bytes = field(repr=False)
    epoch: int
    left_at: float
    leased_s: float


class Handover:
    """Made by ``Reservations``, whose lock it takes; calls may come from any thread."""

    def __init__(
        self,
        live: LiveReservations,
        cache: PrefixCache,
        holdings: Holdings,
        tiers: TierDoor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._cache, self._holdings = live, cache, holdings
        self._tiers, self._clock = tiers, clock

    def hold(
        self,
        *,
        session_id: str,
        epoch: int,
        attempt: int,
        root: bytes,
        token_ids: Sequence[int],
        time_to_live_s: float,
    ) -> Reservation:
        """Pin the full pages that are cached of ``token_ids`` for a peer to read; restore those that are further down
        (``is_restoring``), and leave the session as it is. A reservation of a lower epoch is ended: its writer is
        fenced off.

        Idempotent on {session_id, epoch, attempt}; ends with ``Reservations.release``. root: of the chain of page
        hashes. Raises InvalidArgument, Aborted (STALE_EPOCH, STALE_ATTEMPT), AlreadyExists (RESERVATION_KEY_REUSED).
        """
        check_range(time_to_live_s, field="time_to_live", low=0, high=MAX_RESERVATION_S, low_open=True)
        packed = pack_prompt(token_ids, page_size=self._cache.page_size, num_pages=None)
        held = Reservation.of_prompt(
            packed,
            root=root,
            key=("", f"hold/{session_id}", epoch, attempt),
            page_size=self._cache.page_size,
            time_to_live_s=time_to_live_s,
        )
        with self._live.changing():
            known = self._live.repeat(held.key, held.prompt_digest, time_to_live_s)
            if known is not None:
                return known
            self._live.fences.advance(session_id, held.turn_id, epoch, attempt)
            of_turn = self._live.of_session(session_id)
            if of_turn is not None and of_turn.epoch < epoch:
                self._live.supersede(session_id)
            self._holdings.pin(held, packed)
            self._live.begin_restore(held)
            self._live.add(held)
            self._tiers.wake()
            return held

    def give_up(self, session_id: str, epoch: int) -> None:
        """Another rank has what the session left here: forget it, and free what no other session uses. Nothing happens
        while a turn of the session runs here, or where a later epoch has been seen."""
        with self._live.lock:
            if self._live.of_session(session_id) is None and self._live.fences.seen(session_id) <= epoch:
                self._cache.departures.give_up(session_id)

    def left_behind(self) -> list[LeftSession]:
        """What sessions without a turn here have left and is still here, leased ones first, then the most recent."""
        with self._live.lock:
            now, found = self._clock(), list[LeftSession]()
            for session_id, record in self._cache.sessions.items():
                is_here = bool(record.chain) and (record.chain[0].page is not None or bool(record.chain[0].copies))
                if record.live_id is not None or not is_here or not record.salt:  # of an adopted one it is not known
                    continue
                lease = self._cache.sessions.leases.get(session_id)
                found.append(
                    LeftSession(
                        session_id=session_id,
                        salt=record.salt,
                        epoch=self._live.fences.seen(session_id),
                        left_at=record.left_at or 0.0,
                        leased_s=max(0.0, lease.expires_at - now) if lease is not None else 0.0,
                    )
                )
            return sorted(found, key=lambda left: (left.leased_s == 0, -left.left_at))

    def tokens_of(self, session_id: str) -> tuple[int, ...]:
        """Of the full pages that a session left here, as far as they are still there, and one token more, where there
        is one: the last token of a prompt is never taken as cached. Empty where a turn has come, or
        nothing is left."""
        with self._live.lock:
            record = self._cache.sessions.get(session_id)
            if record is None or record.live_id is not None:
                return ()
            num_full = len(self._cache.leases.left(record)[0])
            return tuple(record.left[: num_full * self._cache.page_size + 1]) if num_full else ()

    def is_settling(self, reservation_id: str) -> bool:
        """Whether it was released, and something still touches its pages."""
        with self._live.lock:
            return reservation_id in self._live.ending

    def has_turns(self) -> bool:
        """Whether a session's turn is in progress here."""
        with self._live.lock:
            return any(one.session_id and not one.is_spare for one in self._live.by_id.values())
