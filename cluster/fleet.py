"""Keeps the wanted gangs running: each gang is one Serve application, started and deleted by the fleet alone.

``fleet_plan.plan`` says what to do and is pure. ``Reconciler`` does it, about twice a second, from a thread of its own
(calls into Serve block). What runs is read from Serve, so a new fleet adopts the gangs of a dead one without touching
them. Redis keeps only what Serve cannot know: which fleet is the present one, which names were used up, how often a
pool failed to come up, what was wanted last.

A gang that goes is emptied first (``fleet_draining``), whatever the reason: too little load (``fleet_scaling``), a node
that is to be emptied (``fleet_nodes``), a newer version, or a younger Ray cluster of the same name that serves
(``fleet_siblings``). An older fleet that is still about is fenced off: see ``fleet_state``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import redis

from seamount.cluster.autoscaling import AutoscalingSettings, DrainingSettings
from seamount.cluster.fleet_draining import Drained, GangDrains
from seamount.cluster.fleet_look import gangs_of, half_drained, homeless, is_serving, needlessly_homeless, of_nodes
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_nodes import Node, NodeRequests, statuses
from seamount.cluster.fleet_plan import (
    POOL_NAMES,
    Cause,
    Circumstances,
    Delete,
    Phase,
    RunningGang,
    Start,
    WantedPool,
    plan,
)
from seamount.cluster.fleet_routers import RouterCare, RouterReplicas
from seamount.cluster.fleet_scaling import ROUTERS, Scaler, Wanted
from seamount.cluster.fleet_siblings import Siblings
from seamount.cluster.fleet_state import FleetState
from seamount.cluster.fleet_view import FleetView, View
from seamount.cluster.leaving import LeavingRouters
from seamount.cluster.node_drain import DrainRequests
from seamount.cluster.settings import Settings
from seamount.wire.errors import Aborted
from seamount.workers.spec import PoolName

logger = logging.getLogger("seamount.fleet")

PASS_S = 0.5
"""Pause between two looks at what runs."""
STALLED_AFTER_S = 60.0
"""A pass that takes longer is stuck in a call to Serve: the replica counts as unhealthy and is replaced."""
MAX_FAILURES = 3
"""Gangs of one pool and version that fail to come up before the fleet leaves the failed one standing, to be seen."""
MAX_BACKOFF_S = 30.0
BLIND_S = 10.0
"""For so long a fleet that has just begun may not have seen the ranks of a gang yet, and could not empty it."""


class GangApplications(RouterReplicas, Protocol):
    """What the fleet needs of Serve and Ray; calls may block for seconds and raise whatever Ray raises."""

    def running(self) -> list[RunningGang]: ...
    def start(self, name: str, wanted: WantedPool, avoided_nodes: Collection[str]) -> None: ...
    def delete(self, name: str) -> None: ...
    def nodes(self) -> list[Node]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetParts:
    """What a fleet works with beside Serve."""

    view: FleetView
    drains: DrainRequests
    leaving_routers: LeavingRouters
    scaling: AutoscalingSettings
    draining: DrainingSettings

    @classmethod
    def of(cls, settings: Settings, client: redis.Redis) -> FleetParts:
        """settings: with the ``redis_url`` in force, where ``client`` leads."""
        return cls(
            view=FleetView(settings),
            drains=DrainRequests(client, settings.cluster_name),
            leaving_routers=LeavingRouters(client, settings.cluster_name),
            scaling=settings.autoscaling,
            draining=settings.draining,
        )


class Reconciler:
    """One pass after the other until stopped; owned by one thread."""

    def __init__(
        self,
        wanted: Sequence[WantedPool],
        state: FleetState,
        gangs: GangApplications,
        metrics: FleetMetrics,
        parts: FleetParts,
    ) -> None:
        """wanted: as the settings have it; where the fleet scales, to begin with."""
        self._wanted = wanted
        self._metrics = metrics
        self._state = state
        self._gangs = gangs
        self._parts = parts
        self._scaler = Scaler(parts.scaling, wanted, state)
        self._leaving = GangDrains(parts.view)
        self._siblings = Siblings(state)
        self._requests = NodeRequests(parts.drains, parts.draining.replacement_s)
        self._routers = RouterCare(parts.leaving_routers, gangs)
        self._not_before: dict[PoolName, float] = {}
        self._starting: dict[str, float] = {}
        self._has_served = False
        self._stop = threading.Event()
        self._last_pass = self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self) -> None:
        self._parts.view.start()
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends after the act in hand; gangs are left as they are."""
        self._stop.set()
        self._leaving.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._parts.view.stop()

    def healthy(self) -> bool:
        return self._thread.is_alive() and time.monotonic() - self._last_pass < STALLED_AFTER_S

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if not self._state.epoch:
                    self._state.claim()
                    self._has_served = self._state.was_serving()
                    logger.info("fleet_claimed", extra={"epoch": self._state.epoch, "number": self._state.number})
                self.reconcile()
                self._last_pass = time.monotonic()
                self._metrics.passed()
            except Aborted:
                logger.warning("fleet_superseded", extra={"epoch": self._state.epoch})
                return  # healthy() is false from here on
            except redis.RedisError as error:
                logger.warning("fleet_without_redis", extra={"cause": type(error).__name__})
                self._last_pass = time.monotonic()  # waiting for Redis is no fault of this replica
            except Exception:
                logger.exception("fleet_pass_failed")  # Serve's controller may be restarting: the next pass tells
            self._stop.wait(PASS_S)

    def reconcile(self) -> None:
        """One pass: look, plan, act, tell."""
        running = self._gangs.running()
        view = self._parts.view.look()
        self._note_starts(running)
        nodes = self._gangs.nodes()
        view_here = of_nodes(view, {node.node_id for node in nodes})
        work = self._requests.work(running, nodes, view_here)
        family = self._siblings.look()
        leaving = {*self._leaving.names, *work.gangs, *work.routers}
        wanted = self._scaler.wanted(running, view_here, leaving, elder=None if self._has_served else family.elder)
        if family.is_outlived:
            wanted = replace(wanted, pools=[replace(pool, num_gangs=0) for pool in wanted.pools])
        self._measure(running, wanted)
        mind = Circumstances(
            given_up=self._given_up(wanted.pools),
            condemned=frozenset(work.gangs),
            overdue=work.overdue,
            cheapest=wanted.cheapest,
        )
        misplaced = self._misplaced(running, {node.node_id for node in nodes} - work.avoided)
        staying = [gang for gang in running if gang.name not in self._leaving and gang.name not in misplaced]
        for name in half_drained(view_here, self._leaving.names):  # by a fleet before this one, or by an operator
            staying = [gang for gang in staying if gang.name != name]
            self._empty(name, Cause.SCALE_DOWN, work.gangs, view_here)
        for action in plan(wanted.pools, staying, mind):
            match action:
                case Start(wanted=pool):
                    if time.monotonic() >= self._not_before.get(pool.pool, 0.0):
                        self._start_gang(pool, running, work.avoided)
                case Delete():
                    self._take_away(action, work.gangs, view_here)
        self._end_drains(running, work.gangs)
        if family.is_outlived:
            self._routers.all_leave(view_here)
        else:
            self._routers.mind(wanted.routers, view_here, work, [node.node_id for node in nodes])
        for status in statuses(work, running, view_here):
            self._parts.drains.tell(status)
        serves = is_serving(wanted, running) and not family.is_outlived
        self._has_served |= serves
        self._state.tell_siblings(is_serving=serves)

    def _given_up(self, pools: Sequence[WantedPool]) -> frozenset[PoolName]:
        return frozenset(
            pool.pool for pool in pools if self._state.num_failures(pool.pool, pool.version) >= MAX_FAILURES
        )

    def _start_gang(self, wanted: WantedPool, running: Sequence[RunningGang], avoided: Collection[str]) -> None:
        lowest = max((gang.number + 1 for gang in running if gang.pool == wanted.pool), default=0)
        number = self._state.admit_start(wanted.pool, lowest=lowest)
        name = f"{wanted.pool}-{number}"
        logger.info("gang_starting", extra=self._about(name, wanted.version))
        self._starting[name] = time.monotonic()
        if avoided:
            self._state.note_avoided(name, avoided)
        self._gangs.start(name, wanted, avoided)
        self._metrics.gang_started(wanted.pool)

    def _note_starts(self, running: Sequence[RunningGang]) -> None:
        for gang in running:
            if gang.phase is Phase.READY and gang.name in self._starting:
                took_s = time.monotonic() - self._starting.pop(gang.name)
                self._metrics.gang_ready(gang.pool, took_s)
                self._scaler.started(gang.pool, took_s)

    def _misplaced(self, running: Sequence[RunningGang], welcome: Collection[str]) -> list[str]:
        """Deletes gangs that find no node for avoiding one that takes gangs again; others are started at once."""
        avoided = {name: self._state.avoided_by(name) for name in homeless(running)}
        names = needlessly_homeless(avoided, welcome)
        for gang in running:
            if gang.name in names:
                self._delete_gang(gang.name, gang.version)
        return names

    def _take_away(self, action: Delete, condemned: Mapping[str, float], view: View) -> None:
        """Empty a gang that may hold sessions, delete any other."""
        if action.cause is Cause.FAILED and not self._count_failure(action):
            return
        if not action.is_ready or action.pool == "prefill":
            self._delete_gang(action.name, action.version)
            return
        self._empty(action.name, action.cause, condemned, view)

    def _empty(self, name: str, cause: Cause, condemned: Mapping[str, float], view: View) -> None:
        if time.monotonic() < self._began + BLIND_S and name not in gangs_of(view):
            return
        self._state.admit_delete()
        logger.info("gang_draining", extra={"gang": name, "cause": cause.value, "epoch": self._state.epoch})
        settings = self._parts.draining
        timeout_s = min(settings.timeout_s, condemned.get(name, settings.timeout_s))
        self._leaving.begin(
            name,
            cause,
            view.ranks,
            turns_s=min(settings.turns_s, timeout_s / 2),
            timeout_s=timeout_s,
            excluded_gangs=condemned.keys(),
        )

    def _end_drains(self, running: Sequence[RunningGang], condemned: Mapping[str, float]) -> None:
        versions = {gang.name: gang.version for gang in running if gang.phase is not Phase.LEAVING}
        for name in self._leaving.names:
            if name in condemned:
                self._leaving.hasten(name, timeout_s=condemned[name])
        for drained in self._leaving.ended():
            if drained.name in versions:
                self._delete_gang(drained.name, versions[drained.name])
            self._note_drained(drained)
            self._leaving.forget(drained.name)

    def _note_drained(self, drained: Drained) -> None:
        self._metrics.drain_ended(drained.cause.value, "empty" if drained.is_empty else "failed", drained.took_s)
        about = {"gang": drained.name, "empty": drained.is_empty, "took_s": round(drained.took_s, 1)}
        logger.info("gang_drained", extra=about)

    def _delete_gang(self, name: str, version: str) -> None:
        self._state.admit_delete()
        logger.info("gang_deleting", extra=self._about(name, version))
        self._starting.pop(name, None)
        self._gangs.delete(name)

    def _count_failure(self, action: Delete) -> bool:
        """Whether it may go: the last of too many stays, failed, where an operator can see why."""
        self._metrics.gang_failed(action.pool)
        count = self._state.count_failure(action.pool, action.version)
        pause_s = min(MAX_BACKOFF_S, 2.0**count)
        self._not_before[action.pool] = time.monotonic() + pause_s
        logger.warning("gang_failed", extra={"gang": action.name, "count": count, "pause_s": pause_s})
        return count < MAX_FAILURES

    def _measure(self, running: Sequence[RunningGang], wanted: Wanted) -> None:
        for pool in wanted.pools:
            self._metrics.wanted(pool.pool, pool.num_gangs)
        if wanted.routers is not None:
            self._metrics.wanted(ROUTERS, wanted.routers)
        seen = [(gang.pool, gang.phase.value) for gang in running]
        self._metrics.gangs(seen, pools=POOL_NAMES, phases=[phase.value for phase in Phase])

    def _about(self, gang: str, version: str) -> dict[str, object]:
        return {"gang": gang, "version": version, "epoch": self._state.epoch}
