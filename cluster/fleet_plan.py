"""What the fleet does to bring the running gangs to the wanted ones. Pure.

Each gang is one Serve application, named ``<pool>-<number>``; its one deployment is named by the gang's version.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Any

from seamount.cluster.settings import Settings
from seamount.cluster.specs import pool_settings
from seamount.workers.spec import PoolName

POOL_NAMES: tuple[PoolName, ...] = ("decode", "prefill")
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
    """One application, as Serve reports it; names are ``<pool>-<number>``. nodes: Ray ids of where its ranks are."""

    pool: PoolName
    number: int
    version: str
    phase: Phase
    nodes: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One more gang of ``wanted``; its number is drawn when the start is admitted."""

    wanted: WantedPool


class Cause(StrEnum):
    """Why a gang goes."""

    SCALE_DOWN = "scale_down"
    NODE = "node"
    VERSION = "version"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """One gang is to go; ``is_ready``: it may hold sessions, which move first."""

    name: str
    pool: PoolName
    version: str
    cause: Cause
    is_ready: bool


Action = Start | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a plan has to mind besides.

    given_up: pools that failed to come up too often; condemned: gangs on nodes that are to be emptied; overdue: those
    of them that go whether or not there is one in their place; cheapest: names, the cheapest to lose first; surplus:
    why there are too many of a pool.
    """

    given_up: frozenset[PoolName] = frozenset()
    condemned: frozenset[str] = frozenset()
    overdue: frozenset[str] = frozenset()
    cheapest: tuple[str, ...] = ()
    surplus: Cause = Cause.SCALE_DOWN


_NONE = Circumstances()


def plan(
    wanted: Iterable[WantedPool], running: Iterable[RunningGang], circumstances: Circumstances = _NONE
) -> list[Action]:
    """What brings the running gangs to the wanted ones; empty when nothing is to be done.

    - Missing gangs of the wanted version are started, surplus ones deleted: first those that are not ready, then the
      cheapest to lose, then the newest. A failed gang is deleted (the next pass starts another), unless its pool was
      given up.
    - Gangs of an older version, or condemned ones, stay until as many others are ready: there are never fewer ready
      gangs than wanted because of an update or a node. (That needs room for one more gang; overdue ones do not wait.)
    - A pool that is not wanted is emptied. Gangs that are leaving already are left alone and count for nothing.
    """
    present = [gang for gang in running if gang.phase is not Phase.LEAVING]
    actions: list[Action] = []
    named = set()
    for pool in wanted:
        named.add(pool.pool)
        actions += _plan_pool(pool, [gang for gang in present if gang.pool == pool.pool], circumstances)
    actions += [_delete(gang, circumstances.surplus) for gang in present if gang.pool not in named]
    return actions


def _plan_pool(wanted: WantedPool, gangs: Sequence[RunningGang], mind: Circumstances) -> list[Action]:
    current = [gang for gang in gangs if gang.version == wanted.version and gang.name not in mind.condemned]
    has_given_up = wanted.pool in mind.given_up
    failed = [] if has_given_up else [gang for gang in current if gang.phase is Phase.FAILED]
    kept = [gang for gang in current if gang not in failed]
    num_missing = wanted.num_gangs - len(kept)
    order = {name: at for at, name in enumerate(mind.cheapest)}

    def worth(gang: RunningGang) -> tuple[bool, int, int]:
        return gang.phase is Phase.READY, order.get(gang.name, len(order)), -gang.number

    surplus = sorted(kept, key=worth)[: max(0, -num_missing)]

    old = [gang for gang in gangs if gang not in current]
    num_ready = sum(gang.phase is Phase.READY for gang in kept)
    num_old_needed = max(0, wanted.num_gangs - num_ready)
    oldest_first = sorted(old, key=lambda gang: (gang.name not in mind.overdue, gang.phase is Phase.READY, gang.number))
    num_overdue = sum(gang.name in mind.overdue for gang in old)
    outlived = oldest_first[: max(num_overdue, len(old) - num_old_needed)]

    starts: list[Action] = [Start(wanted=wanted)] * max(0, num_missing)
    # Failed ones first: their failure is counted, and the pause before the next start set, before that start.
    return [
        *(_delete(gang, Cause.FAILED) for gang in failed),
        *starts,
        *(_delete(gang, mind.surplus) for gang in surplus),
        *(_delete(gang, Cause.NODE if gang.name in mind.condemned else Cause.VERSION) for gang in outlived),
    ]


def _delete(gang: RunningGang, cause: Cause) -> Delete:
    return Delete(name=gang.name, pool=gang.pool, version=gang.version, cause=cause, is_ready=gang.phase is Phase.READY)


def wanted_pools(settings: Settings) -> list[WantedPool]:
    """What the settings ask the fleet for; where it scales, to begin with."""
    wanted = []
    for name in POOL_NAMES:
        pool = pool_settings(settings, name)
        wanted.append(
            WantedPool(
                pool=name,
                num_gangs=_first_number(settings, name),
                expert_parallel=pool.expert_parallel,
                version=gang_version(settings, name),
            )
        )
    return wanted


def least_pools(settings: Settings) -> list[WantedPool]:
    """What must be ready before the system counts as up: of a pool that scales, its least."""
    scaling = settings.autoscaling
    if not scaling.enabled:
        return wanted_pools(settings)
    least: dict[PoolName, int] = {"prefill": scaling.prefill.min_gangs, "decode": scaling.decode.min_gangs}
    return [replace(pool, num_gangs=least[pool.pool]) for pool in wanted_pools(settings)]


def _first_number(settings: Settings, name: PoolName) -> int:
    scaling, gangs = settings.autoscaling, pool_settings(settings, name).gangs
    if not scaling.enabled:
        return gangs
    bounds = scaling.prefill if name == "prefill" else scaling.decode
    return min(max(gangs, bounds.min_gangs), bounds.max_gangs)


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


def running_gangs(
    applications: Mapping[str, Any], *, nodes: Mapping[str, frozenset[str]] = MappingProxyType({})
) -> list[RunningGang]:
    """The gangs among Serve's applications (``serve.status().applications``); nodes: by application, Ray ids.

    A gang's version is the name of its one deployment. Applications of other names are none of the fleet's business.
    """
    gangs = []
    for name, application in applications.items():
        version = next(iter(application.deployments), "")
        phase = _phase(application.status.value)
        gang = named_gang(name, version=version, phase=phase, nodes=nodes.get(name, frozenset()))
        if gang is not None:
            gangs.append(gang)
    return gangs


def named_gang(name: str, *, version: str, phase: Phase, nodes: frozenset[str] = frozenset()) -> RunningGang | None:
    """None where the name is no gang's."""
    match = _GANG_NAME.match(name)
    if match is None:
        return None
    pool: PoolName = "prefill" if match[1] == "prefill" else "decode"
    return RunningGang(pool=pool, number=int(match[2]), version=version, phase=phase, nodes=nodes)


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
