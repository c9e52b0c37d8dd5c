"""``seamount k8s drain`` and ``status``: cordon, evictions, budgets, pods that take their time, what is seen of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest

from seamount.cluster.kubernetes.api import KubernetesApi
from seamount.cluster.kubernetes.emptying import Emptying, drain_kubernetes_node
from seamount.wire.errors import DeadlineExceeded, NotFound, PermissionDenied

from .api_server import ApiServer, Fault, node, pod


@pytest.fixture
def cluster(server: ApiServer) -> ApiServer:
    """Two nodes with Seamount's pods; a pod ends half a second after it was asked to."""

    def kubelet(name: str, namespace: str) -> None:
        threading.Timer(0.5, server.remove, ["pods", name, namespace]).start()

    server.kubelet = kubelet
    server.put("nodes", node("n1", gpus=8))
    server.put("nodes", node("n2"))
    server.put("pods", pod("decode-a", "n1", "10.0.0.1"))
    server.put("pods", pod("decode-b", "n1", "10.0.0.2"))
    server.put("pods", pod("head", "n1", "10.0.0.9", head=True))
    server.put("pods", pod("router-a", "n2", "10.0.0.3", group="router"))
    stranger = pod("stranger", "n1", "10.0.0.7")
    stranger["metadata"]["labels"] = {}
    server.put("pods", stranger)
    return server


def left(server: ApiServer) -> set[str]:
    return {name for _, name in server.objects["pods"]}


def drain(api: KubernetesApi, node: str, *, timeout_s: float = 20.0) -> tuple[int, list[Emptying]]:
    seen: list[Emptying] = []
    count = drain_kubernetes_node(api, node, namespace="models", timeout_s=timeout_s, on_progress=seen.append)
    return count, seen


def test_the_node_is_cordoned_its_pods_are_evicted_and_the_head_goes_last(
    cluster: ApiServer, api: KubernetesApi
) -> None:
    count, seen = drain(api, "n1")
    assert count == 3
    assert cluster.objects["nodes"]["", "n1"]["spec"]["unschedulable"] is True
    assert left(cluster) == {"router-a", "stranger"}
    assert seen[0].left == ("decode-a", "decode-b", "head")
    assert seen[-1].left == ()
    evictions = [request for request in cluster.requests if request.endswith("/eviction")]
    assert [request.split("/")[-2] for request in evictions] == ["decode-a", "decode-b", "head"]


def test_a_disruption_budget_is_waited_for(cluster: ApiServer, api: KubernetesApi) -> None:
    cluster.faults.append(Fault("POST .*/pods/decode-b/eviction", 429, times=3, reason="TooManyRequests"))
    count, seen = drain(api, "n1")
    assert count == 3
    assert [one.held for one in seen].count(("decode-b",)) == 3


def test_pods_that_never_end_are_named_at_the_deadline(cluster: ApiServer, api: KubernetesApi) -> None:
    cluster.kubelet = None
    cluster.faults.append(Fault("POST .*/pods/decode-b/eviction", 429, times=100))
    with pytest.raises(DeadlineExceeded) as caught:
        drain(api, "n1", timeout_s=0.6)
    for word in ("decode-a", "decode-b", "budget", "uncordon n1"):
        assert word in caught.value.message
    assert cluster.count("decode-a/eviction") == 1


def test_a_pod_that_terminates_already_is_waited_for_and_not_asked_again(
    cluster: ApiServer, api: KubernetesApi
) -> None:
    cluster.terminate("router-a", "models")
    assert drain(api, "n2")[0] == 1
    assert cluster.count("eviction") == 0


def test_conflicts_pods_that_go_meanwhile_and_empty_nodes_are_no_errors(cluster: ApiServer, api: KubernetesApi) -> None:
    cluster.faults.append(Fault("PATCH", 409, times=2))
    cluster.faults.append(Fault("POST .*/pods/decode-a/eviction", 404, times=1))
    threading.Timer(0.5, cluster.remove, ["pods", "decode-a", "models"]).start()
    assert drain(api, "n1")[0] == 3
    assert drain(api, "n1")[0] == 0


def test_unknown_nodes_and_missing_rights(cluster: ApiServer, api: KubernetesApi) -> None:
    with pytest.raises(NotFound, match="n9"):
        drain(api, "n9")
    cluster.forbidden.add("create pods/eviction")
    with pytest.raises(PermissionDenied, match=r'resources: \["pods/eviction"\], verbs: \["create"\]'):
        drain(api, "n1")
    cluster.forbidden.add("patch nodes")
    with pytest.raises(PermissionDenied, match=r'resources: \["nodes"\], verbs: \["patch"\]'):
        drain(api, "n1")


# ---- the commands


def test_drain_tells_progress_and_its_end(cluster: ApiServer, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, error = run("drain", "n1", "--json")
    assert (code, json.loads(out)) == (0, {"node": "n1", "cordoned": True, "num_pods": 3})
    assert "n1 0/3" in error
    assert "n1 3/3" in error
    assert run("drain", "n9")[0] == 1


def test_status_shows_services_pods_and_nodes_that_are_to_go(
    cluster: ApiServer, run: Callable[..., tuple[int, str, str]]
) -> None:
    cluster.ray_services = [
        {
            "metadata": {"name": "seamount"},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}],
                "activeServiceStatus": {"rayClusterName": "seamount-abc"},
                "pendingServiceStatus": {
                    "rayClusterName": "seamount-def",
                    "applicationStatuses": {
                        "fleet": {"status": "RUNNING", "serveDeploymentStatuses": {"Fleet": {"message": "fine"}}},
                        "readiness": {
                            "status": "DEPLOYING",
                            "serveDeploymentStatuses": {
                                "Readiness": {"message": "A replica failed.\n  not all gangs serve: decode 1 of 4\n"}
                            },
                        },
                    },
                },
            },
        }
    ]
    code, out, _ = run("status", "--json")
    seen = json.loads(out)
    assert (code, seen["complete"], len(seen["pods"])) == (0, True, 4)
    (service,) = seen["services"]
    assert (service["name"], service["state"]) == ("seamount", "ready")
    assert (service["active"], service["pending"]) == ("seamount-abc", "seamount-def")
    assert service["missing"] == "not all gangs serve: decode 1 of 4"
    cluster.ray_services[0]["status"].pop("pendingServiceStatus")
    (settled,) = json.loads(run("status", "--json")[1])["services"]
    assert (settled["pending"], settled["missing"]) == ("", "")
    assert {one["name"]: (one["num_gpus"], one["num_pods"]) for one in seen["nodes"]} == {"n1": (8, 3), "n2": (0, 1)}
    cluster.put("nodes", node("n1", taints=("ToBeDeletedByClusterAutoscaler",)))
    cluster.terminate("router-a", "models", grace_s=100.0)
    code, out, _ = run("status")
    assert code == 1
    for text in ("ToBeDeletedByClusterAutoscaler", "terminates", "decode-a", "seamount-abc"):
        assert text in out


def test_status_says_what_it_may_not_see_and_that_nothing_is_there(
    cluster: ApiServer, run: Callable[..., tuple[int, str, str]]
) -> None:
    cluster.forbidden |= {"list nodes", "list rayservices"}
    code, out, _ = run("status")
    assert code == 0
    assert "not shown: Kubernetes forbids to list nodes" in out
    code, out, _ = run("status", "-n", "empty")
    assert (code, "no pod of Seamount in namespace empty" in out) == (1, True)
    assert json.loads(run("status", "--release", "another", "--json")[1])["pods"] == []
    cluster.forbidden.add("list pods")
    code, _, error = run("status")
    assert (code, 'resources: ["pods"], verbs: ["list"]' in error) == (1, True)
