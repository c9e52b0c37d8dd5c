"""The prefill and decode pools on Ray Serve: one replica is one rank, one application is one gang.

Serve places the ranks of a gang together, watches them, and restarts all of them when one dies. Requests never pass
through Serve: each rank has its own gRPC server and stands in the worker directory. torch is imported by rank
processes alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ray
import ray.util
from ray import serve
from ray.serve.config import GangPlacementStrategy, GangRuntimeFailurePolicy, GangSchedulingConfig
from ray.serve.deployment import Application

from seamount.cluster.fleet_plan import WantedPool
from seamount.cluster.sections import NODE_ADDRESS, PoolSettings
from seamount.cluster.settings import Settings
from seamount.cluster.specs import pool_settings, rank_spec
from seamount.wire import logs
from seamount.wire.errors import Unavailable
from seamount.wire.ids import GangId
from seamount.workers.spec import PoolName

DRAIN_S = 10.0
"""What a leaving rank has to end its streams."""
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 3.0
NUM_START_ATTEMPTS = 3
"""Starts of a gang's ranks that fail in a row before Serve gives the application up and the fleet judges."""

NODE_ID_LABEL = "ray.io/node-id"
"""Ray sets it on each node."""
IDLE_CPUS = 0.1
"""Ray's share of a core for a replica whose settings name none: enough to be counted, too little to keep others out."""


class Rank:
    """One rank as a Serve replica: ``__init__`` returns once it serves and stands in the directory."""

    async def __init__(self, settings: Settings, pool: PoolName) -> None:  # type: ignore[misc]
        from seamount.cluster.rank import RegisteredRank  # imports torch

        logs.configure()
        context = serve.get_replica_context()
        gang = context.gang_context
        assert gang is not None
        spec = rank_spec(
            settings,
            pool=pool,
            # Serve's own id is new for every start of the gang: nobody meets a rank of an earlier one by mistake.
            gang_id=GangId(f"{context.app_name}-{gang.gang_id}"),
            gang_rank=gang.rank,
            host=bind_address(settings.pools.host),
            metrics_host=bind_address(settings.metrics.host),
        )
        self._rank = RegisteredRank(spec, settings, node_id=node_id())
        await self._rank.start()

    async def check_health(self) -> None:
        """Raises when the engine's loop does not answer; Serve then replaces the gang."""
        if not self._rank.healthy():
            raise Unavailable("the engine of this rank does not answer", reason="RANK_UNHEALTHY")

    async def __del__(self) -> None:
        """Serve awaits this when the gang is deleted or its node drained; not when the process is killed."""
        if hasattr(self, "_rank"):
            await self._rank.leave_and_stop(DRAIN_S)


def gang_application(settings: Settings, wanted: WantedPool, avoided_nodes: Collection[str] = ()) -> Application:
    """The Serve application of one gang; its one deployment is named by the version (``fleet_plan.running_gangs``).

    avoided_nodes: Ray ids of nodes that no rank may be on.
    """
    options = actor_options(pool_settings(settings, wanted.pool))
    deployment = serve.deployment(
        name=wanted.version,
        num_replicas=wanted.expert_parallel,
        gang_scheduling_config=GangSchedulingConfig(
            gang_size=wanted.expert_parallel,
            gang_placement_strategy=GangPlacementStrategy.PACK,
            runtime_failure_policy=GangRuntimeFailurePolicy.RESTART_GANG,
        ),
        ray_actor_options=options,
        **_placement(options, avoided_nodes),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,  # our streams are invisible to Serve: it has nothing to wait for
        graceful_shutdown_timeout_s=DRAIN_S + 5.0,
        max_constructor_retry_count=NUM_START_ATTEMPTS,
    )(Rank)
    return deployment.bind(settings, wanted.pool)


def actor_options(pool: PoolSettings) -> dict[str, Any]:
    """Ray's options for a replica with the pool's resources."""
    resources = dict(pool.resources)
    options: dict[str, Any] = {"num_cpus": resources.pop("CPU", IDLE_CPUS)}
    if "GPU" in resources:
        options["num_gpus"] = resources.pop("GPU")
    if resources:
        options["resources"] = resources
    return options


def _placement(options: dict[str, Any], avoided_nodes: Collection[str]) -> dict[str, Any]:
    """Bundles like those that Serve makes by itself, and a selector, which Serve takes with explicit ones only."""
    if not avoided_nodes:
        return {}
    bundle = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0.0), **options.get("resources", {})}
    return {
        "placement_group_bundles": [{name: amount for name, amount in bundle.items() if amount}],
        "placement_group_bundle_label_selector": [{NODE_ID_LABEL: f"!in({','.join(sorted(avoided_nodes))})"}],
    }


def bind_address(host: str) -> str:
    """The address to bind to on this node for ``pools.host`` or ``metrics.host``."""
    return host if host != NODE_ADDRESS else node_address()


def reachable_host(host: str) -> str:
    """Where other nodes reach what listens on ``host`` here: "all addresses" is none that one could call."""
    return node_address() if host in ("0.0.0.0", "::") else host


def node_id() -> str:
    """Ray's name of this node."""
    return str(ray.get_runtime_context().get_node_id())


def node_address() -> str:
    """This node's address in the Ray cluster."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
