"""Pages that wait for their first copy below the device.

What a sequence gives back is copied down at once; evicted before that, it would have to be computed again, and the copy
takes milliseconds. So these pages stay until the last of them has a copy, or is not to get one, and for
``MAX_COPYING_S`` at the most: whoever wants their room meanwhile comes again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode

MAX_COPYING_S = 1.0
"""At 50 GB/s a million tokens of V3.2's are copied in that time: what takes longer does not move."""


@dataclass(frozen=True, slots=True, eq=False)
class _Hold:
    """nodes: that have no copy yet, in order; pages: of these and of all before them; until: seconds of the clock."""

    nodes: tuple[PageNode, ...]
    pages: tuple[int, ...]
    until: float


class FirstCopies:
    """Leases on the device's pages while they are copied. Not thread-safe: its owner holds the lock. Times are seconds
    of the owner's clock."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._holds: dict[_Hold, None] = {}
        self._by_node: dict[PageNode, _Hold] = {}

    @property
    def is_waiting(self) -> bool:
        return bool(self._holds)

    @property
    def pages(self) -> list[int]:
        """Held ones, as often as they are."""
        return [page for hold in self._holds for page in hold.pages]

    @property
    def num_idle(self) -> int:
        """Pages that could be evicted but for this."""
        held = Counter(self.pages)
        return sum(1 for page, n in held.items() if self._pool.is_idle(page) and self._pool.num_leases(page) == n)

    def hold(self, chain: Sequence[PageNode], now: float) -> None:
        """Keep those of the chain that are on the device, from its first page on, up to the last without a copy."""
        pages, nodes, num_pages = list[int](), list[PageNode](), 0
        for node in chain:
            if node.page is None:
                break
            pages.append(node.page)
            if not node.copies and node not in self._by_node:
                nodes.append(node)
                num_pages = len(pages)
        if nodes:
            hold = _Hold(tuple(nodes), tuple(pages[:num_pages]), now + MAX_COPYING_S)
            self._holds[hold] = None
            self._by_node.update(dict.fromkeys(nodes, hold))
            for page in hold.pages:
                self._pool.lease(page)

    def copied(self, node: PageNode) -> None:
        """It has a copy now; pages are copied before those behind them."""
        hold = self._by_node.get(node)
        if hold is not None and node is hold.nodes[-1]:
            self._end(hold)

    def end(self, nodes: Iterable[PageNode]) -> None:
        """They are not to get a copy, or nobody will come for them."""
        for node in nodes:
            hold = self._by_node.get(node)
            if hold is not None:
                self._end(hold)

    def end_late(self, now: float) -> None:
        """Those that have waited for long enough."""
        for hold in [hold for hold in self._holds if hold.until <= now]:
            self._end(hold)

    def end_oldest(self) -> None:
        """Somebody needs a page who cannot wait. There is one that is held."""
        self._end(next(iter(self._holds)))

    def _end(self, hold: _Hold) -> None:
        del self._holds[hold]
        for node in hold.nodes:
            del self._by_node[node]
        for page in hold.pages:
            self._pool.unlease(page)
