"""What the environment holds, secrets and addresses; ``settings`` and this alone read it.

SEAMOUNT_CONFIG      path of serving.yaml, where none is given on the command line
SEAMOUNT_REDIS_URL   an existing Redis >= 7 or Valkey; without it the system starts its own
SEAMOUNT_ADDRESS     client side: host:port of a router
SEAMOUNT_API_KEY     client side: the key sent with each call
SEAMOUNT_POD_NAMESPACE, RAY_CLUSTER_NAME    in a pod: its namespace, and KubeRay's name of its Ray cluster
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import SecretStr

from seamount.cluster.section import Section, refused

CONFIG_VARIABLE = "SEAMOUNT_CONFIG"
REDIS_VARIABLE = "SEAMOUNT_REDIS_URL"
ADDRESS_VARIABLE = "SEAMOUNT_ADDRESS"
API_KEY_VARIABLE = "SEAMOUNT_API_KEY"
NAMESPACE_VARIABLE = "SEAMOUNT_POD_NAMESPACE"
RAY_CLUSTER_VARIABLE = "RAY_CLUSTER_NAME"


class KubernetesEnvironment(Section):
    """Where a pod runs. ray_cluster: KubeRay's name of its Ray cluster."""

    namespace: str
    ray_cluster: str


class ClientEnvironment(Section):
    """What a client takes from the environment."""

    address: str | None = None
    api_key: SecretStr | None = None


def client_environment(environ: Mapping[str, str] | None = None) -> ClientEnvironment:
    """``SEAMOUNT_ADDRESS`` and ``SEAMOUNT_API_KEY``; empty counts as absent."""
    environ = os.environ if environ is None else environ
    key = environ.get(API_KEY_VARIABLE)
    return ClientEnvironment(address=environ.get(ADDRESS_VARIABLE) or None, api_key=SecretStr(key) if key else None)


def kubernetes_environment(environ: Mapping[str, str] | None = None) -> KubernetesEnvironment:
    """Raises ``InvalidArgument`` outside of a pod that the chart made."""
    environ = os.environ if environ is None else environ
    for variable in (NAMESPACE_VARIABLE, RAY_CLUSTER_VARIABLE):
        if not environ.get(variable):
            raise refused(
                "draining.watch",
                f"draining.watch needs {variable}, which the chart and KubeRay set in their pods: set it, or watch "
                "none",
            )
    return KubernetesEnvironment(namespace=environ[NAMESPACE_VARIABLE], ray_cluster=environ[RAY_CLUSTER_VARIABLE])
