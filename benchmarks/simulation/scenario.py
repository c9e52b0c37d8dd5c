"""A whole simulated system from a few numbers, and what its turns cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.simulation.accounts import TurnAccount
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import StepCosts
from benchmarks.simulation.orders import (
    evicting_by_distribution,
    evicting_furthest_return,
    evicting_least_recently_used,
)
from benchmarks.simulation.rank import Rank
from benchmarks.simulation.system import System
from benchmarks.simulation.traffic import Generator, Plan
from seamount.wire.ids import RankId
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Tier
from seamount.workers.scheduler import EngineLimits

Order = Literal["system", "lru", "belady", "distribution"]
"""Of eviction: the system's own, least recently used, the one that knows the future, and the one that knows how waits
are distributed."""
SAMPLE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Pages are of one rank. until_s: virtual seconds, of which turns that came before ``warm_s`` are not counted;
    start_within_s: the sessions' first turns spread over it."""

    costs: StepCosts
    num_ranks: int = 1
    page_size: int
    device_pages: int
    host_pages: int = 0
    disk_pages: int = 0
    limits: EngineLimits
    order: Order = "system"
    leases: bool = True
    until_s: float
    warm_s: float
    start_within_s: float


@dataclass(slots=True, kw_only=True)
class Outcome:
    """turns: that came after the warm-up; live_pages: that the live sessions' contexts would fill, sampled."""

    system: System
    turns: list[TurnAccount]
    live_pages: list[int] = field(default_factory=list)

    @property
    def mean_live_pages(self) -> float:
        return sum(self.live_pages) / len(self.live_pages)


def agents(num_sessions: int, *, seed: int, max_context_tokens: int) -> list[Iterable[Plan]]:
    """As many slots of made-up sessions, without end."""

    def plans(number: int) -> Iterator[Plan]:
        generator = Generator(seed=seed * 10_000 + number, max_context_tokens=max_context_tokens)
        while True:
            yield generator.plan()

    return [plans(number) for number in range(num_sessions)]


def simulate(scenario: Scenario, slots: list[Iterable[Plan]]) -> Outcome:
    """Run it; the caches' invariants hold at the end."""
    clock = Clock()
    ranks: dict[str, Rank] = {}
    system = System(
        clock=clock, ranks=ranks, slots=slots, start_within_s=scenario.start_within_s, leases=scenario.leases
    )
    outcome = Outcome(system=system, turns=[])

    def sample() -> None:
        contexts = (len(system.sessions[number].context) for number in system.live)
        outcome.live_pages.append(sum(-(-size // scenario.page_size) for size in contexts))
        clock.after(SAMPLE_EVERY_S, sample)

    clock.at(scenario.warm_s, sample)
    with _evicting(scenario.order, system):
        for number in range(scenario.num_ranks):  # in here: they bind their order as they are made
            rank = _rank(f"decode-{number}", scenario, clock)
            ranks[rank.rank_id] = rank
        system.run(scenario.until_s)
    for rank in ranks.values():
        rank.caches.check_invariants()
    outcome.turns = [turn for turn in system.turns if turn.came_at >= scenario.warm_s]
    return outcome


def _rank(name: str, scenario: Scenario, clock: Clock) -> Rank:
    caches = Reservations(
        num_pages=scenario.device_pages,
        num_below={Tier.HOST: scenario.host_pages, Tier.DISK: scenario.disk_pages},
        page_size=scenario.page_size,
        fingerprint="simulated",
        layout="fp8",
        clock=lambda: clock.now,
    )
    return Rank(rank_id=RankId(name), clock=clock, costs=scenario.costs, caches=caches, limits=scenario.limits)


def _evicting(order: Order, system: System) -> AbstractContextManager[None]:
    match order:
        case "lru":
            return evicting_least_recently_used()
        case "belady":
            return evicting_furthest_return(system)
        case "distribution":
            return evicting_by_distribution(system)
        case "system":
            return nullcontext()
