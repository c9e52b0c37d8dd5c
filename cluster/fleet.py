"""Keeps the wanted gangs running: each gang is one Serve application, started and deleted by the fleet alone.

``plan`` says what to do and is pure. ``Reconciler`` does it, about once a second, from a thread of its own (calls into
Serve block). What runs is read from Serve, so a new fleet adopts the gangs of a dead one without
touching them. Redis keeps only what Serve cannot know: which fleet is the present one, which names were used up, how
often a pool failed to come up.

An older fleet that is still about is fenced off: see ``fleet_state``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import redis

from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_state import FleetState
from seamount.cluster.settings import Settings
from seamount.cluster.specs import pool_settings
from seamount.wire.errors import Aborted
from seamount.workers.spec import PoolName

logger = logging.getLogger("seamount.fleet")

POOL_NAMES: tuple[PoolName, ...] = ("decode", "prefill")
PASS_S = 0.5
"""Pause between two looks at what runs."""
STALLED_AFTER_S = 60.0
"""A pass that takes longer is stuck in a call to Serve: the replica counts as unhealthy and is replaced."""
MAX_FAILURES = 3
"""Gangs of one pool and version that fail to come up before the fleet leaves the failed one standing, to be seen."""
MAX_BACKOFF_S = 30.0
_GANG_NAME = re.compile(r"^(prefill|decode)-(\d+)$")


class Phase(Enum):
    """How far a gang is: ``STARTING`` also while Serve replaces it after a failure, ``FAILED`` when Serve gave up."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedPool:
    """``version``: digest of everything a rank is told; gangs of another version are replaced."""

    pool: PoolName
    num_gangs: int
    expert_parallel: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGang:
    """One application, as Serve reports it; names are ``<pool>-<number>``."""

    pool: PoolName
    number: int
    version: str
    phase: Phase

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One more gang of ``wanted``; its number is drawn when the start is admitted."""

    wanted: WantedPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    name: str
    pool: PoolName
    version: str
    failed: bool


Action = Start | Delete


def plan(
    wanted: Iterable[WantedPool], running: Iterable[RunningGang], given_up: frozenset[PoolName] = frozenset()
) -> list[Action]:
    """What brings the running gangs to the wanted ones; empty when nothing is to be done.

    - Missing gangs of the wanted version are started, surplus ones deleted: first those that are not ready, then the
      newest. A failed gang is deleted (the next pass starts another), unless its pool is in ``given_up``.
    - Gangs of an older version stay until as many of the new one are ready: there are never fewer ready gangs than
      wanted because of an update. (An update therefore needs room for one more gang.)
    - A pool that is not wanted is emptied. Gangs that are leaving already are left alone and count for nothing.
    """
    present = [gang for gang in running if gang.phase is not Phase.LEAVING]
    actions: list[Action] = []
    named = set()
    for pool in wanted:
        named.add(pool.pool)
        gangs = [gang for gang in present if gang.pool == pool.pool]
        actions += _plan_pool(pool, gangs, given_up=pool.pool in given_up)
    actions += [_delete(gang) for gang in present if gang.pool not in named]
    return actions


def _plan_pool(wanted: WantedPool, gangs: Sequence[RunningGang], *, given_up: bool) -> list[Action]:
    current = [gang for gang in gangs if gang.version == wanted.version]
    failed = [] if given_up else [gang for gang in current if gang.phase is Phase.FAILED]
    kept = [gang for gang in current if gang not in failed]
    num_missing = wanted.num_gangs - len(kept)
    # The worst of the wanted version go first: those that serve nobody yet, then the newest.
    by_worth = sorted(kept, key=lambda gang: (gang.phase is not Phase.READY, gang.number), reverse=True)
    surplus = by_worth[: max(0, -num_missing)]

    old = [gang for gang in gangs if gang.version != wanted.version]
    num_ready = sum(gang.phase is Phase.READY for gang in kept)
    num_old_needed = max(0, wanted.num_gangs - num_ready)
    oldest_first = sorted(old, key=lambda gang: (gang.phase is Phase.READY, gang.number))
    outlived = oldest_first[: max(0, len(old) - num_old_needed)]

    starts: list[Action] = [Start(wanted=wanted)] * max(0, num_missing)
    # Failed ones first: their failure is counted, and the pause before the next start set, before that start.
    return [*map(_delete, failed), *starts, *map(_delete, surplus), *map(_delete, outlived)]


def _delete(gang: RunningGang) -> Delete:
    return Delete(name=gang.name, pool=gang.pool, version=gang.version, failed=gang.phase is Phase.FAILED)


def wanted_pools(settings: Settings) -> list[WantedPool]:
    """What the settings ask the fleet for."""
    wanted = []
    for name in POOL_NAMES:
        pool = pool_settings(settings, name)
        wanted.append(
            WantedPool(
                pool=name,
                num_gangs=pool.gangs,
                expert_parallel=pool.expert_parallel,
                version=gang_version(settings, name),
            )
        )
    return wanted


def gang_version(settings: Settings, pool: PoolName) -> str:
    """Digest of everything in the settings that a rank of the pool depends on; the number of gangs is not in it."""
    told = settings.model_dump(
        mode="json",
        include={"cluster_name", "model", "cache", "engine", "directory", "transfer", "redis"},
    )
    told["host"] = settings.pools.host
    told["token_file"] = str(settings.router.worker_token_file)
    told["pool"] = pool_settings(settings, pool).model_dump(mode="json", exclude={"gangs"})
    return "v" + hashlib.sha256(json.dumps([pool, told], sort_keys=True).encode()).hexdigest()[:10]


def running_gangs(applications: Mapping[str, Any]) -> list[RunningGang]:
    """The gangs among Serve's applications (``serve.status().applications``).

    A gang's version is the name of its one deployment. Applications of other names are none of the fleet's business.
    """
    gangs = []
    for name, application in applications.items():
        if match := _GANG_NAME.match(name):
            pool: PoolName = "prefill" if match[1] == "prefill" else "decode"
            version = next(iter(application.deployments), "")
            phase = _phase(application.status.value)
            gangs.append(RunningGang(pool=pool, number=int(match[2]), version=version, phase=phase))
    return gangs


def _phase(status: str) -> Phase:
    match status:
        case "RUNNING":
            return Phase.READY
        case "DEPLOY_FAILED":
            return Phase.FAILED
        case "DELETING":
            return Phase.LEAVING
        case _:  # NOT_STARTED, DEPLOYING, UNHEALTHY: on its way, or being replaced by Serve itself
            return Phase.STARTING


class GangApplications(Protocol):
    """What the fleet needs of Serve; calls may block for seconds and raise whatever Ray raises."""

    def running(self) -> list[RunningGang]: ...
    def start(self, name: str, wanted: WantedPool) -> None: ...
    def delete(self, name: str) -> None: ...


class Reconciler:
    """One pass after the other until stopped; owned by one thread."""

    def __init__(
        self, wanted: Sequence[WantedPool], state: FleetState, gangs: GangApplications, metrics: FleetMetrics
    ) -> None:
        self._wanted = wanted
        self._metrics = metrics
        self._state = state
        self._gangs = gangs
        self._not_before: dict[PoolName, float] = {}
        self._stop = threading.Event()
        self._last_pass = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends after the act in hand; gangs are left as they are."""
        self._stop.set()
        self._thread.join(timeout_s)

    def healthy(self) -> bool:
        return self._thread.is_alive() and time.monotonic() - self._last_pass < STALLED_AFTER_S

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if not self._state.epoch:
                    self._state.claim()
                    logger.info("fleet_claimed", extra={"epoch": self._state.epoch})
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
        """One pass: look, plan, act."""
        running = self._gangs.running()
        for pool in self._wanted:
            self._metrics.wanted(pool.pool, pool.num_gangs)
        seen = [(gang.pool, gang.phase.value) for gang in running]
        self._metrics.gangs(seen, pools=POOL_NAMES, phases=[phase.value for phase in Phase])
        given_up = frozenset(
            pool.pool for pool in self._wanted if self._state.num_failures(pool.pool, pool.version) >= MAX_FAILURES
        )
        for action in plan(self._wanted, running, given_up):
            match action:
                case Start(wanted=wanted):
                    if time.monotonic() >= self._not_before.get(wanted.pool, 0.0):
                        self._start_gang(wanted, running)
                case Delete():
                    self._delete_gang(action)

    def _start_gang(self, wanted: WantedPool, running: Sequence[RunningGang]) -> None:
        lowest = max((gang.number + 1 for gang in running if gang.pool == wanted.pool), default=0)
        number = self._state.admit_start(wanted.pool, lowest=lowest)
        name = f"{wanted.pool}-{number}"
        logger.info("gang_starting", extra=self._about(name, wanted.version))
        self._gangs.start(name, wanted)
        self._metrics.gang_started(wanted.pool)

    def _delete_gang(self, action: Delete) -> None:
        self._state.admit_delete()
        if action.failed:
            self._metrics.gang_failed(action.pool)
            count = self._state.count_failure(action.pool, action.version)
            pause_s = min(MAX_BACKOFF_S, 2.0**count)
            self._not_before[action.pool] = time.monotonic() + pause_s
            logger.warning("gang_failed", extra={"gang": action.name, "count": count, "pause_s": pause_s})
            if count >= MAX_FAILURES:
                return  # it stays, failed, where an operator can see why
        logger.info("gang_deleting", extra=self._about(action.name, action.version))
        self._gangs.delete(action.name)

    def _about(self, gang: str, version: str) -> dict[str, object]:
        return {"gang": gang, "version": version, "epoch": self._state.epoch}
