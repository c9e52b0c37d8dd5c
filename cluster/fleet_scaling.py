"""Scaling inside the fleet: from what it sees to ``scaling.decide``, and what that means for the wanted gangs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from seamount.cluster.autoscaling import AutoscalingSettings
from seamount.cluster.fleet_meter import Meter
from seamount.cluster.fleet_plan import RunningGang, WantedPool
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Of one pass. cheapest: gangs, the cheapest to lose first; routers: None = not the fleet's to say."""

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
        self._history = History()
        self._last: Wanted | None = None

    def wanted(
        self, running: Sequence[RunningGang], view: View, leaving: Collection[str], *, elder: str | None = None
    ) -> Wanted:
        """What there should be now. leaving: gangs and routers that go already, or are to be replaced. elder: the Ray
        session whose load is to come here: as many gangs as it wants are to stand before any of it does."""
        loads = self._meter.gangs(running, view.ranks)
        cheapest = tuple(gang.name for gang in cheapest_first([gang for gang in loads if gang.name not in leaving]))
        if not self._settings.enabled:
            return Wanted(pools=self._pools, cheapest=cheapest)
        if elder is not None:
            self._last = replace(self._remembered(elder), cheapest=cheapest)
            return self._last
        last = self._last or self._remembered()
        if self._is_changing(running, leaving) or not view.routers:
            self._last = replace(last, cheapest=cheapest)
            return self._last
        decision = self._decide([gang for gang in loads if gang.name not in leaving], view, leaving)
        numbers: dict[PoolName, int] = {"prefill": decision.prefill, "decode": decision.decode}
        pools = [replace(pool, num_gangs=numbers[pool.pool]) for pool in self._pools]
        wanted = Wanted(pools=pools, cheapest=cheapest, routers=decision.routers)
        if wanted.pools != last.pools or wanted.routers != last.routers:
            self._remember(wanted, decision)
        self._last = wanted
        return wanted

    def started(self, pool: PoolName, took_s: float) -> None:
        """A gang serves, so long after it was asked for."""
        before = self._state.recall(_START + pool)
        known = took_s if before is None else before
        self._state.remember(_START + pool, known + _START_SMOOTHING * (took_s - known))

    def _decide(self, gangs: Sequence[GangLoad], view: View, leaving: Collection[str]) -> Decision:
        decision = decide(
            Snapshot(
                now_s=self._clock(),
                gangs=tuple(gangs),
                routers=tuple(load for record, load in view.routers if record.peer_id not in leaving),
                num_prompt_tokens=self._meter.num_prompt_tokens,
                prefill_start_s=self._start_s("prefill"),
                decode_start_s=self._start_s("decode"),
                history=self._history,
            ),
            self._slo,
        )
        self._history = decision.history
        return decision

    def _is_changing(self, running: Sequence[RunningGang], leaving: Collection[str]) -> bool:
        """Gangs of another version, or on nodes that are to be emptied, still carry load: their successors come first,
        as many as there were to be."""
        versions = {pool.pool: pool.version for pool in self._pools}
        return any(gang.name not in leaving and gang.version != versions.get(gang.pool) for gang in running)

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
        self._history = History(prefill=numbers.get("prefill"), decode=numbers.get("decode"))
        return Wanted(pools=pools)

    def _remember(self, wanted: Wanted, decision: Decision) -> None:
        for pool in wanted.pools:
            self._state.remember(_WANTED + pool.pool, pool.num_gangs)
        look = decision.look
        _LOG.info(
            "fleet_scales",
            extra={
                "prefill": decision.prefill,
                "decode": decision.decode,
                "routers": decision.routers,
                "because": {"prefill": look.prefill.reason, "decode": look.decode.reason},
            },
        )
