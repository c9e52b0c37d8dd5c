"""Ray clusters of one name beside each other, as while a new image is rolled out: the youngest that serves stays.

The younger one starts as many gangs as the older one wants, and for each that is ready the older one gives one up, so
that there are never fewer than before, and room for one more is enough where pods of empty gangs are given back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from seamount.cluster.fleet_plan import WantedPool
from seamount.cluster.fleet_state import FleetState
from seamount.workers.spec import PoolName

SIBLING_DEAD_AFTER_S = 30.0
"""A Ray cluster whose fleet has not beaten for so long, while Redis answered, is no successor. Where
new settings replace its fleet, the one before has up to 15 s to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """is_outlived: a younger one lives and has come up, and what this one has is to go there. elder: the Ray session of
    the youngest of the older ones that live; knows_elders: False while a fleet that has just begun cannot tell yet
    whether one lives. ready: gangs of younger ones that live, which take the place of as many here."""

    is_outlived: bool = False
    elder: str | None = None
    knows_elders: bool = True
    ready: Mapping[PoolName, int] = field(default_factory=dict)


class Siblings:
    """Other Ray clusters of the same name, judged by beats that move while Redis answers."""

    def __init__(self, state: FleetState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._clock = state, clock
        self._moved: dict[str, tuple[int, float]] = {}
        self._first_seen: dict[str, float] = {}

    def look(self) -> Family:
        now, outlived, known = self._clock(), False, True
        elders, ready = dict[int, str](), Counter[PoolName]()
        for sibling in self._state.siblings():
            beat, since = self._moved.get(sibling.ray_session, (sibling.beat, -SIBLING_DEAD_AFTER_S + now))
            if sibling.beat != beat:
                since = now
            self._moved[sibling.ray_session] = (sibling.beat, since)
            lives = now - since < SIBLING_DEAD_AFTER_S
            if lives and sibling.number > self._state.number:
                outlived |= sibling.is_serving
                ready.update({pool: one.num_ready for pool, one in sibling.progress.items()})
            elif lives:
                elders[sibling.number] = sibling.ray_session
            elif sibling.number < self._state.number:
                known &= now - self._first_seen.setdefault(sibling.ray_session, now) >= SIBLING_DEAD_AFTER_S
        elder = elders[max(elders)] if elders else None
        return Family(is_outlived=outlived, elder=elder, knows_elders=known, ready=dict(ready))


def left_here(wanted: Sequence[WantedPool], family: Family) -> list[WantedPool]:
    """Of what all Ray clusters of the name are to have together, what this one is to have. Pure."""

    def number(pool: WantedPool) -> int:
        return 0 if family.is_outlived else max(0, pool.num_gangs - family.ready.get(pool.pool, 0))

    return [replace(pool, num_gangs=number(pool)) for pool in wanted]


def needed_to_serve(wanted: Sequence[WantedPool], at_start: Sequence[WantedPool], family: Family) -> list[WantedPool]:
    """What must be ready before a Ray cluster counts as come up: all that is wanted now where an older one hands over
    to it; else no more than what was wanted at the start, since load may ask for more than there is room for. Pure."""
    if family.elder is not None:
        return list(wanted)
    first = {pool.pool: pool.num_gangs for pool in at_start}
    return [replace(pool, num_gangs=min(pool.num_gangs, first.get(pool.pool, 0))) for pool in wanted]
