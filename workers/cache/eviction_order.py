"""What pages and copies of pages are worth to those who may come back for them: the order in which tiers make room."""

from __future__ import annotations

from collections.abc import Callable

from seamount.workers.cache.lower import EvictionKey
from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode, PrefixTree
from seamount.workers.cache.retention import PERSON, TIERS, Candidate, Tier, eviction_key
from seamount.workers.cache.sessions import SessionBook
from seamount.workers.cache.superseded import SupersededPages


class EvictionOrder:
    """``retention.eviction_key`` of what is known here. Changes nothing; its owner holds the lock. clock: monotonic
    seconds."""

    def __init__(
        self,
        *,
        pool: PagePool,
        tree: PrefixTree,
        sessions: SessionBook,
        superseded: SupersededPages,
        page_size: int,
        clock: Callable[[], float],
    ) -> None:
        self.pool, self.tree, self.sessions, self.page_size = pool, tree, sessions, page_size
        self._superseded, self._clock = superseded, clock

    def of_page(self, page: int) -> EvictionKey:
        """Of an idle page of the device: of the tree's, or a session's tail."""
        node = self.tree.at(page)
        if node is not None:
            return self.of_copy(node, Tier.DEVICE)
        tail = self.sessions.tail_at(page)
        first = 0 if tail.parent is None else (tail.parent.depth + 1) * self.page_size
        end, idle_s = first + len(tail.token_ids), self._clock() - self.pool.idle_since(page)
        record = self.sessions.get(tail.session_id)
        waits = (PERSON if record is None else record.wait,)
        return eviction_key(Candidate(first=first, end=end, waits=waits, is_superseded=False, idle_s=idle_s))

    def of_copy(self, node: PageNode, tier: Tier) -> EvictionKey:
        """Of the page's copy in the tier, there or to come."""
        is_used = node.page is not None and not self.pool.is_idle(node.page)
        others = [other for other in TIERS if other in node.copies and other is not tier]
        copy = Tier.DEVICE if is_used and tier is not Tier.DEVICE else others[0] if others else None
        is_leased = node.leased_in is not None and TIERS.index(node.leased_in) <= TIERS.index(tier)
        return eviction_key(
            Candidate(
                first=node.depth * self.page_size,
                end=(node.depth + 1) * self.page_size,
                waits=self.sessions.waits(node),
                is_superseded=self._superseded.holds(node),
                idle_s=0.0 if is_used else self._clock() - node.used_at,
                tier=tier,
                copy=copy,
                is_leased=is_leased,
            )
        )
