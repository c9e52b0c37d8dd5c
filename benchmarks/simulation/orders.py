"""Orders of eviction to compare with, in the place of the system's own. None of them is part of what is served.

``evicting_least_recently_used`` is what most systems do. ``evicting_furthest_return`` knows the future (Belady's MIN):
of all pages the one goes that is asked for last, or never. Both see every tier, as the system's own order does: from
the device goes first what has a copy below, from below what a running turn has on the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from benchmarks.simulation.sessions import Session, owner
from benchmarks.simulation.system import System
from seamount.workers.cache import holdings
from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import Candidate, Tier

Key = tuple[int, float]


def least_recently_used(page: Candidate) -> Key:
    return 2 if page.is_leased else 1, -page.idle_s


@contextmanager
def evicting_least_recently_used() -> Iterator[None]:
    """Until the end of ``with``, every cache evicts in this order."""
    with mock.patch.object(holdings, "eviction_key", least_recently_used):
        yield


@contextmanager
def evicting_furthest_return(system: System) -> Iterator[None]:
    """Until the end of ``with``, every cache evicts in the order that knows when the system's sessions come."""
    future = _Future(system)

    def tier_key(caches: Holdings, node: PageNode, tier: Tier) -> Key:
        is_used = node.page is not None and not caches.pool.is_idle(node.page)
        has_other = bool(node.copies) if tier is Tier.DEVICE else is_used
        return int(not has_other), -future.next_use(caches, node)

    def page_key(caches: Holdings, page: int) -> Key:
        node = caches.tree.at(page)
        if node is not None:
            return tier_key(caches, node, Tier.DEVICE)
        tail = caches.sessions.tail_at(page)
        return 1, -future.comes_for(int(tail.session_id[1:]), math.inf)

    def is_superseded(caches: Holdings, node: PageNode) -> bool:
        return math.isinf(future.next_use(caches, node))

    with (
        mock.patch.object(Holdings, "_tier_key", tier_key),
        mock.patch.object(Holdings, "_page_key", page_key),
        mock.patch.object(Holdings, "_is_superseded", is_superseded),
    ):
        yield


class _Future:
    """When pages are asked for next."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._forks: dict[int, list[int]] = defaultdict(list)
        self._num_known = 0

    def next_use(self, caches: Holdings, node: PageNode) -> float:
        """Virtual seconds; inf where no turn that is to come goes through the page."""
        if not owner(int.from_bytes(node.token_ids[:4], "little")):
            return 0.0  # a system prompt: somebody comes at any time
        end = (node.depth + 1) * caches.page_size
        brought = {int(name[1:]) for name in (node.session_id, node.last_session) if name}
        family = {one for number in brought for one in self._family(number)}
        return min((self._comes_through(caches, number, node, end) for number in family), default=math.inf)

    def comes_for(self, number: int, num_tokens: float) -> float:
        """When the session comes for the entries of its first ``num_tokens``; inf: of all that it left."""
        session = self._system.sessions[number]
        wanted = len(session.context) if math.isinf(num_tokens) else num_tokens
        return self._system.comes_at.get(number, math.inf) if wanted <= session.reuse_len() else math.inf

    def _comes_through(self, caches: Holdings, number: int, node: PageNode, end: int) -> float:
        session = self._system.sessions[number]
        at = node.depth * caches.page_size
        if len(session.context) < end or session.context[at:end].tobytes() != node.token_ids:
            return math.inf  # text that was cut
        return self._system.clock.now if number in self._system.at_work else self.comes_for(number, end)

    def _family(self, number: int) -> list[int]:
        """The session and all that began as forks of it, or of these."""
        sessions = self._system.sessions
        while self._num_known < len(sessions):
            self._num_known += 1
            session: Session = sessions[self._num_known]
            if session.parent:
                self._forks[session.parent].append(session.number)
        family = [number]
        for one in family:
            family += self._forks.get(one, ())
        return family
