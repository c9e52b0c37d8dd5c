"""The pages that leases keep.

A lease keeps pages in the tree. They may leave the device once the last of them has a copy below, with it all before
it; until then they are leased in the pool, and so is the session's tail. The tail has no copies: it may go as soon as
the pages before it may.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import TIERS, Tier
from seamount.workers.cache.sessions import Lease, SessionBook, SessionRecord, Tail


class LeasedPages:
    """Not thread-safe: its owner holds the lock."""

    def __init__(self, pool: PagePool, sessions: SessionBook) -> None:
        self._pool, self._sessions = pool, sessions
        self._by_last: dict[PageNode, list[Lease]] = {}
        self.num_pages: Counter[Tier] = Counter()
        """By the tier that the lease names; a page of several leases counts once, in the highest."""

    def give(self, session_id: str, lease: Lease) -> None:
        """Keep what the session leaves here, in the place of an earlier lease. Its record exists."""
        self.end(session_id)
        self._sessions.leases[session_id] = lease
        record = self._sessions.touch(session_id)
        if record.live_id is None:
            self.cover(record, lease)

    def end(self, session_id: str) -> None:
        """Harmless where there is none."""
        lease = self._sessions.leases.pop(session_id, None)
        if lease is not None:
            self.uncover(lease)

    def left(self, record: SessionRecord) -> tuple[list[PageNode], Tail | None]:
        """Pages that hold what the session left here, from the first on, as far as they are still in some tier."""
        nodes: list[PageNode] = []
        for node in record.chain:
            if node.page is None and not node.copies:
                return nodes, None
            nodes.append(node)
        tail = record.tail
        return nodes, tail if tail is not None and tail.parent is (nodes[-1] if nodes else None) else None

    def cover(self, record: SessionRecord, lease: Lease) -> None:
        nodes, tail = self.left(record)
        lease.nodes = nodes[: lease.max_pages]
        for node in lease.nodes:
            self._count(node, lease.tier)
        last = lease.nodes[-1] if lease.nodes else None
        if last is not None:
            self._by_last.setdefault(last, []).append(lease)
        if last is None or not last.copies:
            lease.pages = [node.page for node in lease.nodes if node.page is not None]
            if tail is not None and len(nodes) < lease.max_pages:
                lease.pages.append(tail.page)
                self.num_pages[lease.tier] += 1
            for page in lease.pages:
                self._pool.lease(page)

    def come_for(self, session_id: str, nodes: Collection[PageNode]) -> None:
        """The session's turn holds these pages. Where all that its lease keeps are among them, they need no keeping,
        and no room for copies, before they are given back."""
        lease = self._sessions.leases.get(session_id)
        if lease is not None and set(lease.nodes) <= set(nodes):
            self.uncover(lease)

    def uncover(self, lease: Lease) -> None:
        self._let_go(lease)
        for node in lease.nodes:
            node.num_leases -= 1
            if node.num_leases == 0:
                assert node.leased_in is not None
                self.num_pages[node.leased_in] -= 1
                node.leased_in = None
        if lease.nodes:
            with_last = self._by_last[lease.nodes[-1]]
            with_last.remove(lease)
            if not with_last:
                del self._by_last[lease.nodes[-1]]
        lease.nodes = []

    def copied(self, node: PageNode) -> None:
        """The page has a copy below the device: leases that end with it let their pages leave the device."""
        for lease in self._by_last.get(node, ()):
            self._let_go(lease)

    def drop_tail(self, tail: Tail) -> None:
        """The page of the session's tail is no longer that."""
        lease = self._sessions.leases.get(tail.session_id)
        if lease is not None and tail.page in lease.pages:
            lease.pages.remove(tail.page)
            self._pool.unlease(tail.page)
            self.num_pages[lease.tier] -= 1

    def of(self, nodes: Collection[PageNode]) -> list[tuple[SessionRecord, Lease]]:
        """The leases that keep one of these pages."""
        found: list[tuple[SessionRecord, Lease]] = []
        for session_id, lease in self._sessions.leases.items():
            record = self._sessions.get(session_id)
            if record is not None and any(node in nodes for node in lease.nodes):
                found.append((record, lease))
        return found

    def _let_go(self, lease: Lease) -> None:
        self.num_pages[lease.tier] -= lease.num_tail_pages
        for page in lease.pages:
            self._pool.unlease(page)
        lease.pages = []

    def _count(self, node: PageNode, tier: Tier) -> None:
        node.num_leases += 1
        if node.leased_in is None or TIERS.index(tier) < TIERS.index(node.leased_in):
            if node.leased_in is not None:
                self.num_pages[node.leased_in] -= 1
            self.num_pages[tier] += 1
            node.leased_in = tier
