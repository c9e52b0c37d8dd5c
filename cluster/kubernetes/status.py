"""``seamount k8s status``: the release's pods, their nodes, and what KubeRay says of its Ray service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seamount.cluster.kubernetes.api import KubernetesApi, Selection
from seamount.cluster.kubernetes.emptying import RELEASE_LABEL, SELECTOR
from seamount.cluster.kubernetes.objects import GPU, NodeView, PodView, node_view, pod_view
from seamount.wire.errors import NotFound, PermissionDenied


@dataclass(frozen=True, slots=True, kw_only=True)
class PodLine:
    name: str
    group: str
    state: str
    address: str
    node: str
    ray_cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLine:
    """leaving: why its pods should go; empty where they need not."""

    name: str
    is_ready: bool
    leaving: str
    num_gpus: int
    num_pods: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLine:
    """As KubeRay says it; pending: name of the Ray cluster that an upgrade makes, empty without one; missing: what that
    one lacks yet, as its application ``readiness`` says."""

    name: str
    state: str
    active: str
    pending: str
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesStatus:
    """unseen: what may not be looked at, with the right that lacks."""

    namespace: str
    services: list[ServiceLine]
    pods: list[PodLine]
    nodes: list[NodeLine]
    unseen: list[str]

    @property
    def complete(self) -> bool:
        """Whether there are pods, all are ready, and none of their nodes is to go."""
        is_calm = all(pod.state == "ready" for pod in self.pods)
        return bool(self.pods) and is_calm and not any(node.leaving for node in self.nodes)


def read_status(api: KubernetesApi, *, namespace: str, release: str | None) -> KubernetesStatus:
    """release: None = all of the namespace. Raises as ``errors.typed`` where pods may not be listed."""
    labels = SELECTOR if release is None else f"{SELECTOR},{RELEASE_LABEL}={release}"
    listed = api.listing(Selection(kind="pods", namespace=namespace, labels=labels)).items
    pods = sorted(map(pod_view, listed), key=lambda pod: (pod.ray_cluster, pod.group, pod.name))
    nodes: list[NodeView] = []
    services: list[dict[str, Any]] = []
    unseen = []
    try:
        nodes = [node_view(item) for item in api.listing(Selection(kind="nodes")).items]
    except PermissionDenied as error:
        unseen.append(error.message)
    try:
        services = api.ray_services(namespace)
    except (PermissionDenied, NotFound) as error:
        unseen.append(error.message)
    used = {pod.node for pod in pods}
    return KubernetesStatus(
        namespace=namespace,
        services=[_service(one) for one in services if release is None or one["metadata"]["name"] == release],
        pods=[_pod(pod) for pod in pods],
        nodes=[_node(node, pods) for node in nodes if node.name in used],
        unseen=unseen,
    )


def plain(status: KubernetesStatus) -> dict[str, Any]:
    """For JSON: the fields of ``KubernetesStatus``."""
    return asdict(status) | {"complete": status.complete}


def print_tables(status: KubernetesStatus, console: Console) -> None:
    services = Table(title=f"Ray services in {status.namespace}", title_justify="left")
    for column in ("name", "state", "active Ray cluster", "pending", "missing"):
        services.add_column(column, overflow="fold")
    for service in status.services:
        services.add_row(service.name, service.state, service.active, service.pending, escape(service.missing))
    pods = Table(title="Pods", title_justify="left")
    for column in ("pod", "group", "state", "address", "node"):
        pods.add_column(column)
    for pod in status.pods:
        colour = "green" if pod.state == "ready" else "yellow"
        pods.add_row(pod.name, pod.group, f"[{colour}]{pod.state}", pod.address, pod.node)
    nodes = Table(title="Their nodes", title_justify="left")
    for column in ("node", "state", "GPUs", "pods"):
        nodes.add_column(column)
    for node in status.nodes:
        state = f"[yellow]{node.leaving}" if node.leaving else "[green]ready" if node.is_ready else "[red]not ready"
        nodes.add_row(node.name, state, str(node.num_gpus), str(node.num_pods))
    for table in (services, pods, nodes):
        if table.row_count:
            console.print(table)
    if not status.pods:
        console.print(f"no pod of Seamount in namespace {status.namespace}")
    for message in status.unseen:
        console.print(f"not shown: {message}", markup=False)


def _pod(pod: PodView) -> PodLine:
    state = "ready" if pod.is_ready else pod.phase.lower()
    if pod.ends_at is not None:
        state = f"terminates within {max(0.0, pod.remaining_s(datetime.now(UTC))):.0f} s"
    return PodLine(
        name=pod.name,
        group="head" if pod.is_head else pod.group,
        state=state,
        address=pod.ip,
        node=pod.node,
        ray_cluster=pod.ray_cluster,
    )


def _node(node: NodeView, pods: Sequence[PodView]) -> NodeLine:
    return NodeLine(
        name=node.name,
        is_ready=node.is_ready,
        leaving=node.leaving_cause,
        num_gpus=int(node.allocatable.get(GPU, 0)),
        num_pods=sum(pod.node == node.name for pod in pods),
    )


def _service(service: dict[str, Any]) -> ServiceLine:
    status = service.get("status") or {}
    ready = [one for one in status.get("conditions") or () if one.get("type") == "Ready"]
    is_ready = bool(ready) and ready[0].get("status") == "True"
    pending = status.get("pendingServiceStatus") or {}
    return ServiceLine(
        name=service["metadata"]["name"],
        state="ready" if is_ready else str(ready[0].get("reason", "not ready")) if ready else "not ready",
        active=(status.get("activeServiceStatus") or {}).get("rayClusterName", ""),
        pending=pending.get("rayClusterName", ""),
        missing=_missing(pending),
    )


def _missing(pending: dict[str, Any]) -> str:
    """The last line that Serve tells of the application, which is its error."""
    application = (pending.get("applicationStatuses") or {}).get("readiness") or {}
    deployments = (application.get("serveDeploymentStatuses") or {}).values()
    lines = [line.strip() for one in deployments for line in one.get("message", "").splitlines() if line.strip()]
    return lines[-1] if lines and application.get("status") != "RUNNING" else ""
