"""How long recoveries took, beside what is promised (DESIGN: promises under fault)."""

from __future__ import annotations

from collections import defaultdict
from enum import Enum


class Promise(Enum):
    """Name, and the longest time in seconds that a client may notice; None: only that it goes on."""

    PREFILL_KILLED = "prefill killed: the first token comes later", None
    DECODE_KILLED = "decode killed: the stream goes on", 3.0
    PREFILL_HUNG = "prefill hung: the turn goes on", 8.0
    DECODE_HUNG = "decode hung: the stream goes on", 8.0
    ROUTER_KILLED = "router killed: the stream goes on elsewhere", 2.0
    ROUTER_HUNG = "router hung: the turn goes on elsewhere", 8.0
    ROUTER_HUNG_OWN = "router hung: the stream of its own client goes on", None
    CLIENT_GONE = "client gone: slot and pages are free", 1.0
    REDIS_KILLED = "Redis killed and restarted: the stream goes on", None
    REDIS_PAUSED = "Redis paused for 5 s: the stream goes on after it", None
    REPLY_LOST = "reply of a Redis command lost: the stream goes on", None
    PAGE_DAMAGED = "pages damaged in transfer: the first token comes later", None

    @property
    def text(self) -> str:
        return str(self.value[0])

    @property
    def within_s(self) -> float | None:
        return self.value[1]  # type: ignore[return-value]


class Recoveries:
    """Measured in this run."""

    def __init__(self) -> None:
        self._seconds: dict[Promise, list[float]] = defaultdict(list)

    def note(self, promise: Promise, seconds: float) -> None:
        self._seconds[promise].append(seconds)

    def table(self) -> list[str]:
        """One line a promise; MISSED where the longest recovery was longer."""
        lines = []
        for promise in Promise:
            if times := sorted(self._seconds.get(promise, ())):
                within = promise.within_s
                verdict = "" if within is None else ("met" if times[-1] <= within else "MISSED")
                bound = "-" if within is None else f"{within:g}"
                figures = f"{len(times):4} {times[len(times) // 2]:8.2f} {times[-1]:8.2f} {bound:>8} {verdict}"
                lines.append(f"{promise.text:56} {figures}")
        if lines:
            lines.insert(0, f"{'recovery':56} {'n':>4} {'p50 s':>8} {'max s':>8} {'within s':>8}")
        return lines
