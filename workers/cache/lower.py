"""A tier below the device: which of its slots holds which page, and which page goes when it is full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from seamount.workers.cache.prefix import PageNode, StoredCopy
from seamount.workers.cache.retention import Tier

EvictionKey = tuple[int, float]
EVICTED_SHARE = 1 / 64
"""Of a tier's pages, evicted at once when it is full: the order is then computed once for that many."""
AGE_WEIGHT = 1 / 64
"""Of one evicted page, in the smoothed age."""


class EvictionAge:
    """How long pages that are evicted have been idle, smoothed; seconds."""

    def __init__(self) -> None:
        self._age_s, self._at = 0.0, -math.inf

    def note(self, age_s: float, now: float) -> None:
        known_s = self.at(now)
        self._age_s = age_s if math.isinf(known_s) else known_s + AGE_WEIGHT * (age_s - known_s)
        self._at = now

    def at(self, now: float) -> float:
        """At least the time since the last eviction; inf before the first."""
        return max(self._age_s, now - self._at)


class LowerTier:
    """Slots, numbered from 0. A slot is free, promised to a copy in the making, or holds a page's bytes.

    Not thread-safe: its owner holds the lock. key: of a page here, by ``retention.eviction_key``; the least goes first.
    may_go: whether the copy here may be dropped. on_drop: called after a copy was dropped for another; on_change: after
    a page came or went. A slot that a later process could find again is to be erased before it is free.
    """

    def __init__(
        self,
        tier: Tier,
        num_pages: int,
        *,
        key: Callable[[PageNode, Tier], EvictionKey],
        may_go: Callable[[PageNode, Tier], bool],
        on_drop: Callable[[PageNode], None],
        on_change: Callable[[PageNode], None],
    ) -> None:
        self.tier, self.num_pages = tier, num_pages
        self.age = EvictionAge()
        self.num_evicted = 0
        self._key, self._may_go, self._on_drop, self._on_change = key, may_go, on_drop, on_change
        self._outlives_process = tier is Tier.DISK
        self._to_erase: list[int] = []
        self._free = list(range(num_pages - 1, -1, -1))
        self._nodes: dict[int, PageNode] = {}
        self._leaves: dict[PageNode, None] = {}

    @property
    def num_cached(self) -> int:
        return len(self._nodes)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def __iter__(self) -> Iterator[PageNode]:
        return iter(self._nodes.values())

    def free_slots(self) -> list[int]:
        return list(self._free)

    def leaves(self) -> set[PageNode]:
        """Pages here with nothing behind them here."""
        return {node for node in self._leaves if self._is_leaf(node)}

    def promise(self, newcomer: EvictionKey, now: float) -> int | None:
        """A slot for a page with this key; None where all that is here is worth as much or may not go."""
        if not self._free:
            self._evict(newcomer, now)
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """A promised slot is not needed, and holds nothing."""
        self._free.append(slot)

    def discard(self, slot: int) -> None:
        """A promised slot holds what nobody needs."""
        (self._to_erase if self._outlives_process else self._free).append(slot)

    def retire(self, slot: int) -> None:
        """A promised slot cannot be written: it is not used any more."""
        assert slot not in self._nodes, "a slot in use cannot be retired"
        self.num_pages -= 1

    @property
    def to_erase(self) -> list[int]:
        """Slots whose bytes are to be made unfindable, one ``erased`` each."""
        return list(self._to_erase)

    def erased(self, slot: int, *, is_done: bool) -> None:
        """is_done: False where the slot cannot be written."""
        self._to_erase.remove(slot)
        if is_done:
            self._free.append(slot)
        else:
            self.retire(slot)

    def adopt(self, slots: set[int]) -> None:
        """These slots, free until now, are promised: they hold what an earlier process left."""
        self._free = [slot for slot in self._free if slot not in slots]

    def settle(self, node: PageNode, copy: StoredCopy) -> None:
        """The promised slot holds the page now; the page before it is here, too."""
        assert node.parent is None or self.tier in node.parent.copies, "a copy without the page before it"
        node.copies[self.tier] = copy
        self._nodes[copy.slot] = node
        if node.parent is not None:
            node.parent.num_children[self.tier] += 1
        self.note_leaf(node)
        self._on_change(node)

    def drop(self, node: PageNode, *, for_good: bool = False) -> None:
        """The page's copy here is no more; nothing right behind it is here. for_good: nor may a later process find it;
        what is dropped to make room is overwritten in any case."""
        assert node.num_children[self.tier] == 0, "an inner page must not go before those behind it"
        copy = node.copies.pop(self.tier)
        del self._nodes[copy.slot]
        if for_good:
            self.discard(copy.slot)
        else:
            self._free.append(copy.slot)
        self._leaves.pop(node, None)
        if node.parent is not None:
            node.parent.num_children[self.tier] -= 1
            self.note_leaf(node.parent)
        self._on_change(node)

    def note_leaf(self, node: PageNode) -> None:
        """The page may be here and have nothing behind it here."""
        if self._is_leaf(node):
            self._leaves.pop(node, None)  # to the end: of equals, the one that came first goes first
            self._leaves[node] = None

    def _is_leaf(self, node: PageNode) -> bool:
        return self.tier in node.copies and node.num_children[self.tier] == 0

    def _evict(self, newcomer: EvictionKey, now: float) -> None:
        """Drop what is worth less than the newcomer, a share of the tier at the most."""
        self._leaves = {node: None for node in self._leaves if self._is_leaf(node)}
        numbers = count()  # of equals, the one that came first goes first
        order = [
            (*self._key(node, self.tier), next(numbers), node) for node in self._leaves if self._may_go(node, self.tier)
        ]
        heapify(order)
        for _ in range(max(1, int(EVICTED_SHARE * self.num_pages))):
            if not order or order[0][:2] >= newcomer:
                return
            *_, node = heappop(order)
            self.age.note(now - node.used_at, now)
            parent = node.parent
            self.drop(node)
            self.num_evicted += 1
            self._on_drop(node)
            if parent is not None and self._is_leaf(parent) and self._may_go(parent, self.tier):
                heappush(order, (*self._key(parent, self.tier), next(numbers), parent))
