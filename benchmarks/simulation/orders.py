"""Orders of eviction to compare with, in the place of the system's own. None of them is part of what is served.

``evicting_least_recently_used`` is what most systems do. ``evicting_furthest_return`` knows the future (Belady's MIN):
of all pages the one goes that is asked for last, or never. ``evicting_by_distribution`` is the bound without foresight:
it knows how the simulated waits are distributed, not the draw. All see every tier, as the system's own order does. The
last two drop first what nobody will come for, then from the device what has a copy below, from below what a running
turn has on the device.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from benchmarks.simulation.sessions import Session, owner
from benchmarks.simulation.system import System
from benchmarks.simulation.traffic import (
    FORK_WAIT,
    MAX_REQUESTS,
    PAUSE,
    REQUESTS_LOG,
    REQUESTS_ONE_SHARE,
    SUBAGENT,
    SUBAGENT_LOG,
    TOOLS,
)
from seamount.workers.cache import eviction_order
from seamount.workers.cache.eviction_order import EvictionOrder
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import Candidate, Tier, Wait, mean_up_to, share_back

Key = tuple[int, float]
HORIZONS_S = tuple(0.1 * 1.5**power for power in range(31))
"""To five hours, finer than the system's."""


def least_recently_used(page: Candidate) -> Key:
    return 2 if page.is_leased else 1, -page.idle_s


@contextmanager
def evicting_least_recently_used() -> Iterator[None]:
    """Until the end of ``with``, every cache evicts in this order."""
    with mock.patch.object(eviction_order, "eviction_key", least_recently_used):
        yield


@contextmanager
def evicting_furthest_return(system: System) -> Iterator[None]:
    """Until the end of ``with``, every cache made in it evicts in the order that knows when the sessions come."""
    with _evicting(_Future(system)):
        yield


@contextmanager
def evicting_by_distribution(system: System) -> Iterator[None]:
    """Until the end of ``with``, every cache made in it evicts in the order that knows how waits are distributed."""
    with _evicting(_Distribution(system)):
        yield


@contextmanager
def _evicting(worths: _Future) -> Iterator[None]:
    def of_copy(order: EvictionOrder, node: PageNode, tier: Tier) -> Key:
        worth = worths.of(order, node)
        if worth == -math.inf:
            return -1, 0.0
        is_used = node.page is not None and not order.pool.is_idle(node.page)
        has_other = bool(node.copies) if tier is Tier.DEVICE else is_used
        return int(not has_other), worth

    def of_page(order: EvictionOrder, page: int) -> Key:
        node = order.tree.at(page)
        if node is not None:
            return of_copy(order, node, Tier.DEVICE)
        return 1, worths.of_tail(int(order.sessions.tail_at(page).session_id[1:]))

    with (
        mock.patch.object(EvictionOrder, "of_copy", of_copy),
        mock.patch.object(EvictionOrder, "of_page", of_page),
    ):
        yield


class _Future:
    """When pages are asked for next. What a page is worth: the greater, the sooner that is."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._forks: dict[int, list[int]] = defaultdict(list)
        self._num_known = 0

    def of(self, order: EvictionOrder, node: PageNode) -> float:
        """-inf where no turn that is to come goes through the page."""
        if not owner(int.from_bytes(node.token_ids[:4], "little")):
            return math.inf  # a system prompt: somebody comes at any time
        sessions = self._through(order, node)
        end = (node.depth + 1) * order.page_size
        return self._together([self._of_session(one, end) for one in sessions])

    def of_tail(self, number: int) -> float:
        session = self._system.sessions[number]
        return self._of_session(session, len(session.context))

    def _of_session(self, session: Session, end: int) -> float:
        """Of the entries of its first ``end`` tokens, to that session."""
        if session.number in self._system.at_work:
            return -self._system.clock.now
        comes_at = self._system.comes_at.get(session.number, math.inf)
        return -comes_at if end <= session.reuse_len() else -math.inf

    def _together(self, worths: list[float]) -> float:
        """To all who come for it."""
        return max(worths, default=-math.inf)

    def _through(self, order: EvictionOrder, node: PageNode) -> list[Session]:
        """Sessions whose context goes through the page."""
        first, end = node.depth * order.page_size, (node.depth + 1) * order.page_size
        brought = {int(name[1:]) for name in (node.session_id, node.last_session) if name}
        family = {one for number in brought for one in self._family(number)}
        sessions = [self._system.sessions[number] for number in sorted(family)]
        return [
            one
            for one in sessions
            if len(one.context) >= end and one.context[first:end].tobytes() == node.token_ids  # else it was cut
        ]

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


class _Distribution(_Future):
    """What can be known without foresight: what each session waits for, its history, and the generator's distributions.

    Worth is the index of ``retention.return_rate``, at its finest: no order that knows no more does better where
    sessions are many and pages cost the same.
    """

    def _of_session(self, session: Session, end: int) -> float:
        if session.number in self._system.at_work:
            return math.inf
        reuse_len = session.expected_reuse_len() if session.is_over else session.reuse_len()
        is_gone = session.number not in self._system.live or (session.parent and session.is_over)
        if is_gone or end > reuse_len:
            return -math.inf
        idle_s = max(0.01, self._system.clock.now - self._system.left_at[session.number])
        return _index(_wait_of(session), float(f"{idle_s:.2e}"))

    def _together(self, worths: list[float]) -> float:
        return sum((one for one in worths if one > 0), 0.0) or -math.inf


def _wait_of(session: Session) -> Wait:
    """Until its next turn, as ``traffic.Generator`` draws it."""
    if session.is_over or not session.step.tool:
        num_requests = sum(1 for step in session.plan.steps[: session.at] if not step.tool)
        return Wait(*PAUSE, share_over(num_requests))
    if session.parent:
        return Wait(*FORK_WAIT, 0.0)
    if session.step.tool == SUBAGENT:
        return Wait(math.exp(SUBAGENT_LOG[0]), SUBAGENT_LOG[1], 0.0)
    return Wait(*TOOLS[session.step.tool][:2], 0.0)


@functools.cache
def share_over(num_requests: int) -> float:
    """Of the sessions with so many requests, those for which that was the last."""
    mu, sigma = REQUESTS_LOG

    def more_than(num: int) -> float:
        if num == 0 or num >= MAX_REQUESTS:
            return float(num == 0)
        return (1 - REQUESTS_ONE_SHARE) * 0.5 * math.erfc((math.log(num - 0.5) - mu) / sigma / math.sqrt(2))

    return 1 - more_than(num_requests) / more_than(num_requests - 1)


@functools.lru_cache(maxsize=1 << 18)
def _index(wait: Wait, idle_s: float) -> float:
    before, held_s = share_back(wait, idle_s), mean_up_to(wait, idle_s)
    return max(
        (share_back(wait, idle_s + horizon_s) - before) / max(1e-9, mean_up_to(wait, idle_s + horizon_s) - held_s)
        for horizon_s in HORIZONS_S
    )
