"""The prefix cache of a rank: pages that hold computed entries, in every tier, kept in step with each other.

- Only full, computed pages enter the prefix tree, and no page in the tree is ever written again. A session's last,
  partly filled page is cached as its tail.
- A page of the tree may be below the device only (``copies.py``).
- Whoever pins or leases a page of the tree does so with all pages before it: behind an idle page without a lease there
  are only such pages, and all of them can be evicted, leaves first, in the order of ``retention.eviction_key``.
- A page that is given back without a copy below stays until it has one, for a second at the most
  (``first_copies.py``): sequences that run come first, prompts wait.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

from seamount.workers.cache.copies import Copies
from seamount.workers.cache.departures import Departures
from seamount.workers.cache.eviction import Eviction
from seamount.workers.cache.eviction_order import EvictionOrder
from seamount.workers.cache.first_copies import FirstCopies
from seamount.workers.cache.leased import LeasedPages
from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode, PrefixTree
from seamount.workers.cache.retention import TIERS, Tier
from seamount.workers.cache.sessions import SessionBook, Tail
from seamount.workers.cache.superseded import SupersededPages


class PrefixCache:
    """Its parts are public: who holds the lock may ask each of them. Pages change hands through ``Holdings``.

    Not thread-safe: its owner holds the lock. clock: monotonic seconds. num_below: pages of each tier below.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        clock: Callable[[], float],
        num_below: Mapping[Tier, int] | None = None,
    ) -> None:
        self.page_size = page_size
        self._clock = clock
        self.num_damaged = dict.fromkeys(TIERS, 0)
        self.pool = PagePool(num_pages, on_use=self._use_changed)
        self.tree = PrefixTree()
        self.superseded = SupersededPages(self.pool)
        num_below = num_below or {}
        num_tokens = (num_pages + sum(num_below.values())) * page_size
        self.sessions = SessionBook(max_left_tokens=4 * num_tokens, on_change=self.superseded.note)
        order = EvictionOrder(
            pool=self.pool,
            tree=self.tree,
            sessions=self.sessions,
            superseded=self.superseded,
            page_size=page_size,
            clock=clock,
        )
        self.eviction = Eviction(self.pool, self.tree, key=order.of_page, evict=self._evict, clock=clock)
        self.leases = LeasedPages(self.pool, self.sessions)
        self.first_copies = FirstCopies(self.pool)
        self.copies = Copies(
            num_below,
            key=order.of_copy,
            is_superseded=self.superseded.holds,
            on_copied=self._copied,
            on_refused=lambda node: self.first_copies.end([node]),
            on_gone=self._forget,
            on_change=self.superseded.note,
            clock=clock,
        )
        self.departures = Departures(
            pool=self.pool,
            sessions=self.sessions,
            leases=self.leases,
            first_copies=self.first_copies,
            eviction=self.eviction,
            evict=self._evict,
            drop_tail=self.drop_tail,
            erase=self._erase,
            clock=clock,
        )

    # ---- pages of the device

    def allocate(self, num_pages: int) -> list[int]:
        """Free pages, pinned. The caller has made sure that so many are available."""
        if self.pool.num_free < num_pages:
            self.eviction.make_room(num_pages)
        return [self.pool.take() for _ in range(num_pages)]

    def keep(self, page: int) -> None:
        """One reference less; the page stays cached for whoever comes for it."""
        now = self._clock()
        self.pool.unpin(page, cached=True, now=now)
        self.eviction.note_leaf(page)
        node = self.tree.at(page)
        if node is not None:
            node.used_at = now
            self.copies.want(node)

    def leave_device(self, node: PageNode) -> None:
        """The node leaves the device, where nothing is behind it; the caller gives its page back to the pool."""
        self.tree.leave_device(node)
        self.superseded.note(node)
        if node.parent is not None and node.parent.page is not None:
            self.eviction.note_leaf(node.parent.page)
        if not node.copies:
            self._forget(node)

    def drop_tail(self, tail: Tail) -> None:
        """The page of the session's tail is no longer that, nor leased as such."""
        self.sessions.drop_tail(tail)
        self.leases.drop_tail(tail)
        if tail.parent is not None and tail.parent.page is not None:
            self.eviction.note_leaf(tail.parent.page)

    # ---- copies below the device

    def lose_copy(self, node: PageNode, tier: Tier) -> None:
        """The page's bytes in the tier are damaged: that copy goes, and with it what lies behind it there."""
        self.num_damaged[tier] += 1
        dead = self.copies.behind(node, tier)
        leases = self.leases.of(dead)
        for _, lease in leases:
            self.leases.uncover(lease)
        for one in dead:
            self.copies.drop(one, tier)
        for record, lease in leases:
            self.leases.cover(record, lease)

    # ---- sessions

    def trim(self) -> None:
        """Forget the sessions that are beyond the bounds; their full pages stay, as superseded ones."""
        for tail in self.sessions.trim():
            self.pool.free_idle(tail.page)
            if tail.parent is not None and tail.parent.page is not None:
                self.eviction.note_leaf(tail.parent.page)

    def adopt_session(self, session_id: str, last: PageNode) -> None:
        """A session whose pages an earlier process left here, up to ``last``."""
        chain = [last]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        chain.reverse()
        token_ids, now = array("I"), self._clock()
        for node in chain:
            token_ids.frombytes(node.token_ids)
            node.used_at = now
        self.sessions.remember(session_id, token_ids, last.root)
        self.sessions.pass_through(session_id, chain)
        record = self.sessions.touch(session_id)
        record.left_at, record.num_requests = now, 1  # at the least
        self.departures.adopted(session_id)
        self.trim()

    # ---- what the parts call

    def _evict(self, page: int) -> int | None:
        """The page leaves the device, and what has no copy is forgotten; returns the page before it."""
        node = self.tree.at(page)
        if node is None:
            tail = self.sessions.tail_at(page)
            parent = tail.parent
            self.drop_tail(tail)
        else:
            parent = node.parent
            self.leave_device(node)
        self.pool.free_idle(page)
        return None if parent is None else parent.page

    def _erase(self, node: PageNode) -> None:
        """A page that nobody uses leaves every tier."""
        for tier in tuple(node.copies):
            self.copies.drop(node, tier)
        if node.page is not None:
            page = node.page
            self.leave_device(node)
            self.pool.free_idle(page)

    def _forget(self, node: PageNode) -> None:
        """No tier has it any more."""
        self.tree.remove(node)
        self.sessions.gone(node)

    def _use_changed(self, page: int) -> None:
        node = self.tree.at(page)
        if node is not None:
            self.superseded.note(node)

    def _copied(self, node: PageNode) -> None:
        self.leases.copied(node)
        self.first_copies.copied(node)
