"""Ray clusters of one name beside each other, as while a new image is rolled out: the youngest that serves stays."""

from __future__ import annotations

import time
from collections.abc import Callable

from seamount.cluster.fleet_state import FleetState

SIBLING_DEAD_AFTER_S = 30.0
"""A Ray cluster whose fleet has not beaten for so long, while Redis answered, is no successor. Where
new settings replace its fleet, the one before has up to 15 s to end."""


class Siblings:
    """Other Ray clusters of the same name, judged by beats that move while Redis answers."""

    def __init__(self, state: FleetState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._clock = state, clock
        self._moved: dict[str, tuple[int, float]] = {}

    def is_outlived(self) -> bool:
        """Whether a younger one lives and serves: what this one has is to go there."""
        now, outlived = self._clock(), False
        for sibling in self._state.siblings():
            beat, since = self._moved.get(sibling.ray_session, (sibling.beat, -SIBLING_DEAD_AFTER_S + now))
            if sibling.beat != beat:
                since = now
            self._moved[sibling.ray_session] = (sibling.beat, since)
            lives = now - since < SIBLING_DEAD_AFTER_S
            outlived |= lives and sibling.is_serving and sibling.number > self._state.number
        return outlived
