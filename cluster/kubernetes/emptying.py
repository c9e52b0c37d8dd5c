"""``seamount k8s drain``: a node is cordoned and Seamount's pods there are evicted.

Each pod's preStop asks the fleet to empty its Ray node (``node_drain``), as every drain does, and the pod stands until
that is done or its grace period is over. Budgets of disruption are respected. Ray's head goes last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seamount.cluster.kubernetes.api import KubernetesApi, Selection
from seamount.cluster.kubernetes.objects import PodView, pod_view
from seamount.wire.errors import DeadlineExceeded, ResourceExhausted

SELECTOR = "app.kubernetes.io/part-of=seamount"
RELEASE_LABEL = "app.kubernetes.io/instance"
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Emptying:
    """Of one node. left: pods that still stand; held: those of them that a disruption budget keeps for now."""

    node: str
    num_pods: int
    left: tuple[str, ...]
    held: tuple[str, ...]


def drain_kubernetes_node(
    api: KubernetesApi,
    node: str,
    *,
    namespace: str,
    timeout_s: float,
    on_progress: Callable[[Emptying], None] = lambda progress: None,
) -> int:
    """Cordon the node, evict Seamount's pods of the namespace there, wait until they are gone; how many those were.

    Raises as ``errors.typed`` (``NotFound`` for an unknown node), ``DeadlineExceeded`` (NODE_NOT_EMPTY); the node stays
    cordoned.
    """
    api.cordon(node)
    deadline = time.monotonic() + timeout_s
    seen: set[str] = set()
    evicted: set[str] = set()
    while True:
        pods = pods_on(api, node, namespace)
        seen |= {pod.uid for pod in pods}
        held = _evict(api, [pod for pod in due(pods) if pod.uid not in evicted], evicted)
        left = tuple(pod.name for pod in pods)
        on_progress(Emptying(node=node, num_pods=len(seen), left=left, held=held))
        if not pods:
            return len(seen)
        if time.monotonic() > deadline:
            kept = f"; a disruption budget keeps {', '.join(held)}" if held else ""
            raise DeadlineExceeded(
                f"after {timeout_s:g} s there are still {', '.join(left)} on {node}{kept}; the node is cordoned: ask "
                f"again, or take it back with kubectl uncordon {node}",
                reason="NODE_NOT_EMPTY",
            )
        time.sleep(_POLL_S)


def pods_on(api: KubernetesApi, node: str, namespace: str) -> list[PodView]:
    """Seamount's, by name; those that are over left out."""
    listed = api.listing(Selection(kind="pods", namespace=namespace, labels=SELECTOR))
    pods = [pod_view(item) for item in listed.items]
    return sorted((pod for pod in pods if pod.node == node and not pod.is_over), key=lambda pod: pod.name)


def due(pods: Sequence[PodView]) -> list[PodView]:
    """Whose turn it is: all but Ray's heads, and those once they are alone."""
    workers = [pod for pod in pods if not pod.is_head]
    return [pod for pod in workers or pods if pod.ends_at is None]


def _evict(api: KubernetesApi, pods: Sequence[PodView], evicted: set[str]) -> tuple[str, ...]:
    held = []
    for pod in pods:
        try:
            api.evict(pod.name, pod.namespace)
            evicted.add(pod.uid)
        except ResourceExhausted:
            held.append(pod.name)
    return tuple(held)
