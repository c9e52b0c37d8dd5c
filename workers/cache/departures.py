"""Sessions that will not come back here: handed to another rank, deleted, or adopted and away for too long."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from seamount.workers.cache.deletion import DeletedPages
from seamount.workers.cache.eviction import Eviction
from seamount.workers.cache.first_copies import FirstCopies
from seamount.workers.cache.leased import LeasedPages
from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.sessions import SessionBook, SessionRecord, Tail

ADOPTED_S = 24 * 3600.0
"""How long what an earlier process left is kept for sessions that do not come: they may be no more."""


class Departures:
    """Not thread-safe: its owner holds the lock.

    evict: takes an idle page out of the device; drop_tail: makes a session's tail an idle page like any other; erase:
    takes a page that nobody uses out of every tier; clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        sessions: SessionBook,
        leases: LeasedPages,
        first_copies: FirstCopies,
        eviction: Eviction,
        evict: Callable[[int], int | None],
        drop_tail: Callable[[Tail], None],
        erase: Callable[[PageNode], None],
        clock: Callable[[], float],
    ) -> None:
        self._pool, self._sessions, self._leases, self._first_copies = pool, sessions, leases, first_copies
        self._eviction, self._evict, self._drop_tail = eviction, evict, drop_tail
        self._clock = clock
        self._deleted = DeletedPages(pool, erase=erase)
        self._adopted: dict[str, float] = {}

    def give_up(self, session_id: str) -> None:
        """Forget what the session left here, its lease with it; pages that no other session's last turn went through
        are free, as far as nobody uses or leases them."""
        record = self._sessions.get(session_id)
        if record is None:
            return
        self._leave_nothing(record, session_id)
        chain = record.chain
        self._sessions.pass_through(session_id, [])
        self._sessions.remember(session_id, array("I"), b"")
        for node in reversed(chain):
            if node.page is None:  # further down, as a superseded one
                continue
            if not self._eviction.is_leaf(node.page) or node.num_sessions or self._pool.num_leases(node.page):
                return
            self._evict(node.page)

    def delete(self, session_id: str) -> None:
        """The session is no more, and has no live reservation here: forget it. ``sweep`` erases its pages, except for
        those that other sessions' last turns went through."""
        doomed = self._sessions.brought(session_id)
        record = self._sessions.get(session_id)
        if record is not None:
            doomed += record.chain
            self._leave_nothing(record, session_id)
            self._sessions.forget(session_id)
        self._deleted.add(doomed)

    def adopted(self, session_id: str) -> None:
        """An earlier process left the session's pages: it is given up, too, where it does not come for long."""
        self._adopted[session_id] = self._clock() + ADOPTED_S

    def sweep(self) -> None:
        """Erase pages of deleted sessions that nobody uses by now; pages of adopted sessions that have not come for
        long are superseded."""
        self._deleted.sweep()
        now = self._clock()
        while self._adopted:
            session_id, until = next(iter(self._adopted.items()))
            if now < until:
                return
            del self._adopted[session_id]
            record = self._sessions.get(session_id)
            if session_id in self._sessions.leases:
                self._adopted[session_id] = now + ADOPTED_S
            elif record is not None and not record.turn_id:
                self._sessions.pass_through(session_id, [])

    def _leave_nothing(self, record: SessionRecord, session_id: str) -> None:
        """Neither lease nor tail, and no page waits for its copy."""
        self._leases.end(session_id)
        self._first_copies.end(record.chain)
        if record.tail is not None:
            page = record.tail.page
            self._drop_tail(record.tail)
            self._pool.free_idle(page)
