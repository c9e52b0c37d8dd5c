"""The tiers below the device as those see them who move the bytes: what to copy down, what to bring up.

No bytes here: threads that own the memory, the files and the device ask what to do and report what was done. All calls
may come from any thread and return at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from seamount.workers.cache.copies import Copy
from seamount.workers.cache.prefix import PageNode, StoredCopy
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.restores import Fetch, Restore, Restores
from seamount.workers.cache.retention import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPage:
    """A page that an earlier process left in a tier. parent: hash of the page before it, root's for the first.

    token_ids: native uint32, packed. order: grows with the time it was written.
    """

    slot: int
    crc: int
    digest: bytes
    parent: bytes
    root: bytes
    depth: int
    token_ids: bytes
    session_id: str
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierState:
    """num_pages: that the tier holds at the most; num_cached: that it holds; num_superseded: of those, pages that no
    session will come back for."""

    num_pages: int
    num_cached: int
    num_superseded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCounts:
    """Pages since the start: evicted to make room; copies dropped because their checksum was wrong."""

    num_evicted: int
    num_damaged: int


class TierDoor:
    """Made by ``Reservations``, whose lock it takes. on_work: called when there may be something to do; set later."""

    def __init__(self, lock: threading.RLock, cache: PrefixCache, restores: Restores) -> None:
        self.on_work: Callable[[], None] | None = None
        self._lock, self._cache, self._restores = lock, cache, restores

    def next_copies(self, tier: Tier, limit: int) -> list[Copy]:
        """Pages to copy into the tier now, at most ``limit``; each is answered by ``copied``, in order."""
        with self._lock:
            return self._cache.copies.next(tier, limit)

    def copied(self, copy: Copy, crc: int | None) -> bool:
        """The bytes are in the slot, with this CRC32C; None: the slot cannot be written and is given up.

        False where the page has gone meanwhile: the slot's bytes are nobody's.
        """
        with self._lock:
            is_kept = self._cache.copies.made(copy, crc)
        self.wake()
        return is_kept

    def next_erasures(self, tier: Tier, limit: int) -> list[int]:
        """Slots of the tier whose pages a later process must not find, at most ``limit``; each is answered by
        ``erased``, by the thread that asked, before it asks again."""
        with self._lock:
            lower = self._cache.copies.tiers.get(tier)
            return [] if lower is None else lower.to_erase[:limit]

    def erased(self, tier: Tier, slot: int, *, is_done: bool) -> None:
        """is_done: False: the slot cannot be written and is given up."""
        with self._lock:
            self._cache.copies.tiers[tier].erased(slot, is_done=is_done)

    def next_restore(self, limit: int) -> Restore | None:
        """At most ``limit`` pages of one reservation to bring up; answered by ``restored`` before the next call."""
        with self._lock:
            return self._restores.next(limit)

    def restored(self, restore: Restore, num_good: int, damaged: Fetch | None = None) -> None:
        """The first ``num_good`` pages are present and verified. damaged: the one behind them does not match its
        checksum; without it, what lacks could not be read for another reason and is computed."""
        with self._lock:
            self._restores.done(restore, num_good, damaged)
        self.wake()

    def adopt(self, tier: Tier, pages: Iterable[StoredPage], *, deleted: Iterable[str] = ()) -> list[int]:
        """Take what an earlier process left in the tier; returns slots whose pages cannot be reached.

        Before anything else is in the caches; slots are below the tier's number of pages. A session ends with the page
        of its own that was written last. deleted: sessions that are no more: what only they have is erased.
        """
        orphans: list[int] = []
        latest: dict[str, tuple[int, PageNode]] = {}
        with self._lock:
            lower, found = self._cache.copies.tiers[tier], sorted(pages, key=lambda one: one.depth)
            lower.adopt({page.slot for page in found})
            for page in found:
                node = self._adopt(tier, page)
                if node is None:
                    lower.give_back(page.slot)
                    orphans.append(page.slot)
                elif page.session_id and page.order >= latest.get(page.session_id, (-1, node))[0]:
                    latest[page.session_id] = page.order, node
            doomed = set(deleted)
            for session_id, (_, node) in sorted(latest.items(), key=lambda item: item[1][0]):
                if session_id not in doomed:
                    self._cache.adopt_session(session_id, node)
            for session_id in doomed:
                self._cache.departures.delete(session_id)
            self._cache.departures.sweep()
        return orphans

    def state(self, tier: Tier) -> TierState:
        with self._lock:
            lower = self._cache.copies.tiers.get(tier)
            if lower is None:
                return TierState(num_pages=0, num_cached=0, num_superseded=0)
            num_superseded = self._cache.superseded.num_pages[tier]
            return TierState(num_pages=lower.num_pages, num_cached=lower.num_cached, num_superseded=num_superseded)

    def counts(self) -> dict[Tier, TierCounts]:
        """Of the device, and of each tier below that there is."""
        with self._lock:
            evicted = {tier: lower.num_evicted for tier, lower in self._cache.copies.tiers.items()}
            evicted[Tier.DEVICE] = self._cache.eviction.num_evicted
            damaged = self._cache.num_damaged
            return {tier: TierCounts(num_evicted=evicted[tier], num_damaged=damaged[tier]) for tier in evicted}

    @property
    def is_busy(self) -> bool:
        """Whether a copy or a restore is under way or waits."""
        with self._lock:
            return self._restores.is_busy or self._cache.copies.is_busy

    def wake(self) -> None:
        """Call ``on_work`` if there is something to do: this follows every step of the engine."""
        if self.on_work is not None and (self._restores.is_busy or self._cache.copies.is_waiting):
            self.on_work()

    def _adopt(self, tier: Tier, page: StoredPage) -> PageNode | None:
        tree, lower = self._cache.tree, self._cache.copies.tiers[tier]
        parent = tree.find(page.parent) if page.depth else None
        is_reachable = parent is not None and parent.depth == page.depth - 1 and tier in parent.copies
        if (page.depth and not is_reachable) or tree.find(page.digest) is not None:
            return None
        node = tree.insert(
            parent=parent,
            digest=page.digest,
            token_ids=page.token_ids,
            session_id=page.session_id,
            root=page.root,
        )
        lower.settle(node, StoredCopy(slot=page.slot, crc=page.crc))
        self._cache.sessions.entered(node)
        return node
