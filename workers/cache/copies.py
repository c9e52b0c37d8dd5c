"""Copies of pages in the tiers below the device: which pages get one, and what must hold of them.

Copies are made ahead of need: a page that enters the prefix tree is copied down one tier after the other, so that
eviction from the device need not wait for anything. In each tier a page is there only with all pages before it. Who
moves the bytes asks ``next`` what to copy and reports with ``made``; meanwhile the page may have been evicted, and the
copy is then dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from seamount.workers.cache.lower import EvictionKey, LowerTier
from seamount.workers.cache.prefix import PageNode, StoredCopy
from seamount.workers.cache.retention import BELOW, Tier


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Copy:
    """A copy in the making: of ``node`` into ``slot`` of ``tier``.

    source: the page's copy in the tier above; None: it is read from ``page`` of the device. num_stays: of the node,
    then. kept: pages whose copies must stay meanwhile: the one it is read from, and the one before it.
    """

    node: PageNode
    tier: Tier
    slot: int
    source: StoredCopy | None
    page: int | None
    num_stays: int
    kept: tuple[PageNode, ...]

    @property
    def is_current(self) -> bool:
        """Whether what was read is the page's still."""
        if self.source is not None:
            return self.node.copies.get(Tier.HOST) is self.source
        return self.node.page == self.page and self.node.num_stays == self.num_stays


class Copies:
    """Not thread-safe: its owner holds the lock. num_below: pages of each tier; those without any are not there.

    key: what a copy there is worth; is_superseded: whether a page is wanted by nobody; on_copied: a page has one copy
    more; on_refused: it is not to get one now; on_gone: no tier has the page any more; on_change: a tier below has a
    page now, or has it no more; clock: monotonic seconds.
    """

    def __init__(
        self,
        num_below: Mapping[Tier, int],
        *,
        key: Callable[[PageNode, Tier], EvictionKey],
        is_superseded: Callable[[PageNode], bool],
        on_copied: Callable[[PageNode], None],
        on_refused: Callable[[PageNode], None],
        on_gone: Callable[[PageNode], None],
        on_change: Callable[[PageNode], None],
        clock: Callable[[], float],
    ) -> None:
        self._key, self._is_superseded, self._clock = key, is_superseded, clock
        self._on_copied, self._on_refused, self._on_gone = on_copied, on_refused, on_gone
        self.tiers = {
            tier: LowerTier(tier, num_pages, key=key, may_go=_may_go, on_drop=self._dropped, on_change=on_change)
            for tier in BELOW
            if (num_pages := num_below.get(tier, 0)) > 0
        }
        self._queues: dict[Tier, OrderedDict[PageNode, None]] = {tier: OrderedDict() for tier in self.tiers}
        self._making: dict[Tier, dict[PageNode, Copy]] = {tier: {} for tier in self.tiers}

    @property
    def is_waiting(self) -> bool:
        """Whether there is a copy to begin, or one to erase."""
        return any(self._queues.values()) or any(lower.to_erase for lower in self.tiers.values())

    @property
    def is_busy(self) -> bool:
        """Whether a copy is in the making, or waits for that."""
        return self.is_waiting or any(self._making.values())

    def want(self, node: PageNode) -> None:
        """The page should have copies: in the fastest tier without one now, in those behind it afterwards."""
        for tier in self.tiers:
            if not self._has(node, tier):
                self._queues[tier][node] = None
                return

    def next(self, tier: Tier, limit: int) -> list[Copy]:
        """Copies to be made now, at most ``limit``, pages before those behind them."""
        queue, copies = self._queues.get(tier, OrderedDict[PageNode, None]()), list[Copy]()
        while queue and len(copies) < limit:
            node, _ = queue.popitem(last=False)
            if self._has(node, tier) or _is_gone(node):
                continue
            first, *rest = self._missing(node, tier)
            copy = self._begin(first, tier)
            if copy is None:
                self._on_refused(node)
                self._want_behind(node, tier)
                continue
            copies.append(copy)
            for one in reversed(rest):
                queue[one] = None
                queue.move_to_end(one, last=False)
        return copies

    def made(self, copy: Copy, crc: int | None) -> bool:
        """The bytes are in the slot, crc: CRC32C of them; None: it cannot be written. Returns whether it counts."""
        node, lower = copy.node, self.tiers[copy.tier]
        del self._making[copy.tier][node]
        for one in copy.kept:
            one.num_wanted -= 1
        if crc is None:
            lower.retire(copy.slot)
            return False
        if not copy.is_current or (node.parent is not None and copy.tier not in node.parent.copies):
            lower.discard(copy.slot)
            if not _is_gone(node):
                self.want(node)
            return False
        lower.settle(node, StoredCopy(slot=copy.slot, crc=crc))
        self._on_copied(node)
        self._want_behind(node, copy.tier)
        return True

    def behind(self, node: PageNode, tier: Tier) -> list[PageNode]:
        """The page and all that follow it in the tier, the last ones first: without it they cannot be reached."""
        found = {node}
        for one in sorted(self.tiers[tier], key=lambda other: other.depth):
            if one.parent in found:
                found.add(one)
        return sorted(found, key=lambda other: -other.depth)

    def drop(self, node: PageNode, tier: Tier) -> None:
        """The page's copy there is of no use, nor will it be; nothing right behind it is there any more."""
        self.tiers[tier].drop(node, for_good=True)
        self._dropped(node)

    def _begin(self, node: PageNode, tier: Tier) -> Copy | None:
        source = node.copies.get(Tier.HOST) if tier is Tier.DISK else None
        if self._is_superseded(node) or (source is None and node.page is None):
            return None
        kept = ([] if source is None else [node]) + ([] if node.parent is None else [node.parent])
        for one in kept:
            one.num_wanted += 1
        slot = self.tiers[tier].promise(self._key(node, tier), self._clock())
        if slot is None:
            for one in kept:
                one.num_wanted -= 1
            return None
        copy = Copy(
            node=node,
            tier=tier,
            slot=slot,
            source=source,
            page=node.page,
            num_stays=node.num_stays,
            kept=tuple(kept),
        )
        self._making[tier][node] = copy
        return copy

    def _missing(self, node: PageNode, tier: Tier) -> list[PageNode]:
        """The page and those before it that the tier lacks, the first one first."""
        path = [node]
        while (parent := path[-1].parent) is not None and not self._has(parent, tier):
            path.append(parent)
        return path[::-1]

    def _has(self, node: PageNode, tier: Tier) -> bool:
        return tier in node.copies or node in self._making[tier]

    def _want_behind(self, node: PageNode, tier: Tier) -> None:
        for other in self.tiers:
            if BELOW.index(other) > BELOW.index(tier) and not self._has(node, other):
                self._queues[other][node] = None

    def _dropped(self, node: PageNode) -> None:
        if _is_gone(node):
            self._on_gone(node)

    def making(self) -> Iterator[Copy]:
        for copies in self._making.values():
            yield from copies.values()


def _may_go(node: PageNode, tier: Tier) -> bool:
    """Nobody reads it, and it is not the last copy of a leased page."""
    return node.num_wanted == 0 and (node.num_leases == 0 or any(other is not tier for other in node.copies))


def _is_gone(node: PageNode) -> bool:
    return node.page is None and not node.copies
