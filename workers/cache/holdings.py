"""Who holds which pages: the pool, the prefix tree and the session tails kept in step.

- Only full, computed pages enter the prefix tree, and no page in the tree is ever written again. At most
  ``(len - 1) // page_size`` pages of a prompt are taken from it, so that the last prompt token, which is always
  computed, never falls into a shared page. A partly filled page belongs to one reservation, or to one session as its
  tail.
- Whoever pins or leases a page of the tree does so with all pages before it: behind an idle page without a lease there
  are only such pages, and all of them can be evicted, leaves first, in the order of ``retention.eviction_key``.
- Two sequences that compute the same page at once: the first one's enters the tree, the second pins that one too and
  reads its own copy until it ends, since a step or a transfer may be using it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from seamount.wire.hashes import page_hashes
from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode, PrefixTree
from seamount.workers.cache.reservation import Reservation, common_prefix_len
from seamount.workers.cache.retention import Candidate, eviction_key
from seamount.workers.cache.sessions import Lease, SessionBook, SessionRecord, Tail

AGE_WEIGHT = 1 / 64
"""Of one evicted page, in the smoothed age."""


class Holdings:
    """Not thread-safe: its owner holds the lock. clock: monotonic seconds."""

    def __init__(self, *, num_pages: int, page_size: int, clock: Callable[[], float]) -> None:
        self.page_size = page_size
        self._clock = clock
        self._leaves: dict[int, None] = {}
        """Every idle page with nothing cached behind it, and pages that were such before."""
        self._evicted_age_s, self._evicted_at = 0.0, -math.inf
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree()
        self.sessions = SessionBook(max_left_tokens=4 * num_pages * page_size)

    # ---- the session beside the pages

    def compare(self, reservation: Reservation, token_ids: array[int], now: float) -> None:
        """Set ``common_len``, ``left_len`` and ``idle_s``: what the session left here, beside ``token_ids``."""
        record = self.sessions.get(reservation.session_id)
        if record is not None and record.left_root == reservation.root:
            reservation.common_len = common_prefix_len(record.left, token_ids)
            reservation.left_len = len(record.left)
            reservation.idle_s = now - record.left_at if record.left_at is not None else 0.0

    def begin(self, reservation: Reservation) -> None:
        if reservation.session_id:
            record = self.sessions.touch(reservation.session_id)
            record.live_id = record.latest_id = reservation.id

    def remember(self, reservation: Reservation, end: int) -> None:
        """The session leaves the entries of its first ``end`` tokens here."""
        if reservation.session_id:
            left = array("I", reservation.token_ids[:end])
            self.sessions.remember(reservation.session_id, left, reservation.root)

    def end(self, reservation: Reservation, now: float) -> None:
        """The session has no live reservation any more."""
        record = self.sessions.get(reservation.session_id)
        if record is not None and record.live_id == reservation.id:
            record.live_id, record.left_at = None, now
            self.trim()

    def trim(self) -> None:
        """Forget the sessions that are beyond the bounds; their full pages stay, as superseded ones."""
        for tail in self.sessions.trim():
            self.pool.free_idle(tail.page)
            if tail.parent is not None:
                self._note_leaf(tail.parent.page)

    # ---- taking pages

    def assign(self, reservation: Reservation, token_ids: array[int]) -> bool:
        """Pin what is cached of ``token_ids``, allocate for the rest and one token more; False if there is no room.

        Sets ``pages``, ``nodes``, ``num_found``, ``computed_len``, or nothing; the reservation holds no pages before.
        """
        packed = memoryview(token_ids).cast("B")
        nodes = self.tree.match(reservation.digests, packed, self.page_size * 4, (len(token_ids) - 1) // self.page_size)
        found_len = len(nodes) * self.page_size
        tail = self._usable_tail(reservation, nodes)
        num_from_tail = 0
        if tail is not None:
            rest = token_ids[found_len : min(found_len + len(tail.token_ids), len(token_ids) - 1)]
            num_from_tail = common_prefix_len(tail.token_ids, rest)
        num_missing = len(token_ids) // self.page_size + 1 - len(nodes) - (num_from_tail > 0)
        hits = [node.page for node in nodes if self.pool.is_idle(node.page)]
        if tail is not None and num_from_tail > 0:
            hits.append(tail.page)
        if num_missing > self.pool.num_available - sum(1 for page in hits if not self.pool.num_leases(page)):
            return False
        for node in nodes:
            self.pool.pin(node.page)
        pages = [node.page for node in nodes]
        if tail is not None and num_from_tail > 0:
            self._drop_tail(tail)
            self.pool.pin(tail.page)
            pages.append(tail.page)
        reservation.nodes, reservation.num_found = nodes.copy(), len(nodes)
        reservation.pages = pages + self._allocate(num_missing)
        reservation.computed_len = found_len + num_from_tail
        return True

    def grow(self, reservation: Reservation, num_pages: int) -> bool:
        """Let it hold ``num_pages``; or change nothing and say False."""
        num_missing = num_pages - len(reservation.pages)
        if num_missing > self.pool.num_available:
            return False
        if num_missing > 0:
            reservation.pages.extend(self._allocate(num_missing))
        return True

    def _usable_tail(self, reservation: Reservation, nodes: list[PageNode]) -> Tail | None:
        record = self.sessions.get(reservation.session_id)
        if record is None or record.tail is None or record.tail.root != reservation.root:
            return None
        return record.tail if record.tail.parent is (nodes[-1] if nodes else None) else None

    def _allocate(self, num_pages: int) -> list[int]:
        """The caller has made sure that so many are available."""
        if self.pool.num_free < num_pages:
            self._evict_until(num_pages)
        return [self.pool.take() for _ in range(num_pages)]

    # ---- evicting

    def _evict_until(self, num_free: int) -> None:
        now = self._clock()
        self._leaves = {page: None for page in self._leaves if self._is_leaf(page)}
        order = [(*self._eviction_key(page, now), page) for page in self._leaves if not self.pool.num_leases(page)]
        heapify(order)
        while self.pool.num_free < num_free:
            is_current, _, page = heappop(order)
            if is_current:  # superseded pages go at any age
                self._note_age(now - self.pool.idle_since(page), now)
            parent = self._evict(page)
            if parent is not None and self._is_leaf(parent.page) and not self.pool.num_leases(parent.page):
                heappush(order, (*self._eviction_key(parent.page, now), parent.page))

    def _note_age(self, age_s: float, now: float) -> None:
        known_s = max(self._evicted_age_s, now - self._evicted_at)
        self._evicted_age_s = age_s if math.isinf(known_s) else known_s + AGE_WEIGHT * (age_s - known_s)
        self._evicted_at = now

    def eviction_age_s(self, now: float) -> float:
        """How long pages that are evicted have been idle, smoothed; at least the time since the last one was; inf while
        pages are free or none was evicted yet."""
        return math.inf if self.pool.num_free else max(self._evicted_age_s, now - self._evicted_at)

    def _is_leaf(self, page: int) -> bool:
        node = self.tree.at(page)
        return self.pool.is_idle(page) and (node is None or node.num_children == 0)

    def _eviction_key(self, page: int, now: float) -> tuple[bool, float]:
        node, size = self.tree.at(page), self.page_size
        idle_s = now - self.pool.idle_since(page)
        if node is not None:
            first, end = node.depth * size, (node.depth + 1) * size
            is_superseded = bool(node.session_id) and node.num_sessions == 0
            candidate = Candidate(
                first=first, end=end, num_sessions=node.num_sessions, is_superseded=is_superseded, idle_s=idle_s
            )
            return eviction_key(candidate)
        tail = self.sessions.tail_at(page)
        first = 0 if tail.parent is None else (tail.parent.depth + 1) * size
        end = first + len(tail.token_ids)
        return eviction_key(Candidate(first=first, end=end, num_sessions=1, is_superseded=False, idle_s=idle_s))

    def _evict(self, page: int) -> PageNode | None:
        """Forget a leaf; returns the page before it."""
        node = self.tree.at(page)
        if node is not None:
            parent = node.parent
            self._forget(node)
        else:
            tail = self.sessions.tail_at(page)
            parent = tail.parent
            self._drop_tail(tail)
        self.pool.free_idle(page)
        return parent

    def _note_leaf(self, page: int) -> None:
        """The page may have become an idle leaf."""
        if self._is_leaf(page):
            self._leaves.pop(page, None)  # to the end: of equals, the one that came first goes first
            self._leaves[page] = None

    def _drop_tail(self, tail: Tail) -> None:
        """The page of the session's tail is no longer that, nor leased as such."""
        self.sessions.drop_tail(tail)
        lease = self.sessions.leases.get(tail.session_id)
        if lease is not None and tail.page in lease.pages:
            lease.pages.remove(tail.page)
            self.pool.unlease(tail.page)
        if tail.parent is not None:
            self._note_leaf(tail.parent.page)

    def _forget(self, node: PageNode) -> None:
        self.tree.remove(node)
        self.sessions.count_tree_page(node.session_id, -1)
        if node.parent is not None:
            self._note_leaf(node.parent.page)

    # ---- leases

    def lease(self, session_id: str, lease: Lease) -> None:
        """Keep what the session leaves here, in the place of an earlier lease. Its record exists."""
        self.end_lease(session_id)
        self.sessions.leases[session_id] = lease
        record = self.sessions.touch(session_id)
        if record.live_id is None:
            self._cover(record, lease)

    def end_lease(self, session_id: str) -> None:
        """Harmless where there is none."""
        lease = self.sessions.leases.pop(session_id, None)
        if lease is not None:
            self._uncover(lease)

    def leaves(self) -> set[int]:
        """Idle pages with nothing cached behind them."""
        return {page for page in self._leaves if self._is_leaf(page)}

    def left_pages(self, record: SessionRecord) -> list[int]:
        """Pages that hold what the session left here, from the first on, as far as they are still here."""
        pages: list[int] = []
        for node in record.chain:
            if self.tree.at(node.page) is not node:
                return pages
            pages.append(node.page)
        if record.tail is not None and record.tail.parent is (record.chain[-1] if record.chain else None):
            pages.append(record.tail.page)
        return pages

    def _cover(self, record: SessionRecord, lease: Lease) -> None:
        lease.pages = self.left_pages(record)[: lease.max_pages]
        for page in lease.pages:
            self.pool.lease(page)

    def _uncover(self, lease: Lease) -> None:
        for page in lease.pages:
            self.pool.unlease(page)
        lease.pages = []

    # ---- filling pages

    def advance(self, reservation: Reservation, computed_len: int) -> None:
        """Entries before ``computed_len`` are present: every page that is now full enters the tree."""
        reservation.computed_len = max(reservation.computed_len, computed_len)
        size = self.page_size
        while (index := len(reservation.nodes)) < reservation.computed_len // size:
            token_ids = array("I", reservation.token_ids[index * size : (index + 1) * size])
            if index == len(reservation.digests):
                parent_digest = reservation.digests[-1] if index else reservation.root
                reservation.digests.extend(page_hashes(parent_digest, token_ids, size))
            page = reservation.pages[index]
            node = self.tree.add(
                parent=reservation.nodes[-1] if index else None,
                digest=reservation.digests[index],
                token_ids=token_ids.tobytes(),
                page=page,
                session_id=reservation.session_id,
            )
            if node is None:  # another page's tokens have this hash: this sequence's pages stay its own from here on
                return
            if node.page == page:
                self.sessions.count_tree_page(node.session_id, 1)
            else:
                self.pool.pin(node.page)
            reservation.nodes.append(node)

    # ---- giving pages back

    def give_back(self, reservation: Reservation, end: int) -> None:
        """Give all pages back, deepest first; entries before ``end`` stay cached, those beyond if others share them.

        The page that ``end`` cuts becomes the session's tail, unless it stays in the tree or the session has gone on.
        """
        record = self.sessions.get(reservation.session_id)
        is_latest = record is not None and record.latest_id == reservation.id
        num_full = end // self.page_size
        if record is not None and is_latest:
            self.remember(reservation, end)
            if end > 0:
                if record.tail is not None:
                    page = record.tail.page
                    self._drop_tail(record.tail)
                    self.pool.free_idle(page)
                self.sessions.pass_through(reservation.session_id, reservation.nodes[:num_full])
        for index in range(len(reservation.pages) - 1, -1, -1):
            is_tail = is_latest and index == num_full < end / self.page_size and index <= len(reservation.nodes)
            self._give_back_page(reservation, index, end if is_tail else None, is_kept=index < num_full)
        reservation.pages, reservation.nodes = [], []
        reservation.num_found = reservation.computed_len = 0
        lease = self.sessions.leases.get(reservation.session_id)
        if record is not None and lease is not None and is_latest:
            self._uncover(lease)
            self._cover(record, lease)

    def _give_back_page(self, reservation: Reservation, index: int, tail_end: int | None, *, is_kept: bool) -> None:
        page = reservation.pages[index]
        node = reservation.nodes[index] if index < len(reservation.nodes) else None
        if node is not None and node.page == page:
            brought = index >= reservation.num_found
            is_used = node.num_children > 0 or self.pool.refcount(page) > 1 or self.pool.num_leases(page) > 0
            if is_kept or not brought or is_used:
                self._unpin_cached(page)
                return
            self._forget(node)
            node = None
        if tail_end is not None:
            token_ids = array("I", reservation.token_ids[index * self.page_size : tail_end])
            parent = reservation.nodes[index - 1] if index else None
            self.sessions.keep_tail(
                Tail(
                    session_id=reservation.session_id,
                    page=page,
                    root=reservation.root,
                    parent=parent,
                    token_ids=token_ids,
                )
            )
        if tail_end is None:
            self.pool.unpin(page, cached=False)
        else:
            self._unpin_cached(page)
        if node is not None:
            self._unpin_cached(node.page)

    def _unpin_cached(self, page: int) -> None:
        self.pool.unpin(page, cached=True, now=self._clock())
        self._note_leaf(page)
