"""Which pages of the device make room: idle ones with nothing on the device behind them, the least worth first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from seamount.workers.cache.lower import EvictionAge, EvictionKey
from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PrefixTree
from seamount.workers.cache.retention import Tier

COLD_AFTER_S = 300.0
"""Most tools and people are back by then: what was idle for longer may go for work ahead of time."""


class Eviction:
    """Not thread-safe: its owner holds the lock.

    key: of an idle page, by ``retention.eviction_key``; evict: takes a page out of the device and returns the one that
    is before it there, if any; clock: monotonic seconds.
    """

    def __init__(
        self,
        pool: PagePool,
        tree: PrefixTree,
        *,
        key: Callable[[int], EvictionKey],
        evict: Callable[[int], int | None],
        clock: Callable[[], float],
    ) -> None:
        self._pool, self._tree, self._clock = pool, tree, clock
        self._key, self._evict = key, evict
        self._leaves: dict[int, None] = {}
        """Every idle page with nothing on the device behind it, and pages that were such before."""
        self._age = EvictionAge()
        self.num_evicted = 0

    def make_room(self, num_free: int) -> None:
        """Evict until so many pages are free; so many are available."""
        self._evict_while(lambda order, page: self._pool.num_free < num_free)

    def make_room_of_cold_pages(self, num_free: int, keep: Iterable[int]) -> bool:
        """Whether so many are free, after eviction of superseded and cold pages alone, none of ``keep``."""
        now, kept = self._clock(), frozenset(keep)

        def goes(order: int, page: int) -> bool:
            is_cold = order == 0 or (order == 1 and now - self._pool.idle_since(page) > COLD_AFTER_S)
            return self._pool.num_free < num_free and is_cold and page not in kept

        self._evict_while(goes)
        return self._pool.num_free >= num_free

    def age_s(self, now: float) -> float:
        """How long pages that are evicted have been idle, smoothed; at least the time since the last one was; inf while
        pages are free or none was evicted yet."""
        return math.inf if self._pool.num_free else self._age.at(now)

    def is_leaf(self, page: int) -> bool:
        node = self._tree.at(page)
        return self._pool.is_idle(page) and (node is None or node.num_children[Tier.DEVICE] == 0)

    def note_leaf(self, page: int) -> None:
        """The page may have become an idle leaf."""
        if self.is_leaf(page):
            self._leaves.pop(page, None)  # to the end: of equals, the one that came first goes first
            self._leaves[page] = None

    def leaves(self) -> set[int]:
        """Idle pages with nothing on the device behind them."""
        return {page for page in self._leaves if self.is_leaf(page)}

    def _evict_while(self, goes: Callable[[int, int], bool]) -> None:
        """Evict pages in the order of their keys up to the first that does not go."""
        now = self._clock()
        self._leaves = {page: None for page in self._leaves if self.is_leaf(page)}
        order = [(*self._key(page), page) for page in self._leaves if not self._pool.num_leases(page)]
        heapify(order)
        while order and goes(order[0][0], order[0][2]):
            is_current, _, page = heappop(order)
            if is_current:  # superseded pages go at any age
                self._age.note(now - self._pool.idle_since(page), now)
            parent = self._evict(page)
            self.num_evicted += 1
            if parent is not None and self.is_leaf(parent) and not self._pool.num_leases(parent):
                heappush(order, (*self._key(parent), parent))
