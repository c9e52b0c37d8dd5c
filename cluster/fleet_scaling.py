"""Scaling inside the fleet: from what it sees to ``scaling.decide``, and what that means for the wanted gangs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from seamount.cluster.autoscaling import AutoscalingSettings
from seamount.cluster.fleet_look import gangs_elsewhere
from seamount.cluster.fleet_meter import Meter, SeenRank
from seamount.cluster.fleet_plan import RunningGang, WantedPool
from seamount.cluster.fleet_siblings import Family
from seamount.cluster.fleet_state import FleetState
from seamount.cluster.fleet_view import View
from seamount.cluster.load import Decision, GangLoad, History, Snapshot
from seamount.cluster.moving import cheapest_first
from seamount.cluster.scaling import decide
from seamount.workers.spec import PoolName

_LOG = logging.getLogger("seamount.fleet")
_START_SMOOTHING = 0.5
_WANTED = "wanted:"
_START = "start_s:"
ROUTERS = "router"
_ALONE = Family()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Of one pass, for all Ray clusters of the name together. Here: cheapest, gangs, the cheapest to lose first;
    routers, None = not the fleet's to say."""

    pools: Sequence[WantedPool]
    cheapest: tuple[str, ...] = ()
    routers: int | None = None


class Scaler:
    """Owned by the fleet's thread. What was wanted last, and how long gangs take to start, outlive it in ``state``."""

    def __init__(
        self,
        settings: AutoscalingSettings,
        pools: Sequence[WantedPool],
        state: FleetState,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """pools: as the settings want them without scaling, or to begin with."""
        self._settings, self._pools, self._state, self._clock = settings, pools, state, clock
        ranks = {pool.pool: pool.expert_parallel for pool in pools}
        self._slo = settings.slo(prefill_ranks=ranks.get("prefill", 1), decode_ranks=ranks.get("decode", 1))
        self._meter = Meter(clock)
        self._meter_elsewhere = Meter(clock)
        self._history = History()
        self._last: Wanted | None = None
        self._kept: dict[str, int] = {}

    def wanted(
        self,
        running: Sequence[RunningGang],
        view: View,
        leaving: Collection[str],
        *,
        elsewhere: Sequence[SeenRank] = (),
        family: Family = _ALONE,
        follows: bool = False,
        rests: bool = False,
        given_up: Collection[PoolName] = (),
    ) -> Wanted:
        """What there should be now.

        view: of this Ray cluster; elsewhere: ranks of the others of the name. leaving: gangs and routers that go
        already, or are to be replaced. follows: this Ray cluster has still to come up with as many as ``family.elder``
        wants, if there is one. rests: nothing is to change now. given_up: pools whose gangs of today's version failed
        to come up too often.
        """
        loads = self._meter.gangs(running, view.ranks)
        there = self._meter_elsewhere.gangs(gangs_elsewhere(elsewhere), elsewhere)
        cheapest = tuple(gang.name for gang in cheapest_first([gang for gang in loads if gang.name not in leaving]))
        if not self._settings.enabled:
            wanted = Wanted(pools=self._pools)
        elif follows and family.elder is not None:
            wanted = self._remembered(family.elder)
        else:
            wanted = self._last or self._remembered()
            if view.routers and not rests:
                changing = self._changing(running)
                here = [gang for gang in loads if gang.name not in leaving and _counts(gang, changing)]
                seen = Counter(gang.pool for gang in there)
                unseen = {pool for pool, number in family.ready.items() if seen[pool] < number}
                decision = self._decide([*here, *there], view, leaving)
                wanted = self._scaled(wanted, decision, stuck=changing & set(given_up), unseen=unseen)
        self._keep(wanted)
        self._last = replace(wanted, cheapest=cheapest)
        return self._last

    def started(self, pool: PoolName, took_s: float) -> None:
        """A gang serves, so long after it was asked for."""
        before = self._state.recall(_START + pool)
        known = took_s if before is None else before
        self._state.remember(_START + pool, known + _START_SMOOTHING * (took_s - known))

    def _decide(self, gangs: Sequence[GangLoad], view: View, leaving: Collection[str]) -> Decision:
        return decide(
            Snapshot(
                now_s=self._clock(),
                gangs=tuple(gangs),
                routers=tuple(load for record, load in view.routers if record.peer_id not in leaving),
                num_prompt_tokens=self._meter.num_prompt_tokens + self._meter_elsewhere.num_prompt_tokens,
                prefill_start_s=self._start_s("prefill"),
                decode_start_s=self._start_s("decode"),
                history=self._history,
            ),
            self._slo,
        )

    def _scaled(
        self, last: Wanted, decision: Decision, *, stuck: Collection[PoolName], unseen: Collection[PoolName]
    ) -> Wanted:
        """stuck: pools that stay as they are, since their gangs of an older version could not be started again; unseen:
        those that do not shrink, since younger Ray clusters have gangs whose load is not seen here."""
        numbers: dict[PoolName, int] = {"prefill": decision.prefill, "decode": decision.decode}
        for pool in last.pools:
            if pool.pool in stuck:
                numbers[pool.pool] = pool.num_gangs
            elif pool.pool in unseen:
                numbers[pool.pool] = max(numbers[pool.pool], pool.num_gangs)
        self._history = replace(decision.history, prefill=numbers["prefill"], decode=numbers["decode"])
        pools = [replace(pool, num_gangs=numbers[pool.pool]) for pool in self._pools]
        wanted = Wanted(pools=pools, routers=decision.routers)
        if wanted.pools != last.pools or wanted.routers != last.routers:
            look = decision.look
            because = {"prefill": look.prefill.reason, "decode": look.decode.reason}
            about = {"prefill": numbers["prefill"], "decode": numbers["decode"], "routers": decision.routers}
            _LOG.info("fleet_scales", extra={**about, "because": because})
        return wanted

    def _changing(self, running: Sequence[RunningGang]) -> set[PoolName]:
        """Pools with gangs of an older version."""
        versions = {pool.pool: pool.version for pool in self._pools}
        return {gang.pool for gang in running if gang.version != versions.get(gang.pool)}

    def _start_s(self, pool: PoolName) -> float:
        measured = self._state.recall(_START + pool)
        return self._settings.start_s if measured is None else measured

    def _remembered(self, elder: str | None = None) -> Wanted:
        """What a fleet before this one, or that of an older Ray cluster, wanted last, within today's limits; decisions
        go on from there."""
        pools = []
        for pool in self._pools:
            limits = self._slo.prefill if pool.pool == "prefill" else self._slo.decode
            stored = self._state.recall(_WANTED + pool.pool, of=elder)
            number = pool.num_gangs if stored is None else int(stored)
            pools.append(replace(pool, num_gangs=min(max(number, limits.at_least), limits.at_most)))
        numbers = {pool.pool: pool.num_gangs for pool in pools}
        stored = self._state.recall(_WANTED + ROUTERS, of=elder)
        allowed = self._slo.routers
        routers = None if stored is None else min(max(int(stored), allowed.at_least), allowed.at_most)
        self._history = History(prefill=numbers.get("prefill"), decode=numbers.get("decode"), routers=routers)
        return Wanted(pools=pools, routers=routers)

    def _keep(self, wanted: Wanted) -> None:
        """For the fleet after this one, and for that of a younger Ray cluster."""
        numbers: dict[str, int] = {pool.pool: pool.num_gangs for pool in wanted.pools}
        if wanted.routers is not None:
            numbers[ROUTERS] = wanted.routers
        for name, number in numbers.items():
            if self._kept.get(name) != number:
                self._state.remember(_WANTED + name, number)
        self._kept = numbers


def _counts(gang: GangLoad, changing: Collection[PoolName]) -> bool:
    """Gangs that start in the place of others of an older version are no more than there were."""
    return gang.is_ready or gang.pool not in changing
