"""Preflight, status and drain, against an API server over HTTP and through the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from seamount.cluster.kubernetes.api import KubernetesApi
from seamount.cluster.kubernetes.capacity import room, takes
from seamount.cluster.kubernetes.chart_values import Demand, claim, demands, read_values, rights, secrets, storage_class
from seamount.cluster.kubernetes.objects import NodeView, Taint
from seamount.wire.errors import InvalidArgument

from .api_server import ApiServer, node

CHART = Path(__file__).resolve().parents[3] / "helm" / "seamount"
H200 = "NVIDIA-H200"
GIB = 1 << 30


def big_node(
    name: str, *, gpus: int = 8, product: str = H200, taints: tuple[str, ...] = ("nvidia.com/gpu",)
) -> dict[str, Any]:
    """A node that takes a pod of the profile h200x8."""
    made = node(name, gpus=gpus, taints=taints)
    made["metadata"]["labels"] = {"nvidia.com/gpu.product": product}
    made["status"]["allocatable"] |= {"cpu": "128", "memory": "1500Gi", "ephemeral-storage": "2000Gi"}
    return made


@pytest.fixture
def ready(server: ApiServer) -> ApiServer:
    """A cluster that takes the profile h200x8."""
    server.groups = {"ray.io/v1": ["rayservices", "rayclusters"]}
    server.put("nodes", node("cpu-1"))
    server.put("nodes", node("cpu-2"))
    for number in range(5):
        server.put("nodes", big_node(f"gpu-{number}"))
    server.named = {
        "secrets": {("models", name) for name in ("seamount-redis", "seamount-api-keys")},
        "persistentvolumeclaims": {("models", "deepseek-v32")},
    }
    return server


def preflight(run: Callable[..., tuple[int, str, str]], *files: Path) -> tuple[int, dict[str, dict[str, str]]]:
    values = [argument for file in files for argument in ("--values", str(file))]
    code, out, _ = run("preflight", "--chart", str(CHART), *values, "--json")
    answer = json.loads(out)
    assert answer["passed"] is (code == 0)
    return code, {check["name"]: check for check in answer["checks"]}


def profile(name: str) -> Path:
    return CHART / "profiles" / f"{name}.yaml"


def outcomes(checks: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: check["outcome"] for name, check in checks.items() if check["outcome"] != "ok"}


def test_a_cluster_that_takes_the_profile_passes(ready: ApiServer, run: Callable[..., tuple[int, str, str]]) -> None:
    code, checks = preflight(run, profile("h200x8"))
    assert (code, outcomes(checks)) == (0, {})
    assert "5 matching nodes" in checks["room for decode"]["detail"]
    assert set(checks) >= {
        "version",
        "rayservices.ray.io",
        "secret seamount-redis",
        "volume claim deepseek-v32",
        "rights",
    }
    code, out, _ = run("preflight", "--chart", str(CHART), "--values", str(profile("h200x8")))
    assert code == 0
    assert "room for decode" in out


def test_what_lacks_is_named_with_its_remedy(ready: ApiServer, run: Callable[..., tuple[int, str, str]]) -> None:
    ready.minor, ready.groups = "28", {}
    for number in range(5):
        ready.put("nodes", big_node(f"gpu-{number}", product="NVIDIA-A10"))
    ready.named["secrets"].clear()
    ready.forbidden.add("create priorityclasses")
    code, checks = preflight(run, profile("h200x8"))
    assert code == 1
    assert outcomes(checks) == dict.fromkeys(
        (
            "version",
            "rayservices.ray.io",
            "rayclusters.ray.io",
            "room for decode",
            "secret seamount-redis",
            "secret seamount-api-keys",
            "rights",
        ),
        "failed",
    )
    assert "no node has the labels nvidia.com/gpu.product=NVIDIA-H200" in checks["room for decode"]["detail"]
    assert "KubeRay" in checks["rayservices.ray.io"]["remedy"]
    assert "create priorityclasses.scheduling.k8s.io" in checks["rights"]["detail"]
    assert 'resources: ["priorityclasses"], verbs: ["create"]} in a ClusterRole' in checks["rights"]["remedy"]


def test_what_may_not_be_looked_at_is_a_warning_that_names_the_right(
    ready: ApiServer, run: Callable[..., tuple[int, str, str]]
) -> None:
    ready.forbidden |= {"list nodes", "get secrets"}
    code, checks = preflight(run, profile("h200x8"))
    assert code == 0
    assert outcomes(checks) == dict.fromkeys(
        ("capacity", "secret seamount-redis", "secret seamount-api-keys"), "warning"
    )
    assert 'resources: ["nodes"], verbs: ["list"]' in checks["capacity"]["remedy"]


def test_a_trial_wants_a_storage_class(
    server: ApiServer, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    server.groups = {"ray.io/v1": ["rayservices", "rayclusters"]}
    for number in range(4):
        server.put("nodes", node(f"n{number}"))
    server.storage_classes = [{"metadata": {"name": "slow"}, "provisioner": "p"}]
    code, checks = preflight(run, profile("trial-cpu"))
    assert (code, outcomes(checks)) == (1, {"storage class": "failed"})
    assert "slow" in checks["storage class"]["remedy"]
    server.storage_classes[0]["metadata"]["annotations"] = {"storageclass.kubernetes.io/is-default-class": "true"}
    assert preflight(run, profile("trial-cpu"))[0] == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text("redis: {trial: {storageClassName: fast}}\nmetrics: {serviceMonitor: {enabled: true}}\n")
    code, checks = preflight(run, profile("trial-cpu"), mine)
    assert outcomes(checks) == {"storage class": "failed", "servicemonitors.monitoring.coreos.com": "failed"}


def test_a_values_file_that_cannot_be_read_is_an_error_of_usage(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run("preflight", "--chart", str(CHART), "--values", "/nowhere.yaml")
    assert (code, "/nowhere.yaml" in error) == (2, True)


# ---- capacity


def seen(name: str, *, gpus: int = 0, cpu: int = 16, taints: tuple[Taint, ...] = (), **changes: Any) -> NodeView:
    allocatable = {"cpu": Decimal(cpu), "memory": Decimal(64 * GIB), "nvidia.com/gpu": Decimal(gpus)}
    fields = {"is_ready": True, "is_schedulable": True, "is_deleted": False, "labels": {}} | changes
    return NodeView(name=name, taints=taints, allocatable=allocatable, **fields)


def demand(group: str, count: int, *, most: int | None = None, **requests: int) -> Demand:
    asked = {name.replace("gpu", "nvidia.com/gpu"): Decimal(amount) for name, amount in requests.items()}
    return Demand(group=group, num_pods=count, max_pods=most or count, requests=asked, node_selector={})


def test_groups_share_the_nodes_and_the_big_ones_come_first() -> None:
    nodes = [seen("a", gpus=8), seen("b")]
    wanted = [demand("router", 3, cpu=8), demand("decode", 1, most=2, cpu=16, gpu=8)]
    router, decode = room(wanted, nodes)
    assert (decode.num_fitting, decode.max_fitting, decode.max_wanted) == (1, 1, 2)
    assert (router.num_fitting, router.num_wanted) == (2, 3)  # the cores of the GPU node are taken
    assert router.why == "2 nodes are too few"


def test_one_pod_too_big_for_any_node_says_what_it_asks_for() -> None:
    (decode,) = room([demand("decode", 1, cpu=32, gpu=8)], [seen("a", gpus=8), seen("b", gpus=4)])
    assert decode.why == "a pod asks for 32 cpu, the largest of 2 nodes has 16"
    (decode,) = room([demand("decode", 1, memory=100 * GIB)], [seen("a")])
    assert decode.why == "a pod asks for 100 GiB memory, the largest of 1 nodes has 64 GiB"


def test_nodes_that_are_away_or_to_go_do_not_count() -> None:
    nodes = [seen("a", is_ready=False), seen("b", is_schedulable=False), seen("c", is_deleted=True)]
    (router,) = room([demand("router", 1, cpu=1)], nodes)
    assert (router.num_fitting, router.num_nodes, router.why) == (0, 0, "no node is ready and schedulable")


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"key": "gpu", "operator": "Exists"}, True),
        ({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "gpu", "value": "yes", "effect": "NoSchedule"}, True),
        ({"key": "gpu", "value": "no"}, False),
        ({"operator": "Exists"}, True),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_taints_and_tolerations(toleration: dict[str, str], tolerated: bool) -> None:
    tainted = seen("a", taints=(Taint(key="gpu", value="yes", effect="NoSchedule"),))
    wanted = Demand(group="g", num_pods=1, max_pods=1, requests={}, node_selector={}, tolerations=(toleration,))
    assert takes(tainted, wanted) is tolerated
    soft = seen("a", taints=(Taint(key="gpu", value="yes", effect="PreferNoSchedule"),))
    assert takes(soft, demand("g", 1))


# ---- values


@pytest.mark.parametrize(
    "path", sorted([*CHART.glob("ci/*.yaml"), *CHART.glob("profiles/*.yaml")]), ids=lambda path: path.stem
)
def test_every_profile_and_every_tested_form_says_what_it_asks_for(path: Path) -> None:
    values = read_values(CHART, [path])
    assert all(access.verb == "create" for access in rights(values, "models"))
    assert all(secrets(values))
    found = {one.group: one for one in demands(values)}
    assert {"head", "router", "decode"} <= set(found)
    for one in found.values():
        assert 0 <= one.num_pods <= one.max_pods
        assert one.requests["cpu"] > 0
        assert one.requests["memory"] > GIB
    decode = values["pools"]["decode"]
    ranks = decode["gangs"] * decode["expertParallel"]
    assert found["decode"].num_pods * decode["ranksPerPod"] >= ranks
    assert found["decode"].requests.get("nvidia.com/gpu", 0) == (decode["ranksPerPod"] if decode["gpu"] else 0)


def test_values_merge_as_helm_merges_them(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"a": {"b": 1, "c": [1, 2]}, "d": 3, "e": {"f": 1}}))
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"a": {"c": [9]}, "d": None, "e": 5}))
    assert read_values(tmp_path, [over]) == {"a": {"b": 1, "c": [9]}, "e": 5}
    over.write_text("- a list")
    with pytest.raises(InvalidArgument):
        read_values(tmp_path, [over])


def test_rights_secrets_and_volumes_follow_the_values() -> None:
    trial, real = read_values(CHART, [profile("trial-cpu")]), read_values(CHART, [profile("h200x8")])
    assert "statefulsets" in {one.resource for one in rights(trial, "models")}
    assert "statefulsets" not in {one.resource for one in rights(real, "models")}
    assert (secrets(trial), claim(trial), storage_class(trial)) == ([], "", "")
    assert (claim(real), storage_class(real)) == ("deepseek-v32", None)
    assert "clusterroles" not in {one.resource for one in rights(real, "models")}
    watching = real | {"drain": {**real["drain"], "watchNodes": True}}
    wide = [one.resource for one in rights(watching, "models") if one.namespace is None]
    assert wide == ["priorityclasses", "clusterroles", "clusterrolebindings"]


def test_the_namespace_is_the_contexts(kubeconfig: Path) -> None:
    assert KubernetesApi.connect(kubeconfig=kubeconfig).namespace == "models"
