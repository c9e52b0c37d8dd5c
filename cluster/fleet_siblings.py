"""Ray clusters of one name beside each other, as while a new image is rolled out: the youngest that serves stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from seamount.cluster.fleet_state import FleetState

SIBLING_DEAD_AFTER_S = 30.0
"""A Ray cluster whose fleet has not beaten for so long, while Redis answered, is no successor. Where
new settings replace its fleet, the one before has up to 15 s to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """is_outlived: a younger one lives and serves, and what this one has is to go there. elder: the Ray session of the
    youngest of the older ones that live."""

    is_outlived: bool
    elder: str | None


class Siblings:
    """Other Ray clusters of the same name, judged by beats that move while Redis answers."""

    def __init__(self, state: FleetState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._clock = state, clock
        self._moved: dict[str, tuple[int, float]] = {}

    def look(self) -> Family:
        now, outlived, elders = self._clock(), False, dict[int, str]()
        for sibling in self._state.siblings():
            beat, since = self._moved.get(sibling.ray_session, (sibling.beat, -SIBLING_DEAD_AFTER_S + now))
            if sibling.beat != beat:
                since = now
            self._moved[sibling.ray_session] = (sibling.beat, since)
            lives = now - since < SIBLING_DEAD_AFTER_S
            outlived |= lives and sibling.is_serving and sibling.number > self._state.number
            if lives and sibling.number < self._state.number:
                elders[sibling.number] = sibling.ray_session
        return Family(is_outlived=outlived, elder=elders[max(elders)] if elders else None)
