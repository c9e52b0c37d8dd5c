"""Keeps the wanted gangs running: each gang is one Serve application, started and deleted by the fleet alone.

``fleet_plan.plan`` says what to do and is pure. ``Reconciler`` does it, about twice a second, from a thread of its own
(calls into Serve block). What runs is read from Serve, so a new fleet adopts the gangs of a dead one without touching
them. Redis keeps only what Serve cannot know: which fleet is the present one, which names were used up, how often a
pool failed to come up, what was wanted last.

A gang that goes is emptied first (``fleet_draining``), whatever the reason: too little load (``fleet_scaling``), a node
that is to be emptied (``fleet_nodes``), a newer version, or a gang of a younger Ray cluster of the same name
(``fleet_siblings``). An older fleet that is still about is fenced off: see ``fleet_state``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import redis

from seamount.cluster.autoscaling import AutoscalingSettings, DrainingSettings
from seamount.cluster.fleet_acts import GangActs, GangApplications
from seamount.cluster.fleet_draining import Drained, GangDrains
from seamount.cluster.fleet_look import gangs_of, half_drained, of_nodes, progress, ranks_elsewhere
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_nodes import NodeRequests, statuses
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
from seamount.cluster.fleet_routers import RouterCare
from seamount.cluster.fleet_scaling import ROUTERS, Scaler, Wanted
from seamount.cluster.fleet_siblings import Family, Siblings, left_here, needed_to_serve
from seamount.cluster.fleet_state import FleetState
from seamount.cluster.fleet_view import FleetView, View
from seamount.cluster.leaving import LeavingRouters
from seamount.cluster.node_drain import DrainRequests
from seamount.cluster.settings import Settings
from seamount.wire.errors import Aborted

logger = logging.getLogger("seamount.fleet")

PASS_S = 0.5
"""Pause between two looks at what runs."""
STALLED_AFTER_S = 60.0
"""A pass that takes longer is stuck in a call to Serve: the replica counts as unhealthy and is replaced."""
REST_S = 30.0
"""For so long a Ray cluster that has come up beside an older one does not scale: KubeRay turns to it when it finds all
its applications running, and a gang that waits for room, which the older one holds, would keep it from that."""
BLIND_S = 10.0
"""For so long a fleet that has just begun may not have seen the ranks of a gang yet, and could not empty it."""


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
        self._acts = GangActs(state, gangs, metrics)
        self._scaler = Scaler(parts.scaling, wanted, state)
        self._leaving = GangDrains(parts.view)
        self._siblings = Siblings(state)
        self._requests = NodeRequests(parts.drains, parts.draining.replacement_s)
        self._routers = RouterCare(parts.leaving_routers, gangs)
        self._has_served = False
        self._rests_until = 0.0
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
                    self._has_served = self._state.has_served()
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
        for pool_name, took_s in self._acts.note_starts(running):
            self._scaler.started(pool_name, took_s)
        nodes = self._gangs.nodes()
        node_ids = {node.node_id for node in nodes}
        view_here = of_nodes(view, node_ids)
        work = self._requests.work(running, nodes, view_here)
        family = self._siblings.look()
        given_up = self._acts.given_up(self._wanted)
        of_all = self._scaler.wanted(
            running,
            view_here,
            {*self._leaving.names, *work.gangs, *work.routers},
            elsewhere=ranks_elsewhere(view, node_ids),
            family=family,
            follows=not self._has_served,
            rests=time.monotonic() < self._rests_until,
            given_up=given_up,
        )
        wanted = replace(of_all, pools=left_here(of_all.pools, family))
        self._measure(running, wanted)
        mind = Circumstances(
            given_up=given_up,
            condemned=frozenset(work.gangs),
            overdue=work.overdue,
            cheapest=wanted.cheapest,
            surplus=Cause.VERSION if family.is_outlived or any(family.ready.values()) else Cause.SCALE_DOWN,
        )
        misplaced = self._acts.delete_misplaced(running, node_ids - work.avoided)
        staying = [gang for gang in running if gang.name not in self._leaving and gang.name not in misplaced]
        for name in half_drained(view_here, self._leaving.names):  # by a fleet before this one, or by an operator
            staying = [gang for gang in staying if gang.name != name]
            self._empty(name, mind.surplus, work.gangs, view_here)
        for action in plan(wanted.pools, staying, mind):
            match action:
                case Start(wanted=pool):
                    self._acts.start(pool, running, work.avoided)
                case Delete():
                    self._take_away(action, work.gangs, view_here)
        self._end_drains(running, work.gangs)
        if family.is_outlived:
            self._routers.all_leave(view_here)
        else:
            self._routers.mind(wanted.routers, view_here, work, [node.node_id for node in nodes])
        for status in statuses(work, running, view_here):
            self._parts.drains.tell(status)
        self._tell(running, wanted.pools, family)

    def _tell(self, running: Sequence[RunningGang], wanted: Sequence[WantedPool], family: Family) -> None:
        """To the other Ray clusters, and to whoever waits for this one to come up."""
        needed = progress(needed_to_serve(wanted, self._wanted, family), running, ())
        is_up = all(pool.num_ready >= pool.num_wanted for pool in needed.values())
        if is_up and family.knows_elders and not family.is_outlived and not self._has_served:
            self._state.note_served()
            logger.info("fleet_has_come_up", extra={"number": self._state.number})
            self._has_served = True
            if family.elder is not None:
                self._rests_until = time.monotonic() + REST_S
        told = progress(wanted, running, self._leaving.names)
        self._state.tell_siblings(is_serving=self._has_served, progress=told)

    def _take_away(self, action: Delete, condemned: Mapping[str, float], view: View) -> None:
        """Empty a gang that may hold sessions, delete any other."""
        if action.cause is Cause.FAILED and not self._acts.count_failure(action):
            return
        if not action.is_ready or action.pool == "prefill":
            self._acts.delete(action.name, action.version)
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
                self._acts.delete(drained.name, versions[drained.name])
            self._note_drained(drained)
            self._leaving.forget(drained.name)

    def _note_drained(self, drained: Drained) -> None:
        self._metrics.drain_ended(drained.cause.value, "empty" if drained.is_empty else "failed", drained.took_s)
        about = {"gang": drained.name, "empty": drained.is_empty, "took_s": round(drained.took_s, 1)}
        logger.info("gang_drained", extra=about)

    def _measure(self, running: Sequence[RunningGang], wanted: Wanted) -> None:
        for pool in wanted.pools:
            self._metrics.wanted(pool.pool, pool.num_gangs)
        if wanted.routers is not None:
            self._metrics.wanted(ROUTERS, wanted.routers)
        seen = [(gang.pool, gang.phase.value) for gang in running]
        self._metrics.gangs(seen, pools=POOL_NAMES, phases=[phase.value for phase in Phase])
