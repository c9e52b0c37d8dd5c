"""The fleet's watch of Kubernetes, as the settings ask for it."""

from __future__ import annotations

import logging

from seamount.cluster.environment import kubernetes_environment
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.kubernetes.api import KubernetesApi
from seamount.cluster.kubernetes.node_watch import NodeWatch
from seamount.cluster.node_closing import close_node
from seamount.cluster.node_drain import DrainRequests
from seamount.cluster.settings import Settings
from seamount.wire.errors import SeamountError

_LOG = logging.getLogger("seamount.kubernetes")
_CLOSING_MESSAGE = "its Kubernetes node or pod is to go"


def start_watch(
    settings: Settings, drains: DrainRequests, metrics: FleetMetrics, *, gcs_address: str | None = None
) -> NodeWatch | None:
    """Watch what ``draining.watch`` says, to be stopped by the caller; None for nothing.

    gcs_address: of the Ray cluster whose nodes it closes. Without a Kubernetes to talk to the fleet works all the same:
    that is logged and counted as a refused watch.
    """
    if settings.draining.watch == "none":
        return None
    try:
        where, api = kubernetes_environment(), KubernetesApi.connect()
    except SeamountError as error:
        _LOG.error("watch_refused", extra={"resource": "pods", "cause": error.reason, "remedy": error.message})
        metrics.watch_restarted("pods", "refused")
        return None
    watch = NodeWatch(
        api,
        drains,
        namespace=where.namespace,
        ray_cluster=where.ray_cluster,
        deadline_s=settings.draining.replacement_s + settings.draining.timeout_s,
        watches_nodes=settings.draining.watch == "nodes",
        on_restart=metrics.watch_restarted,
        close_node=lambda node_id: close_node(node_id, message=_CLOSING_MESSAGE, address=gcs_address),
    )
    watch.start()
    _LOG.info("watch_started", extra={"namespace": where.namespace, "ray_cluster": where.ray_cluster})
    return watch
