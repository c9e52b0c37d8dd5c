"""What the fleet does to gangs, each act admitted under its epoch first (``fleet_state``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from seamount.cluster.fleet_look import homeless, needlessly_homeless
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_nodes import Node
from seamount.cluster.fleet_plan import Delete, Phase, RunningGang, WantedPool
from seamount.cluster.fleet_routers import RouterReplicas
from seamount.cluster.fleet_state import FleetState
from seamount.workers.spec import PoolName

_LOG = logging.getLogger("seamount.fleet")
MAX_FAILURES = 3
"""Gangs of one pool and version that fail to come up, one after the other, before the fleet leaves the failed one
standing, to be seen."""
MAX_BACKOFF_S = 30.0


class GangApplications(RouterReplicas, Protocol):
    """What the fleet needs of Serve and Ray; calls may block for seconds and raise whatever Ray raises."""

    def running(self) -> list[RunningGang]: ...
    def start(self, name: str, wanted: WantedPool, avoided_nodes: Collection[str]) -> None: ...
    def delete(self, name: str) -> None: ...
    def nodes(self) -> list[Node]: ...


class GangActs:
    """Of one fleet, whose thread alone calls it. All may raise what ``FleetState`` raises."""

    def __init__(self, state: FleetState, gangs: GangApplications, metrics: FleetMetrics) -> None:
        self._state, self._gangs, self._metrics = state, gangs, metrics
        self._not_before: dict[PoolName, float] = {}
        self._starting: dict[str, float] = {}

    def start(self, wanted: WantedPool, running: Sequence[RunningGang], avoided: Collection[str]) -> None:
        """One more gang, unless its pool pauses after a failure. avoided: ids of nodes that it keeps off."""
        if time.monotonic() < self._not_before.get(wanted.pool, 0.0):
            return
        lowest = max((gang.number + 1 for gang in running if gang.pool == wanted.pool), default=0)
        number = self._state.admit_start(wanted.pool, lowest=lowest)
        name = f"{wanted.pool}-{number}"
        _LOG.info("gang_starting", extra=self._about(name, wanted.version))
        self._starting[name] = time.monotonic()
        if avoided:
            self._state.note_avoided(name, avoided)
        self._gangs.start(name, wanted, avoided)
        self._metrics.gang_started(wanted.pool)

    def delete(self, name: str, version: str) -> None:
        self._state.admit_delete()
        _LOG.info("gang_deleting", extra=self._about(name, version))
        self._starting.pop(name, None)
        self._gangs.delete(name)

    def delete_misplaced(self, running: Sequence[RunningGang], welcome: Collection[str]) -> list[str]:
        """Those that find no node for avoiding one that takes gangs again; others are started at once. Their names."""
        avoided = {name: self._state.avoided_by(name) for name in homeless(running)}
        names = needlessly_homeless(avoided, welcome)
        for gang in running:
            if gang.name in names:
                self.delete(gang.name, gang.version)
        return names

    def note_starts(self, running: Sequence[RunningGang]) -> list[tuple[PoolName, float]]:
        """Gangs that serve since the last look: the pool of each, and seconds since it was asked for."""
        came_up = []
        for gang in running:
            if gang.phase is Phase.READY and gang.name in self._starting:
                took_s = time.monotonic() - self._starting.pop(gang.name)
                self._metrics.gang_ready(gang.pool, took_s)
                self._state.clear_failures(gang.pool, gang.version)
                came_up.append((gang.pool, took_s))
        return came_up

    def count_failure(self, action: Delete) -> bool:
        """Whether it may go: the last of too many stays, failed, where an operator can see why."""
        self._metrics.gang_failed(action.pool)
        count = self._state.count_failure(action.pool, action.version)
        pause_s = min(MAX_BACKOFF_S, 2.0**count)
        self._not_before[action.pool] = time.monotonic() + pause_s
        _LOG.warning("gang_failed", extra={"gang": action.name, "count": count, "pause_s": pause_s})
        return count < MAX_FAILURES

    def given_up(self, pools: Sequence[WantedPool]) -> frozenset[PoolName]:
        """Pools whose gangs failed to come up too often."""
        return frozenset(
            pool.pool for pool in pools if self._state.num_failures(pool.pool, pool.version) >= MAX_FAILURES
        )

    def _about(self, gang: str, version: str) -> dict[str, object]:
        return {"gang": gang, "version": version, "epoch": self._state.epoch}
