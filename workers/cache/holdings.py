"""Which reservation holds which pages of the prefix cache: pages are taken, filled and given back here.

- At most ``(len - 1) // page_size`` pages of a prompt are taken from the tree, so that the last prompt token, which is
  always computed, never falls into a shared page. A partly filled page belongs to one reservation, or to one session as
  its tail.
- For a page that is below the device only a reservation has a page of its own, into which it is restored
  (``restores.py``).
- Two sequences that compute the same page at once: the first one's enters the tree, the second pins that one too and
  reads its own copy until it ends, since a step or a transfer may be using it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from seamount.wire.hashes import page_hashes
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation, common_prefix_len
from seamount.workers.cache.retention import REFUSED
from seamount.workers.cache.sessions import Tail


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Match:
    """What is cached of a prompt. nodes: its first full pages, on the device; below: those behind them, in other tiers;
    tail: the session's, where its first ``tail_len`` entries come next; pages: of nodes and tail, in order."""

    nodes: list[PageNode]
    below: list[PageNode]
    tail: Tail | None = None
    tail_len: int = 0
    pages: list[int]


class Holdings:
    """Not thread-safe: its owner holds the lock. clock: monotonic seconds."""

    def __init__(self, cache: PrefixCache, *, clock: Callable[[], float]) -> None:
        self.page_size = cache.page_size
        self._cache, self._clock = cache, clock

    # ---- the session beside the pages

    def compare(self, reservation: Reservation, token_ids: array[int], now: float) -> None:
        """Set ``common_len``, ``left_len`` and ``idle_s``: what the session left here, beside ``token_ids``."""
        record = self._cache.sessions.get(reservation.session_id)
        if record is not None and record.left_root == reservation.root:
            reservation.common_len = common_prefix_len(record.left, token_ids)
            reservation.left_len = len(record.left)
            reservation.idle_s = now - record.left_at if record.left_at is not None else 0.0

    def begin(self, reservation: Reservation) -> None:
        if reservation.session_id:
            record = self._cache.sessions.touch(reservation.session_id)
            record.live_id = record.latest_id = reservation.id
            if not reservation.is_spare:
                record.comes(reservation.turn_id)
            record.salt = reservation.salt
            self._cache.leases.come_for(reservation.session_id, [*reservation.nodes, *reservation.to_restore])

    def expect(self, session_id: str) -> None:
        """A turn of the session was refused for want of pages: it comes again soon."""
        record = self._cache.sessions.get(session_id)
        if record is not None:
            record.wait = REFUSED
            for node in record.chain:
                node.used_at = self._clock()

    def remember(self, reservation: Reservation, end: int) -> None:
        """The session leaves the entries of its first ``end`` tokens here."""
        if reservation.session_id:
            left = array("I", reservation.token_ids[:end])
            self._cache.sessions.remember(reservation.session_id, left, reservation.root)

    def end(self, reservation: Reservation, now: float) -> None:
        """The session has no live reservation any more."""
        record = self._cache.sessions.get(reservation.session_id)
        if record is not None and record.live_id == reservation.id:
            record.live_id, record.left_at = None, now
            self._cache.trim()

    # ---- taking pages

    def assign(self, reservation: Reservation, token_ids: array[int]) -> bool:
        """Pin what is cached of ``token_ids``, allocate for the rest and one token more; False if there is no room.

        Sets ``pages``, ``nodes``, ``num_found``, ``computed_len``, ``to_restore``, or nothing; the reservation holds no
        pages before.
        """
        match = self._match(reservation, token_ids, (len(token_ids) - 1) // self.page_size)
        match = self._with_tail(match, reservation, token_ids)
        self._cache.first_copies.end_late(self._clock())
        num_missing = len(token_ids) // self.page_size + 1 - len(match.pages)
        if num_missing > self._num_available_beside(match):
            return False
        if reservation.is_spare and not self._cache.eviction.make_room_of_cold_pages(num_missing, keep=match.pages):
            return False
        self._take(reservation, match, num_missing)
        return True

    def pin(self, reservation: Reservation, token_ids: array[int]) -> None:
        """Pin the full pages that are cached of ``token_ids``; allocate for those that are to be restored, as far as
        there is room, and for nothing else."""
        match = self._match(reservation, token_ids, len(token_ids) // self.page_size)
        below = match.below[: self._num_available_beside(match)]
        self._take(reservation, replace(match, below=below), len(below))

    def grow(self, reservation: Reservation, num_pages: int) -> bool:
        """Let it hold ``num_pages``; or change nothing and say False."""
        num_missing = num_pages - len(reservation.pages)
        if num_missing <= 0:
            return True
        if num_missing > self._cache.pool.num_available:
            if num_missing > self._cache.pool.num_available + self._cache.first_copies.num_idle:
                return False
            while num_missing > self._cache.pool.num_available:
                self._cache.first_copies.end_oldest()
        reservation.pages.extend(self._cache.allocate(num_missing))
        return True

    def _match(self, reservation: Reservation, token_ids: array[int], max_pages: int) -> _Match:
        packed = memoryview(token_ids).cast("B")
        found = self._cache.tree.match(reservation.digests, packed, self.page_size * 4, max_pages)
        nodes = [node for node in found if node.page is not None]
        pages = [node.page for node in nodes if node.page is not None]
        return _Match(nodes=nodes, below=found[len(nodes) :], pages=pages)

    def _with_tail(self, match: _Match, reservation: Reservation, token_ids: array[int]) -> _Match:
        """The session's tail besides, as far as the prompt goes on with it; the last token is always computed."""
        record = self._cache.sessions.get(reservation.session_id)
        tail = None if record is None else record.tail
        parent = match.nodes[-1] if match.nodes else None
        if match.below or tail is None or tail.root != reservation.root or tail.parent is not parent:
            return match
        first = len(match.nodes) * self.page_size
        rest = token_ids[first : min(first + len(tail.token_ids), len(token_ids) - 1)]
        tail_len = common_prefix_len(tail.token_ids, rest)
        if not tail_len:
            return match
        return replace(match, tail=tail, tail_len=tail_len, pages=[*match.pages, tail.page])

    def _num_available_beside(self, match: _Match) -> int:
        """Pages that are free or can be evicted, without those of the match."""
        pool = self._cache.pool
        num_hits = sum(1 for page in match.pages if pool.is_idle(page) and not pool.num_leases(page))
        return pool.num_available - num_hits

    def _take(self, reservation: Reservation, match: _Match, num_missing: int) -> None:
        """Pin the match's pages and allocate as many as are missing."""
        for page in match.pages[: len(match.nodes)]:
            self._cache.pool.pin(page)
        if match.tail is not None:
            self._cache.drop_tail(match.tail)
            self._cache.pool.pin(match.tail.page)
        for node in match.below:
            node.num_wanted += 1
        reservation.nodes, reservation.num_found = match.nodes, len(match.nodes) + len(match.below)
        reservation.to_restore = deque(match.below)
        reservation.pages = match.pages + self._cache.allocate(num_missing)
        reservation.computed_len = len(match.nodes) * self.page_size + match.tail_len

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
            page, num_before = reservation.pages[index], len(self._cache.tree)
            node = self._cache.tree.add(
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
            if len(self._cache.tree) > num_before:
                self._cache.sessions.entered(node)
            self._cache.superseded.note(node)  # it was below the device, perhaps
            if node.page is not None and node.page != page:
                self._cache.pool.pin(node.page)
            self._cache.copies.want(node)
            reservation.nodes.append(node)

    # ---- giving pages back

    def give_back(self, reservation: Reservation, end: int) -> None:
        """Give all pages back, deepest first; entries before ``end`` stay cached, those beyond if others share them.

        The page that ``end`` cuts becomes the session's tail, unless it stays in the tree, the session has gone on, or
        its next turn does not reach that far: what lies behind ``num_reused_pages`` is superseded from now on.
        """
        record = self._cache.sessions.get(reservation.session_id)
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
                    self._cache.drop_tail(record.tail)
                    self._cache.pool.free_idle(page)
                self._cache.sessions.pass_through(reservation.session_id, reused)
        for index in range(len(reservation.pages) - 1, -1, -1):
            is_tail = has_tail and index == num_full < end / self.page_size and index <= len(reservation.nodes)
            self._give_back_page(reservation, index, end if is_tail else None, is_kept=index < num_full)
        reservation.pages, reservation.nodes, reservation.not_restored = [], [], []
        reservation.num_found = reservation.computed_len = 0
        lease = self._cache.sessions.leases.get(reservation.session_id)
        if record is not None and lease is not None and is_latest:
            self._cache.leases.uncover(lease)
            self._cache.leases.cover(record, lease)
        if self._cache.copies.tiers:
            self._cache.first_copies.hold(reused, self._clock())

    def _give_back_page(self, reservation: Reservation, index: int, tail_end: int | None, *, is_kept: bool) -> None:
        page = reservation.pages[index]
        node = reservation.nodes[index] if index < len(reservation.nodes) else None
        if node is not None and node.page == page:
            brought = index >= reservation.num_found
            is_leased = node.num_leases > 0 or self._cache.pool.num_leases(page) > 0
            is_used = any(node.num_children.values()) or self._cache.pool.refcount(page) > 1 or is_leased
            if is_kept or not brought or is_used:
                self._cache.keep(page)
                return
            for tier in tuple(node.copies):
                self._cache.copies.drop(node, tier)
            self._cache.leave_device(node)
            node = None
        if tail_end is not None:
            tail = Tail(
                session_id=reservation.session_id,
                page=page,
                root=reservation.root,
                parent=reservation.nodes[index - 1] if index else None,
                token_ids=array("I", reservation.token_ids[index * self.page_size : tail_end]),
            )
            self._cache.sessions.keep_tail(tail)
            self._cache.keep(page)
        else:
            self._cache.pool.unpin(page, cached=False)
        if node is not None and node.page is not None:
            self._cache.keep(node.page)
