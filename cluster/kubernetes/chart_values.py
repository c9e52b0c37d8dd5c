"""What a release asks of a cluster, read from the chart's values: pods and their sizes, rights, secrets, volumes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import yaml

from seamount.cluster.kubernetes.errors import Access
from seamount.wire.errors import InvalidArgument

Values = Mapping[str, Any]
POOLS = ("decode", "prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Pods of one group. requests: of one pod, in cores, bytes or devices; num_pods at the start, max_pods at most."""

    group: str
    num_pods: int
    max_pods: int
    requests: Mapping[str, Decimal]
    node_selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, str]] = field(default=())


def read_values(chart: Path, files: Iterable[Path]) -> dict[str, Any]:
    """The chart's own values with these files over them, later ones winning, as Helm merges them.

    Raises ``InvalidArgument`` naming the file that cannot be read.
    """
    merged: dict[str, Any] = {}
    for path in (chart / "values.yaml", *files):
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            field_name = "chart" if path.parent == chart else "values"
            raise InvalidArgument(
                f"cannot read {path}: {type(error).__name__}; give --chart the chart's folder and --values its files",
                field=field_name,
            ) from None
        if not isinstance(read, dict):
            raise InvalidArgument(f"{path} must hold keys and values", field="values")
        merged = _merged(merged, read)
    return merged


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def demands(values: Values) -> list[Demand]:
    """The pods that the release starts with, and how many they may become; groups without any are left out."""
    routers = values["routers"]
    scales = values["autoscaling"]["enabled"]
    found = [
        _demand("head", values["head"], 1, 1),
        _demand("router", routers, routers["replicas"], routers["maxReplicas" if scales else "replicas"]),
    ]
    for name in POOLS:
        pool = values["pools"][name]
        if not pool["maxGangs"]:
            continue
        most = (pool["maxGangs"] if scales else pool["gangs"]) + pool["surgeGangs"]
        first = pool["gangs"] if scales else most  # nobody adds pods later
        found.append(_demand(name, pool, _num_pods(pool, first), _num_pods(pool, most)))
    return found


def _num_pods(pool: Values, num_gangs: int) -> int:
    return math.ceil(num_gangs * int(pool["expertParallel"]) / int(pool["ranksPerPod"]))


def _demand(group: str, values: Values, num_pods: int, max_pods: int) -> Demand:
    from kubernetes.utils.quantity import parse_quantity

    resources = values["resources"]
    asked = dict(resources.get("limits", {})) | dict(resources.get("requests", {}))
    parse = cast(Any, parse_quantity)
    return Demand(
        group=group,
        num_pods=num_pods,
        max_pods=max(num_pods, max_pods),
        requests={name: parse(str(amount)) for name, amount in asked.items()},
        node_selector=values.get("nodeSelector") or {},
        tolerations=values.get("tolerations") or (),
    )


def rights(values: Values, namespace: str) -> list[Access]:
    """What whoever installs the release must be allowed to make."""
    made = [
        ("ray.io", "rayservices"),
        ("", "configmaps"),
        ("", "secrets"),  # Helm keeps the release itself in one
        ("", "services"),
        ("policy", "poddisruptionbudgets"),
        ("rbac.authorization.k8s.io", "roles"),
        ("rbac.authorization.k8s.io", "rolebindings"),
    ]
    monitoring = values["metrics"]
    made += [("", "serviceaccounts")] * bool(values["serviceAccount"]["create"])
    made += [("networking.k8s.io", "networkpolicies")] * bool(values["networkPolicy"]["enabled"])
    if not values["redis"]["external"]["enabled"]:
        made += [("apps", "statefulsets")]
    made += [("monitoring.coreos.com", "servicemonitors")] * bool(monitoring["serviceMonitor"]["enabled"])
    made += [("monitoring.coreos.com", "prometheusrules")] * bool(monitoring["prometheusRule"]["enabled"])
    wide = [("scheduling.k8s.io", "priorityclasses")] * bool(values["priorityClasses"]["create"])
    if values["drain"]["watchNodes"]:
        wide += [("rbac.authorization.k8s.io", name) for name in ("clusterroles", "clusterrolebindings")]
    inside = [Access(verb="create", resource=name, group=group, namespace=namespace) for group, name in made]
    return inside + [Access(verb="create", resource=name, group=group) for group, name in wide]


def secrets(values: Values) -> list[str]:
    """Names of the secrets that the values point to."""
    named = (
        values["redis"]["external"]["existingSecret"] if values["redis"]["external"]["enabled"] else "",
        values["auth"]["apiKeys"]["existingSecret"],
        values["auth"]["workerToken"]["existingSecret"],
        values["tls"]["existingSecret"],
        *(entry["name"] for entry in values["image"]["pullSecrets"]),
    )
    return sorted({name for name in named if name})


def claim(values: Values) -> str:
    """Name of the claim that holds the weights; empty where they come otherwise."""
    weights = values["weights"]
    return str(weights["pvc"]["claimName"]) if weights["source"] == "pvc" else ""


def storage_class(values: Values) -> str | None:
    """Of the trial's Redis: a name, '' for the cluster's default; None where no volume is asked for."""
    redis = values["redis"]
    return None if redis["external"]["enabled"] else str(redis["trial"]["storageClassName"])
