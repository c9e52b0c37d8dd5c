"""Signs of life of a loop that rests while there is no work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Heartbeat:
    """Beaten by the loop's thread, judged by any other.

    timeout_s: how old the last sign of life may be; ring: has a resting loop step once, which beats.
    """

    def __init__(self, *, timeout_s: float, ring: Callable[[], None]) -> None:
        self._timeout_s, self._ring = timeout_s, ring
        self._lock = threading.Lock()
        self._probed_at: float | None = None
        self._beat_at = time.monotonic()
        self.is_resting = True

    def start(self) -> None:
        """The thread is about to begin."""
        self._beat_at = time.monotonic()

    def rest(self) -> None:
        """There is no work: the loop steps again when it is rung."""
        self.is_resting = True

    def wake(self) -> None:
        """The loop has work again."""
        self._beat_at = time.monotonic()
        self.is_resting = False

    def beat(self) -> None:
        """A step is over."""
        self._probed_at = None
        self._beat_at = time.monotonic()

    def is_recent(self) -> bool:
        """Whether the last step, or the answer to a ring, is young enough. Never waits: a resting loop is asked to step
        and judged by the following calls."""
        now = time.monotonic()
        with self._lock:
            if not self.is_resting:
                return now - self._beat_at < self._timeout_s
            if self._probed_at is None:
                if now - self._beat_at < self._timeout_s / 4:
                    return True
                self._probed_at = now
                self._ring()
            return now - self._probed_at < self._timeout_s
