"""Pages that no session will come back for, counted as they stand: what losing a rank costs does not include them."""

from __future__ import annotations

from collections import Counter

from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import Tier


class SupersededPages:
    """Not thread-safe: its owner holds the lock, and calls ``note`` after every change of a page's sessions, of its use
    and of the tiers that have it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._counted: dict[PageNode, tuple[Tier, ...]] = {}
        self.num_pages: Counter[Tier] = Counter()
        """By tier: a page that several tiers have counts in each of them."""

    def holds(self, node: PageNode) -> bool:
        """A session brought the page, no session's last turn went through it, and nobody uses it."""
        is_used = node.page is not None and not self._pool.is_idle(node.page)
        return bool(node.session_id) and node.num_sessions == 0 and not is_used

    def note(self, node: PageNode) -> None:
        before, after = self._counted.pop(node, ()), self.tiers(node)
        self.num_pages.subtract(before)
        self.num_pages.update(after)
        if after:
            self._counted[node] = after

    def tiers(self, node: PageNode) -> tuple[Tier, ...]:
        """That have it as a superseded page; the device only where it may go from there."""
        if not self.holds(node):
            return ()
        may_go = node.page is not None and not self._pool.num_leases(node.page)
        return (Tier.DEVICE, *node.copies) if may_go else tuple(node.copies)
