"""Who holds which pages: the pool, the prefix tree and the session tails kept in step.

- Only full, computed pages enter the prefix tree, and no page in the tree is ever written again. At most
  ``(len - 1) // page_size`` pages of a prompt are taken from it, so that the last prompt token, which is always
  computed, never falls into a shared page. A partly filled page belongs to one reservation, or to one session as its
  tail.
- A page of the tree may be below the device only (``copies.py``): a reservation then has a page of its own for it,
  into which it is restored (``restores.py``).
- Whoever pins or leases a page of the tree does so with all pages before it: behind an idle page without a lease there
  are only such pages, and all of them can be evicted, leaves first, in the order of ``retention.eviction_key``.
- A page that is given back without a copy below stays until it has one, for a second at the most
  (``first_copies.py``): sequences that run come first, prompts wait.
- Two sequences that compute the same page at once: the first one's enters the tree, the second pins that one too and
  reads its own copy until it ends, since a step or a transfer may be using it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from seamount.wire.hashes import page_hashes
from seamount.workers.cache.copies import Copies
from seamount.workers.cache.departures import Departures
from seamount.workers.cache.eviction import Eviction
from seamount.workers.cache.first_copies import FirstCopies
from seamount.workers.cache.leased import LeasedPages
from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode, PrefixTree
from seamount.workers.cache.reservation import Reservation, common_prefix_len
from seamount.workers.cache.retention import PERSON, REFUSED, TIERS, Candidate, Tier, eviction_key
from seamount.workers.cache.sessions import SessionBook, Tail
from seamount.workers.cache.superseded import SupersededPages


class Holdings:
    """Not thread-safe: its owner holds the lock. clock: monotonic seconds. num_below: pages of each tier below."""

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
        self.eviction = Eviction(self.pool, self.tree, key=self._page_key, evict=self._evict, clock=clock)
        num_below = num_below or {}
        num_tokens = (num_pages + sum(num_below.values())) * page_size
        self.sessions = SessionBook(max_left_tokens=4 * num_tokens, on_change=self.superseded.note)
        self.leases = LeasedPages(self.pool, self.sessions)
        self.first_copies = FirstCopies(self.pool)
        self.copies = Copies(
            num_below,
            key=self._tier_key,
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
            drop_tail=self._drop_tail,
            erase=self._erase,
            clock=clock,
        )

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
            if not reservation.is_spare:
                record.comes(reservation.turn_id)
            record.salt = reservation.salt
            self.leases.come_for(reservation.session_id, [*reservation.nodes, *reservation.to_restore])

    def expect(self, session_id: str) -> None:
        """A turn of the session was refused for want of pages: it comes again soon."""
        record = self.sessions.get(session_id)
        if record is not None:
            record.wait = REFUSED
            for node in record.chain:
                node.used_at = self._clock()

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
            if tail.parent is not None and tail.parent.page is not None:
                self.eviction.note_leaf(tail.parent.page)

    # ---- taking pages

    def assign(self, reservation: Reservation, token_ids: array[int]) -> bool:
        """Pin what is cached of ``token_ids``, allocate for the rest and one token more; False if there is no room.

        Sets ``pages``, ``nodes``, ``num_found``, ``computed_len``, ``to_restore``, or nothing; the reservation holds no
        pages before.
        """
        packed = memoryview(token_ids).cast("B")
        found = self.tree.match(reservation.digests, packed, self.page_size * 4, (len(token_ids) - 1) // self.page_size)
        nodes = [node for node in found if node.page is not None]
        below = found[len(nodes) :]
        found_len = len(nodes) * self.page_size
        tail = None if below else self._usable_tail(reservation, nodes)
        num_from_tail = 0
        if tail is not None:
            rest = token_ids[found_len : min(found_len + len(tail.token_ids), len(token_ids) - 1)]
            num_from_tail = common_prefix_len(tail.token_ids, rest)
        pages = _pages(nodes)
        self.first_copies.end_late(self._clock())
        num_missing = len(token_ids) // self.page_size + 1 - len(nodes) - (num_from_tail > 0)
        hits = [page for page in pages if self.pool.is_idle(page)]
        if tail is not None and num_from_tail > 0:
            hits.append(tail.page)
        if num_missing > self.pool.num_available - sum(1 for page in hits if not self.pool.num_leases(page)):
            return False
        if reservation.is_spare and not self.eviction.make_room_of_cold_pages(num_missing, keep=hits):
            return False
        for page in pages:
            self.pool.pin(page)
        if tail is not None and num_from_tail > 0:
            self._drop_tail(tail)
            self.pool.pin(tail.page)
            pages.append(tail.page)
        for node in below:
            node.num_wanted += 1
        reservation.nodes, reservation.num_found = nodes, len(found)
        reservation.to_restore = deque(below)
        reservation.pages = pages + self._allocate(num_missing)
        reservation.computed_len = found_len + num_from_tail
        return True

    def pin(self, reservation: Reservation, token_ids: array[int]) -> None:
        """Pin the full pages that are cached of ``token_ids``; allocate for those that are to be restored, as far as
        there is room, and for nothing else."""
        packed, size = memoryview(token_ids).cast("B"), self.page_size
        found = self.tree.match(reservation.digests, packed, size * 4, len(token_ids) // size)
        nodes = [node for node in found if node.page is not None]
        pages = _pages(nodes)
        for page in pages:
            self.pool.pin(page)
        below = found[len(nodes) :][: self.pool.num_available]
        for node in below:
            node.num_wanted += 1
        reservation.nodes, reservation.num_found = nodes, len(nodes) + len(below)
        reservation.to_restore = deque(below)
        reservation.pages = pages + self._allocate(len(below))
        reservation.computed_len = len(nodes) * size

    def grow(self, reservation: Reservation, num_pages: int) -> bool:
        """Let it hold ``num_pages``; or change nothing and say False."""
        num_missing = num_pages - len(reservation.pages)
        if num_missing <= 0:
            return True
        if num_missing > self.pool.num_available:
            if num_missing > self.pool.num_available + self.first_copies.num_idle:
                return False
            while num_missing > self.pool.num_available:
                self.first_copies.end_oldest()
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
            self.eviction.make_room(num_pages)
        return [self.pool.take() for _ in range(num_pages)]

    # ---- evicting

    def _page_key(self, page: int) -> tuple[int, float]:
        node = self.tree.at(page)
        if node is not None:
            return self._tier_key(node, Tier.DEVICE)
        tail = self.sessions.tail_at(page)
        first = 0 if tail.parent is None else (tail.parent.depth + 1) * self.page_size
        end, idle_s = first + len(tail.token_ids), self._clock() - self.pool.idle_since(page)
        record = self.sessions.get(tail.session_id)
        waits = (PERSON if record is None else record.wait,)
        return eviction_key(Candidate(first=first, end=end, waits=waits, is_superseded=False, idle_s=idle_s))

    def _tier_key(self, node: PageNode, tier: Tier) -> tuple[int, float]:
        """What the page's copy in the tier is worth, there or to come."""
        is_used = node.page is not None and not self.pool.is_idle(node.page)
        others = [other for other in TIERS if other in node.copies and other is not tier]
        copy = Tier.DEVICE if is_used and tier is not Tier.DEVICE else others[0] if others else None
        is_leased = node.leased_in is not None and TIERS.index(node.leased_in) <= TIERS.index(tier)
        return eviction_key(
            Candidate(
                first=node.depth * self.page_size,
                end=(node.depth + 1) * self.page_size,
                waits=self.sessions.waits(node),
                is_superseded=self.superseded.holds(node),
                idle_s=0.0 if is_used else self._clock() - node.used_at,
                tier=tier,
                copy=copy,
                is_leased=is_leased,
            )
        )

    def _evict(self, page: int) -> int | None:
        """The page leaves the device, and what has no copy is forgotten; returns the page before it."""
        node = self.tree.at(page)
        if node is None:
            tail = self.sessions.tail_at(page)
            parent = tail.parent
            self._drop_tail(tail)
        else:
            parent = node.parent
            self._leave_device(node)
        self.pool.free_idle(page)
        return None if parent is None else parent.page

    def _leave_device(self, node: PageNode) -> None:
        self.tree.leave_device(node)
        self.superseded.note(node)
        if node.parent is not None and node.parent.page is not None:
            self.eviction.note_leaf(node.parent.page)
        if not node.copies:
            self._forget(node)

    def _drop_tail(self, tail: Tail) -> None:
        """The page of the session's tail is no longer that, nor leased as such."""
        self.sessions.drop_tail(tail)
        self.leases.drop_tail(tail)
        if tail.parent is not None and tail.parent.page is not None:
            self.eviction.note_leaf(tail.parent.page)

    def _forget(self, node: PageNode) -> None:
        """No tier has it any more."""
        self.tree.remove(node)
        self.sessions.gone(node)

    def _use_changed(self, page: int) -> None:
        node = self.tree.at(page)
        if node is not None:
            self.superseded.note(node)

    def _erase(self, node: PageNode) -> None:
        """A page that nobody uses leaves every tier."""
        for tier in tuple(node.copies):
            self.copies.drop(node, tier)
        if node.page is not None:
            page = node.page
            self._leave_device(node)
            self.pool.free_idle(page)

    # ---- copies below the device

    def _copied(self, node: PageNode) -> None:
        self.leases.copied(node)
        self.first_copies.copied(node)

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
            page, num_before = reservation.pages[index], len(self.tree)
            node = self.tree.add(
                parent=reservation.nodes[-1] if index else None,
                digest=reservation.digests[index],
                token_ids=token_ids.tobytes(),
                page=page,
                session_id=reservation.session_id,
                root=reservation.root,
                for_session=reservation.for_session,
            )
            if node is None:  # another page's tokens have this hash: this sequence's pages stay its own from here on
                return
            if len(self.tree) > num_before:
                self.sessions.entered(node)
            self.superseded.note(node)  # it was below the device, perhaps
            if node.page is not None and node.page != page:
                self.pool.pin(node.page)
            self.copies.want(node)
            reservation.nodes.append(node)

    # ---- giving pages back

    def give_back(self, reservation: Reservation, end: int) -> None:
        """Give all pages back, deepest first; entries before ``end`` stay cached, those beyond if others share them.

        The page that ``end`` cuts becomes the session's tail, unless it stays in the tree, the session has gone on, or
        its next turn does not reach that far: what lies behind ``num_reused_pages`` is superseded from now on.
        """
        record = self.sessions.get(reservation.session_id)
        is_latest = record is not None and record.latest_id == reservation.id
        num_full = end // self.page_size
        has_tail = is_latest and (reservation.num_reused_pages is None or num_full < reservation.num_reused_pages)
        chain = reservation.nodes[:num_full]
        if end == len(reservation.nodes) * self.page_size:
            chain += reservation.not_restored  # still the session's, further down
        reused = chain[: reservation.num_reused_pages]
        if record is not None and is_latest:
            self.remember(reservation, max(end, len(chain) * self.page_size))
            if chain or end > 0:
                if record.tail is not None:
                    page = record.tail.page
                    self._drop_tail(record.tail)
                    self.pool.free_idle(page)
                self.sessions.pass_through(reservation.session_id, reused)
        for index in range(len(reservation.pages) - 1, -1, -1):
            is_tail = has_tail and index == num_full < end / self.page_size and index <= len(reservation.nodes)
            self._give_back_page(reservation, index, end if is_tail else None, is_kept=index < num_full)
        reservation.pages, reservation.nodes, reservation.not_restored = [], [], []
        reservation.num_found = reservation.computed_len = 0
        lease = self.sessions.leases.get(reservation.session_id)
        if record is not None and lease is not None and is_latest:
            self.leases.uncover(lease)
            self.leases.cover(record, lease)
        if self.copies.tiers:
            self.first_copies.hold(reused, self._clock())

    def _give_back_page(self, reservation: Reservation, index: int, tail_end: int | None, *, is_kept: bool) -> None:
        page = reservation.pages[index]
        node = reservation.nodes[index] if index < len(reservation.nodes) else None
        if node is not None and node.page == page:
            brought = index >= reservation.num_found
            is_leased = node.num_leases > 0 or self.pool.num_leases(page) > 0
            is_used = any(node.num_children.values()) or self.pool.refcount(page) > 1 or is_leased
            if is_kept or not brought or is_used:
                self._unpin_cached(page)
                return
            for tier in tuple(node.copies):
                self.copies.drop(node, tier)
            self._leave_device(node)
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
        if node is not None and node.page is not None:
            self._unpin_cached(node.page)

    def _unpin_cached(self, page: int) -> None:
        now = self._clock()
        self.pool.unpin(page, cached=True, now=now)
        self.eviction.note_leaf(page)
        node = self.tree.at(page)
        if node is not None:
            node.used_at = now
            self.copies.want(node)


def _pages(nodes: Sequence[PageNode]) -> list[int]:
    """Of pages that are on the device."""
    return [node.page for node in nodes if node.page is not None]
