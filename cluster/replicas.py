"""The Serve replicas beside the ranks: the router, which serves clients, the fleet, which runs the gangs, and one that
says when they have come up."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import ray
import redis
from ray import serve
from ray.serve.deployment import Application

from seamount.cluster.fleet import FleetParts, Reconciler
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_plan import wanted_pools
from seamount.cluster.fleet_state import FleetState, connect
from seamount.cluster.kubernetes.node_watch import NodeWatch
from seamount.cluster.kubernetes.watching import start_watch
from seamount.cluster.leaving import LeavingRouters
from seamount.cluster.node_drain import DrainRequests
from seamount.cluster.pools import (
    HEALTH_PERIOD_S,
    HEALTH_TIMEOUT_S,
    IDLE_CPUS,
    bind_address,
    node_id,
    reachable_host,
)
from seamount.cluster.readiness import wait_until_up
from seamount.cluster.serve_gangs import ServeGangs
from seamount.cluster.serve_status import applications
from seamount.cluster.settings import Settings
from seamount.cluster.specs import router_spec
from seamount.router.server import RouterServer
from seamount.wire import logs
from seamount.wire.errors import Unavailable
from seamount.wire.ids import RouterId
from seamount.wire.metrics import MetricsEndpoint, new_registry

_LOG = logging.getLogger("seamount.fleet")
DRAIN_S = 10.0
"""What a leaving router has to end its streams."""
LEAVE_POLL_S = 0.5
_FLEET_STOP_S = 10.0
HEAD_RESOURCE = "node:__internal_head__"
"""Ray's own name for one unit of its head node."""
_ON_THE_HEAD: dict[str, object] = {"num_cpus": 0, "resources": {HEAD_RESOURCE: 0.001}}


class Router:
    """One router as a Serve replica; clients reach its own gRPC server, Serve only keeps it alive."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        logs.configure()
        assert settings.redis_url is not None
        redis_url = settings.redis_url.get_secret_value()
        spec = router_spec(
            settings,
            redis_url=redis_url,
            port=settings.router.port,
            metrics_host=bind_address(settings.metrics.host),
            advertised_host=reachable_host(settings.router.host),
            node_id=node_id(),
        )
        self._server = RouterServer(spec)
        self._address: str = await self._server.start()
        client = connect(redis_url, timeout_s=settings.redis.timeout_s)
        self._leaving = LeavingRouters(client, settings.cluster_name)
        self._has_left = self._may_return = False
        self._look_out = asyncio.create_task(self._leave_when_asked(spec.router_id), name="leave when asked")

    async def address(self) -> str:
        """``host:port`` that clients connect to."""
        return self._address

    async def check_health(self) -> None:
        """Raises when the router does not answer. One that has left as it was asked to is well until it may return:
        Serve would put another one into its place at once, on the node that is to be emptied."""
        is_well = not self._may_return if self._has_left else self._server.healthy()
        if not is_well:
            raise Unavailable("the router does not answer", reason="ROUTER_UNHEALTHY")

    async def __del__(self) -> None:
        if hasattr(self, "_look_out"):
            self._look_out.cancel()
        if hasattr(self, "_address"):
            await self._server.leave_and_stop(DRAIN_S)

    async def _leave_when_asked(self, router_id: RouterId) -> None:
        while True:
            await asyncio.sleep(LEAVE_POLL_S)
            with suppress(redis.RedisError):
                is_asked = await asyncio.to_thread(self._leaving.is_asked, router_id)
                self._may_return = self._has_left and not is_asked
                if is_asked and not self._has_left:
                    self._has_left = True
                    _LOG.info("router_leaving", extra={"router_id": router_id})
                    await self._server.leave_and_stop(DRAIN_S)


class Fleet:
    """The fleet as a Serve replica; when it dies, Serve starts another, which finds the gangs as they are."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        logs.configure()
        assert settings.redis_url is not None
        client = connect(settings.redis_url.get_secret_value(), timeout_s=settings.redis.timeout_s)
        registry = new_registry()
        metrics = FleetMetrics(registry)
        parts = FleetParts.of(settings, client)
        self._reconciler = Reconciler(wanted_pools(settings), _state(settings), ServeGangs(settings), metrics, parts)
        self._reconciler.start()
        host = bind_address(settings.metrics.host)
        self._endpoint = MetricsEndpoint(registry, host=host, port=settings.metrics.port)
        drains = DrainRequests(client, settings.cluster_name)
        gcs_address = ray.get_runtime_context().gcs_address
        self._watch = await asyncio.to_thread(start_watch, settings, drains, metrics, gcs_address=gcs_address)
        _LOG.info("fleet_ready", extra={"metrics": self._endpoint.address})

    async def check_health(self) -> None:
        if not self._reconciler.healthy():
            raise Unavailable("this fleet is superseded or stuck", reason="FLEET_UNHEALTHY")

    async def __del__(self) -> None:
        """Leaves the gangs as they are: a new version of the fleet takes them over."""
        if hasattr(self, "_reconciler"):
            await asyncio.to_thread(self._reconciler.stop, _FLEET_STOP_S)
        watch: NodeWatch | None = getattr(self, "_watch", None)
        if watch is not None:
            await asyncio.to_thread(watch.stop)
        if hasattr(self, "_endpoint"):
            self._endpoint.close()


class Readiness:
    """``__init__`` returns once this Ray cluster has come up; Serve tries it three times, each ``timeout_s`` long."""

    async def __init__(self, settings: Settings, timeout_s: float) -> None:  # type: ignore[misc]
        logs.configure()
        await wait_until_up(_state(settings), applications, timeout_s=timeout_s)


def router_application(settings: Settings, resources: dict[str, float]) -> Application:
    """One router; ``resources`` says which nodes may run it, empty = any."""
    options: dict[str, object] = {"num_cpus": IDLE_CPUS, "resources": resources}
    return _single(Router, options, drain_s=DRAIN_S).bind(settings)


def fleet_application(settings: Settings) -> Application:
    """The fleet, beside Ray's own state: on Kubernetes that pod alone has a token of the API server's."""
    return _single(Fleet, _ON_THE_HEAD, drain_s=_FLEET_STOP_S).bind(settings)


def readiness_application(settings: Settings, timeout_s: float) -> Application:
    """timeout_s: of one attempt."""
    return _single(Readiness, _ON_THE_HEAD, drain_s=0.0).bind(settings, timeout_s)


def _state(settings: Settings) -> FleetState:
    """Of this Ray cluster's fleet."""
    assert settings.redis_url is not None
    client = connect(settings.redis_url.get_secret_value(), timeout_s=settings.redis.timeout_s)
    session = ray.get_runtime_context().get_session_name()
    return FleetState(client, cluster_name=settings.cluster_name, ray_session=session)


def _single(
    replica: type[Router] | type[Fleet] | type[Readiness], options: dict[str, object], *, drain_s: float
) -> serve.Deployment:
    return serve.deployment(
        num_replicas=1,
        ray_actor_options=options,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=drain_s + 5.0,
    )(replica)
