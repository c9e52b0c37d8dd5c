"""Nodes and pods as far as Seamount looks at them, and which of them are to go. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

LEAVING_TAINTS = (
    "node.kubernetes.io/unschedulable",  # kubectl cordon, kubectl drain
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disrupted",
    "karpenter.sh/disruption",  # before version 1
    "cloud.google.com/impending-node-termination",
    "aws-node-termination-handler/spot-itn",
    "aws-node-termination-handler/scheduled-maintenance",
    "aws-node-termination-handler/asg-lifecycle-termination",
    "node.cloudprovider.kubernetes.io/shutdown",
    "node.kubernetes.io/out-of-service",
)
"""Taints of nodes that are to be emptied, or will end by themselves in a moment."""
RAY_CLUSTER_LABEL = "ray.io/cluster"
RAY_GROUP_LABEL = "ray.io/group"
RAY_TYPE_LABEL = "ray.io/node-type"
GPU = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taint:
    key: str
    value: str
    effect: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """allocatable: amounts by resource, in cores, bytes or devices."""

    name: str
    is_ready: bool
    is_schedulable: bool
    is_deleted: bool
    taints: tuple[Taint, ...]
    labels: Mapping[str, str] = field(repr=False)
    allocatable: Mapping[str, Decimal] = field(repr=False)

    @property
    def leaving_cause(self) -> str:
        """Why its pods should go elsewhere; empty where they need not."""
        if self.is_deleted:
            return "it is being deleted"
        for taint in self.taints:
            if taint.key in LEAVING_TAINTS:
                return "it is cordoned" if taint.key == LEAVING_TAINTS[0] else f"it has the taint {taint.key}"
        return "" if self.is_schedulable else "it is cordoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """ends_at: when its grace period is over, None unless it terminates. group: KubeRay's; is_head: Ray's own state."""

    name: str
    namespace: str
    uid: str
    node: str
    ip: str
    phase: str
    is_ready: bool
    ends_at: datetime | None
    group: str
    is_head: bool
    ray_cluster: str

    @property
    def is_over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    def remaining_s(self, now: datetime) -> float:
        """Of its grace period; only while it terminates."""
        assert self.ends_at is not None
        return (self.ends_at - now).total_seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedDrain:
    """address: of the Ray node, which is the pod's."""

    address: str
    deadline_s: float
    cause: str


SIGTERM_MARGIN_S = 10.0
"""Before the end of a pod's grace period, its node is to be empty and closed."""


def wanted_drains(
    nodes: Iterable[NodeView], pods: Iterable[PodView], *, deadline_s: float, now: datetime
) -> list[WantedDrain]:
    """Which Ray nodes are to be emptied, by address: those whose pod terminates, or whose Kubernetes node is to go.

    deadline_s: what a drain has; a terminating pod's has no more than the rest of its grace period. Heads stay: nothing
    of the model is on them.
    """
    causes = {node.name: node.leaving_cause for node in nodes}
    wanted = []
    for pod in pods:
        if pod.is_head or pod.is_over or not pod.ip:
            continue
        if pod.ends_at is not None:
            remaining_s = max(1.0, pod.remaining_s(now) - SIGTERM_MARGIN_S)
            cause = f"pod {pod.name} terminates"
            wanted.append(WantedDrain(address=pod.ip, deadline_s=min(deadline_s, remaining_s), cause=cause))
        elif causes.get(pod.node):
            cause = f"node {pod.node}: {causes[pod.node]}"
            wanted.append(WantedDrain(address=pod.ip, deadline_s=deadline_s, cause=cause))
    return sorted(wanted, key=lambda drain: drain.address)


def node_view(node: Any) -> NodeView:
    """From the client library's ``V1Node``."""
    from kubernetes.utils.quantity import parse_quantity

    spec, status, metadata = node.spec, node.status, node.metadata
    conditions = (status.conditions if status is not None else None) or ()
    return NodeView(
        name=metadata.name,
        is_ready=any(one.type == "Ready" and one.status == "True" for one in conditions),
        is_schedulable=not (spec is not None and spec.unschedulable),
        is_deleted=metadata.deletion_timestamp is not None,
        taints=tuple(
            Taint(key=taint.key, value=taint.value or "", effect=taint.effect)
            for taint in ((spec.taints if spec is not None else None) or ())
        ),
        labels=metadata.labels or {},
        allocatable={
            name: parse_quantity(amount)  # type: ignore[no-untyped-call]
            for name, amount in ((status.allocatable if status is not None else None) or {}).items()
        },
    )


def pod_view(pod: Any) -> PodView:
    """From the client library's ``V1Pod``."""
    metadata, status = pod.metadata, pod.status
    labels = metadata.labels or {}
    ends_at = metadata.deletion_timestamp
    if ends_at is not None and ends_at.tzinfo is None:
        ends_at = ends_at.replace(tzinfo=UTC)
    conditions = (status.conditions if status is not None else None) or ()
    return PodView(
        name=metadata.name,
        namespace=metadata.namespace or "",
        uid=metadata.uid or "",
        node=(pod.spec.node_name if pod.spec is not None else None) or "",
        ip=(status.pod_ip if status is not None else None) or "",
        phase=(status.phase if status is not None else None) or "",
        is_ready=any(one.type == "Ready" and one.status == "True" for one in conditions),
        ends_at=ends_at,
        group=labels.get(RAY_GROUP_LABEL, ""),
        is_head=labels.get(RAY_TYPE_LABEL) == "head",
        ray_cluster=labels.get(RAY_CLUSTER_LABEL, ""),
    )
