"""What the fleet tells Prometheus: how many gangs it wants and sees, what it decided, how starts and drains went."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

START_BUCKETS = (5.0, 10.0, 20.0, 30.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 450.0, 600.0, 900.0, 1800.0)
"""Seconds: a gang reads its weights, a drain waits for turns to end."""


class FleetMetrics:
    """Of one fleet; called from its thread. pool: ``prefill``, ``decode`` or ``router``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._wanted_gangs = Gauge(
            "seamount_fleet_wanted_gangs", "Gangs (of routers: replicas) wanted", ["pool"], registry=registry
        )
        self._gangs = Gauge("seamount_fleet_gangs", "Gangs by phase", ["pool", "phase"], registry=registry)
        self._decisions = Counter(
            "seamount_fleet_decisions", "Changes of what is wanted", ["pool", "direction"], registry=registry
        )
        self._starts = Counter("seamount_fleet_gang_starts", "Gangs started", ["pool"], registry=registry)
        self._failures = Counter(
            "seamount_fleet_gang_failures", "Gangs that did not come up", ["pool"], registry=registry
        )
        self._start_s = Histogram(
            "seamount_fleet_gang_start_seconds",
            "From the start of a gang until it serves",
            ["pool"],
            buckets=START_BUCKETS,
            registry=registry,
        )
        self._drain_s = Histogram(
            "seamount_fleet_drain_seconds",
            "From the request of a drain to its end",
            ["cause", "outcome"],
            buckets=START_BUCKETS,
            registry=registry,
        )
        self._last_pass = Gauge(
            "seamount_fleet_last_pass_timestamp_seconds", "When the fleet last looked and acted", registry=registry
        )
        self._watch_restarts = Counter(
            "seamount_fleet_watch_restarts",
            "Watches of the Kubernetes API that had to begin anew",
            ["resource", "cause"],
            registry=registry,
        )
        self._wanted: dict[str, int] = {}

    def passed(self) -> None:
        """One pass of the fleet is over."""
        self._last_pass.set_to_current_time()

    def wanted(self, pool: str, count: int) -> None:
        """What is wanted from now on; a change counts as a decision."""
        before = self._wanted.get(pool, count)
        if count != before:
            self._decisions.labels(pool, "up" if count > before else "down").inc()
        self._wanted[pool] = count
        self._wanted_gangs.labels(pool).set(count)

    def gangs(self, seen: Iterable[tuple[str, str]], *, pools: Iterable[str], phases: Iterable[str]) -> None:
        """(pool, phase) of each gang that there is; the other pairs of ``pools`` and ``phases`` have none."""
        counts = Counts(seen)
        phases = tuple(phases)
        for pool in pools:
            for phase in phases:
                self._gangs.labels(pool, phase).set(counts[pool, phase])

    def gang_started(self, pool: str) -> None:
        self._starts.labels(pool).inc()

    def gang_ready(self, pool: str, took_s: float) -> None:
        self._start_s.labels(pool).observe(took_s)

    def gang_failed(self, pool: str) -> None:
        self._failures.labels(pool).inc()

    def drain_ended(self, cause: str, outcome: str, took_s: float) -> None:
        """cause: ``scale_down``, ``node`` or ``version``; outcome: ``empty`` or ``failed``."""
        self._drain_s.labels(cause, outcome).observe(took_s)

    def watch_restarted(self, resource: str, cause: str) -> None:
        """resource: ``nodes`` or ``pods``; cause: ``gone``, ``dropped`` or ``refused``."""
        self._watch_restarts.labels(resource, cause).inc()
