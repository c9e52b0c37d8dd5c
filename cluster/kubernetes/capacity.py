"""Whether the pods of a release find room on the nodes, each as if it were empty. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from seamount.cluster.kubernetes.chart_values import Demand
from seamount.cluster.kubernetes.objects import GPU, NodeView, Taint


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """For one group: pods that fit at the start beside those of all groups, and at most; nodes that would take one
    if they were big enough; why: what lacks, empty where nothing does."""

    group: str
    num_wanted: int
    num_fitting: int
    max_wanted: int
    max_fitting: int
    num_nodes: int
    why: str


def room(demands: Sequence[Demand], nodes: Iterable[NodeView]) -> list[Room]:
    """First all pods at the start, those with the most devices and memory first, then those that may be added."""
    usable = [node for node in nodes if node.is_ready and not node.leaving_cause]
    left = {node.name: dict(node.allocatable) for node in usable}
    ordered = sorted(demands, key=_size, reverse=True)
    at_start = {d.group: _placed(d, d.num_pods, usable, left) for d in ordered}
    added = {d.group: _placed(d, d.max_pods - at_start[d.group], usable, left) for d in ordered}
    found = []
    for demand in demands:
        matching = [node for node in usable if takes(node, demand)]
        num_fitting = at_start[demand.group]
        found.append(
            Room(
                group=demand.group,
                num_wanted=demand.num_pods,
                num_fitting=num_fitting,
                max_wanted=demand.max_pods,
                max_fitting=num_fitting + added[demand.group],
                num_nodes=len(matching),
                why="" if num_fitting >= demand.num_pods else _why(demand, usable, matching),
            )
        )
    return found


def takes(node: NodeView, demand: Demand) -> bool:
    """Whether labels and taints allow the group's pods there."""
    has_labels = all(node.labels.get(key) == value for key, value in demand.node_selector.items())
    return has_labels and all(_is_tolerated(taint, demand.tolerations) for taint in node.taints)


def _is_tolerated(taint: Taint, tolerations: Iterable[Mapping[str, str]]) -> bool:
    if taint.effect == "PreferNoSchedule":
        return True
    for toleration in tolerations:
        has_key = toleration.get("key", taint.key) == taint.key
        has_effect = toleration.get("effect", taint.effect) == taint.effect
        has_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.value
        if has_key and has_effect and has_value:
            return True
    return False


def _size(demand: Demand) -> tuple[Decimal, Decimal]:
    return demand.requests.get(GPU, Decimal(0)), demand.requests.get("memory", Decimal(0))


def _placed(demand: Demand, count: int, nodes: Sequence[NodeView], left: dict[str, dict[str, Decimal]]) -> int:
    """Take room for up to ``count`` pods; how many found some."""
    num_placed = 0
    for node in nodes:
        if not takes(node, demand):
            continue
        has = left[node.name]
        while num_placed < count and all(has.get(name, 0) >= amount for name, amount in demand.requests.items()):
            for name, amount in demand.requests.items():
                has[name] -= amount
            num_placed += 1
    return num_placed


def _why(demand: Demand, usable: Sequence[NodeView], matching: Sequence[NodeView]) -> str:
    if not usable:
        return "no node is ready and schedulable"
    if not matching:
        labels = ", ".join(f"{key}={value}" for key, value in demand.node_selector.items())
        return f"no node has the labels {labels}" if labels else "no node's taints are tolerated"
    for name, amount in demand.requests.items():
        best = max(node.allocatable.get(name, Decimal(0)) for node in matching)
        if best < amount:
            most = f"the largest of {len(matching)} nodes has {_shown(name, best)}"
            return f"a pod asks for {_shown(name, amount)} {name}, {most}"
    return f"{len(matching)} nodes are too few"


def _shown(name: str, amount: Decimal) -> str:
    return f"{amount / (1 << 30):.0f} GiB" if name in ("memory", "ephemeral-storage") else f"{amount.normalize():f}"
