"""The fleet's hands: Serve's applications, its routers' number, Ray's nodes.

``serve.status()`` names no nodes, and the number of replicas of an application with ``external_scaler_enabled`` is set
over Serve's dashboard or at its controller: both are read and done at the controller itself, as the dashboard does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.api import RunTarget
from ray.serve.context import _get_global_client

from seamount.cluster.fleet_nodes import Node
from seamount.cluster.fleet_plan import RunningGang, WantedPool, running_gangs
from seamount.cluster.pools import gang_application
from seamount.cluster.settings import Settings

ROUTER = DeploymentID(name="Router", app_name="router")
_ANSWER_S = 10.0


class ServeGangs:
    """Calls block; none waits for a gang to come up or to go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._num_routers: int | None = None  # when ``running`` looked last

    def running(self) -> list[RunningGang]:
        """With the nodes that their ranks are on, or are starting on."""
        details: dict[str, Any] = ray.get(_controller().get_serve_instance_details.remote(), timeout=_ANSWER_S)
        self._num_routers = _num_routers(details["applications"])
        return running_gangs(serve.status().applications, nodes=_nodes_of(details["applications"]))

    def start(self, name: str, wanted: WantedPool, avoided_nodes: Collection[str]) -> None:
        application = gang_application(self._settings, wanted, avoided_nodes)
        target = RunTarget(target=application, name=name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def delete(self, name: str) -> None:
        serve.delete(name, _blocking=False)

    def nodes(self) -> list[Node]:
        return [
            Node(
                node_id=node["NodeID"],
                names=frozenset({node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"]}),
            )
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]

    def num_routers(self) -> int | None:
        return self._num_routers

    def scale_routers(self, number: int) -> None:
        ray.get(_controller().update_deployment_replicas.remote(ROUTER, number), timeout=_ANSWER_S)


def _controller() -> Any:
    client = _get_global_client()
    assert client is not None  # raised where Serve is not there
    return client._controller


def _num_routers(applications: dict[str, Any]) -> int | None:
    """Replicas that Serve aims at; None without a router."""
    router = applications.get(ROUTER.app_name, {"deployments": {}})["deployments"].get(ROUTER.name)
    return None if router is None else int(router["target_num_replicas"])


def _nodes_of(applications: dict[str, Any]) -> dict[str, frozenset[str]]:
    """By application: Ray ids of the nodes that it has replicas on."""
    return {
        name: frozenset(
            replica["node_id"]
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
            if replica["node_id"]
        )
        for name, application in applications.items()
    }
