"""What a router says of itself with each beat: how much it does, and how much of a core that takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from seamount.v1 import admin_pb2


class OwnLoad:
    """Of this process; ``state`` is for the router's ``Registration``."""

    def __init__(self, num_streams: Callable[[], int]) -> None:
        """num_streams: answers in the making."""
        self._num_streams = num_streams
        self._at, self._cpu_s = time.monotonic(), time.process_time()
        self._cores = 0.0

    def state(self) -> bytes:
        """A ``RouterState``; its cores are those since the call before."""
        now, cpu_s = time.monotonic(), time.process_time()
        if now > self._at:
            self._cores = (cpu_s - self._cpu_s) / (now - self._at)
        self._at, self._cpu_s = now, cpu_s
        return admin_pb2.RouterState(num_streams=self._num_streams(), cores=self._cores).SerializeToString()
