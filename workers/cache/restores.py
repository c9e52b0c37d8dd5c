"""Restores: pages of the tree on their way from a tier below into the pages of a reservation.

A restore is a use of the reservation: its pages are not reused before it is over. Reservations take turns, so that a
long one holds nobody up. What another reservation has restored meanwhile is shared instead of read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.prefix import PageNode, StoredCopy
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation, ReservationState
from seamount.workers.cache.retention import Tier


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Fetch:
    """One page: from its copy in ``tier`` to ``page`` of the device."""

    node: PageNode
    tier: Tier
    copy: StoredCopy
    page: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Restore:
    """The next pages of one reservation, in order."""

    reservation: Reservation
    fetches: tuple[Fetch, ...]


class Restores:
    """Not thread-safe: its owner holds the lock. on_end: called when a reservation's restore is over, and with it the
    use."""

    def __init__(self, cache: PrefixCache, holdings: Holdings, *, on_end: Callable[[Reservation], None]) -> None:
        self._cache, self._holdings, self._on_end = cache, holdings, on_end
        self._queue: deque[Reservation] = deque()
        self._reading: Reservation | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self._queue)

    def begin(self, reservation: Reservation) -> None:
        """Pages were assigned to it, some of which are to be restored."""
        found = [node.best_copy for node in reservation.to_restore]
        reservation.restored_from = [tier for tier in found if tier is not None]
        reservation.restored = Future()
        reservation.num_uses += 1
        self._queue.append(reservation)

    def next(self, limit: int) -> Restore | None:
        """What to read now, at most ``limit`` pages; None for nothing. ``done`` comes before the next."""
        assert self._reading is None, "a restore is under way"
        while self._queue:
            reservation = self._queue.popleft()
            fetches = self._fetches(reservation, limit)
            if fetches:
                self._reading = reservation
                return Restore(reservation=reservation, fetches=fetches)
            self._end(reservation)
        return None

    def done(self, restore: Restore, num_good: int, damaged: Fetch | None) -> None:
        """The first ``num_good`` pages are there and verified; damaged: the one behind them, where that is why."""
        reservation, self._reading = restore.reservation, None
        if reservation.state is ReservationState.ACTIVE:
            for fetch in restore.fetches[:num_good]:
                if fetch.node.copies.get(fetch.tier) is not fetch.copy:
                    break  # its slot may have been another page's while it was read
                reservation.restored_from[-len(reservation.to_restore)] = fetch.tier
                self._settle(reservation)
        if damaged is not None and damaged.node.copies.get(damaged.tier) is damaged.copy:
            self._cache.lose_copy(damaged.node, damaged.tier)
        is_stuck = num_good < len(restore.fetches) and damaged is None
        if is_stuck or reservation.state is not ReservationState.ACTIVE:
            self._end(reservation)
        else:
            self._queue.append(reservation)

    def cancel(self, reservation: Reservation) -> None:
        """The reservation has ended: what is being read now is awaited, nothing else."""
        if reservation.is_restoring and reservation is not self._reading:
            self._queue.remove(reservation)
            self._end(reservation)

    def _fetches(self, reservation: Reservation, limit: int) -> tuple[Fetch, ...]:
        fetches: list[Fetch] = []
        if reservation.state is not ReservationState.ACTIVE:
            return ()
        while reservation.to_restore and reservation.to_restore[0].page is not None:
            self._share(reservation)
        for node in reservation.to_restore:
            tier = node.best_copy
            if len(fetches) == limit or node.page is not None or tier is None:
                break
            page = reservation.pages[len(reservation.nodes) + len(fetches)]
            fetches.append(Fetch(node=node, tier=tier, copy=node.copies[tier], page=page))
        return tuple(fetches)

    def _share(self, reservation: Reservation) -> None:
        """The next page is on the device by now: the reservation's own page for it is not needed."""
        node, index = reservation.to_restore[0], len(reservation.nodes)
        assert node.page is not None
        pool = self._cache.pool
        pool.pin(node.page)
        pool.unpin(reservation.pages[index], cached=False)
        reservation.pages[index] = node.page
        reservation.nodes.append(node)
        self._taken(reservation)

    def _settle(self, reservation: Reservation) -> None:
        num_nodes = len(reservation.nodes)
        self._holdings.advance(reservation, (num_nodes + 1) * self._cache.page_size)
        assert len(reservation.nodes) == num_nodes + 1, "a page that was restored is not in the tree"
        self._taken(reservation)

    def _taken(self, reservation: Reservation) -> None:
        reservation.to_restore.popleft().num_wanted -= 1
        reservation.computed_len = len(reservation.nodes) * self._cache.page_size

    def _end(self, reservation: Reservation) -> None:
        for node in reservation.to_restore:
            node.num_wanted -= 1
        reservation.not_restored = [node for node in reservation.to_restore if node.copies or node.page is not None]
        del reservation.restored_from[len(reservation.restored_from) - len(reservation.to_restore) :]
        reservation.to_restore.clear()
        if reservation.restored is not None:
            reservation.restored.set_result(None)
        self._on_end(reservation)
