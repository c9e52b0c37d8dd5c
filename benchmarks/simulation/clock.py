"""Virtual time: events in order of time, ties in order of arrival."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable


class Clock:
    """``now`` moves from event to event; seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._num_events = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Call ``event`` at ``time_s``, or now if that is over."""
        self._num_events += 1
        heapq.heappush(self._events, (max(time_s, self.now), self._num_events, event))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        self.at(self.now + delay_s, event)

    @property
    def next_s(self) -> float:
        """When the next event comes; inf if none does."""
        return self._events[0][0] if self._events else math.inf

    def run(self, until_s: float = math.inf) -> None:
        """Until no event is left, or up to ``until_s``."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, event = heapq.heappop(self._events)
            event()
