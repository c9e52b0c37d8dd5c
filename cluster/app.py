"""The system on Ray Serve: the router's application, the fleet's, and through the fleet one for each gang.

``deploy`` starts Ray on this machine unless the process is connected to a cluster already, and returns when every
wanted gang and the router are ready. Ray is imported by the functions that need it: whoever only asks for help or
status doesn't wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from seamount.cluster.fleet import PASS_S
from seamount.cluster.fleet_plan import Phase, RunningGang, WantedPool, least_pools, running_gangs
from seamount.cluster.local_ray import LocalRay
from seamount.cluster.serve_status import applications, explanation
from seamount.cluster.settings import Settings
from seamount.wire.errors import DeadlineExceeded, SeamountError, Unavailable

ROUTER_APPLICATION = "router"
FLEET_APPLICATION = "fleet"
ROUTER_RESOURCE = "router"
"""Where nodes offer this custom resource, routers run only there."""
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0

_POLL_S = 0.2
_GIVEN_UP_AFTER_S = 10 * PASS_S


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolProgress:
    """How far a pool is; counts are gangs. ``detail``: what Serve says of those that aren't up, empty if all are."""

    pool: str
    num_ready: int
    num_wanted: int
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What ``deploy`` brought up. ``ray``: the cluster that was started for it, None for one that was there before."""

    router_address: str
    ray: LocalRay | None

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """``shutdown``, then Ray if it was started here."""
        try:
            shutdown(timeout_s)
        finally:
            if self.ray is not None:
                self.ray.stop()


def deploy(
    settings: Settings,
    *,
    redis_url: str,
    on_progress: Callable[[list[PoolProgress]], None] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Deployment:
    """Bring the whole system up; ``on_progress`` is called at every change.

    Raises ``Unavailable`` (ROUTER_FAILED, POOL_FAILED) when a part cannot come up, ``DeadlineExceeded`` after
    ``timeout_s``; what was started until then has been stopped.
    """
    local = LocalRay.start(settings.run_dir) if LocalRay.is_needed() else None
    try:
        address = _run_applications(settings, redis_url)
        _wait_for_pools(settings, on_progress or (lambda pools: None), timeout_s)
    except BaseException:
        with suppress(SeamountError):
            shutdown(STOP_TIMEOUT_S)
        if local is not None:
            local.stop()
        raise
    return Deployment(router_address=address, ray=local)


def shutdown(timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Delete our applications: the fleet first, so that nothing is started anew, then the router, whose turns need the
    gangs, then the gangs. Every replica's own shutdown is awaited. Serve and Ray go on.

    Raises ``DeadlineExceeded`` if some are still there after ``timeout_s``.
    """
    from ray import serve

    deadline = time.monotonic() + timeout_s
    for names in ({FLEET_APPLICATION}, {ROUTER_APPLICATION}, {gang.name for gang in running_gangs(applications())}):
        for name in names & applications().keys():
            serve.delete(name, _blocking=False)
        while left := names & applications().keys():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"still stopping after {timeout_s:g} s: {sorted(left)}", reason="STOP_TIMEOUT")
            time.sleep(_POLL_S)


def _run_applications(settings: Settings, redis_url: str) -> str:
    """Start the fleet, then the router (gangs come up meanwhile); the router's address."""
    import ray
    from ray import serve

    from seamount.cluster.replicas import fleet_application, router_application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process; on_progress tells the rest
    serve.start(proxy_location="Disabled")
    told = settings.model_copy(update={"redis_url": SecretStr(redis_url)})
    resources = {ROUTER_RESOURCE: 1.0} if ray.cluster_resources().get(ROUTER_RESOURCE) else {}  # type: ignore[no-untyped-call]
    serve.run(fleet_application(told), name=FLEET_APPLICATION, route_prefix=None)
    try:
        router = serve.run(
            router_application(told, resources),
            name=ROUTER_APPLICATION,
            route_prefix=None,
            external_scaler_enabled=settings.autoscaling.enabled,
        )
        return str(router.address.remote().result(timeout_s=10.0))
    except (RuntimeError, TimeoutError) as error:
        said = explanation(applications().get(ROUTER_APPLICATION)) or str(error)
        raise Unavailable(f"the router did not come up: {said}", reason="ROUTER_FAILED") from error


def _wait_for_pools(settings: Settings, on_progress: Callable[[list[PoolProgress]], None], timeout_s: float) -> None:
    wanted = least_pools(settings)
    deadline = time.monotonic() + timeout_s
    told: list[PoolProgress] = []
    failures = _Failures()
    while True:
        present = applications()
        progress = pool_progress(wanted, running_gangs(present), present)
        if progress != told:
            on_progress(progress)
            told = progress
        if all(pool.num_ready >= pool.num_wanted for pool in progress):
            return
        failures.check(running_gangs(present), progress)
        if time.monotonic() > deadline:
            state = "; ".join(f"{p.pool} {p.num_ready}/{p.num_wanted} {p.detail}" for p in progress)
            raise DeadlineExceeded(f"pools not up after {timeout_s:g} s: {state}", reason="START_TIMEOUT")
        time.sleep(_POLL_S)


def pool_progress(
    wanted: Iterable[WantedPool], gangs: Iterable[RunningGang], reported: Mapping[str, Any]
) -> list[PoolProgress]:
    """One entry a wanted pool, from what Serve reports; only gangs of the wanted version count as ready."""
    progress = []
    gangs = list(gangs)
    for pool in wanted:
        present = [gang for gang in gangs if gang.pool == pool.pool and gang.version == pool.version]
        num_ready = sum(gang.phase is Phase.READY for gang in present)
        waiting = [explanation(reported[gang.name]) for gang in present if gang.phase is not Phase.READY]
        detail = "; ".join(filter(None, waiting)) if num_ready < pool.num_gangs else ""
        progress.append(PoolProgress(pool=pool.pool, num_ready=num_ready, num_wanted=pool.num_gangs, detail=detail))
    return progress


class _Failures:
    """The fleet replaces a failed gang at its next pass; one that stays failed is a pool it has given up."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def check(self, gangs: Iterable[RunningGang], progress: Iterable[PoolProgress]) -> None:
        now = time.monotonic()
        failed = {gang.name: gang.pool for gang in gangs if gang.phase is Phase.FAILED}
        self._since = {name: self._since.get(name, now) for name in failed}
        given_up = {failed[name] for name, since in self._since.items() if now - since > _GIVEN_UP_AFTER_S}
        for pool in progress:
            if pool.pool in given_up:
                raise Unavailable(f"the {pool.pool} pool cannot come up: {pool.detail}", reason="POOL_FAILED")
