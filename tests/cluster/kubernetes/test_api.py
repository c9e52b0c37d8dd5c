"""What the API's answers become, over HTTP and through the real client library."""

from __future__ import annotations

from pathlib import Path

import pytest

from seamount.cluster.kubernetes.api import MAX_ATTEMPTS, KubernetesApi, Selection
from seamount.cluster.kubernetes.errors import CONFLICT, Access
from seamount.cluster.kubernetes.objects import node_view, pod_view
from seamount.wire.errors import (
    Aborted,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SeamountError,
    Unauthenticated,
    Unavailable,
)

from .api_server import ApiServer, Fault, node, pod

NODES = Selection(kind="nodes")


def test_nodes_and_pods_are_listed_by_namespace_and_label(server: ApiServer, api: KubernetesApi) -> None:
    server.put("nodes", node("n1", gpus=8, pool="decode"))
    server.put("pods", pod("p1", "n1", "10.0.0.1"))
    server.put("pods", pod("p2", "n1", "10.0.0.2", cluster="another"))
    listing = api.listing(NODES)
    (seen,) = map(node_view, listing.items)
    assert (seen.name, seen.is_ready, seen.is_schedulable, seen.leaving_cause) == ("n1", True, True, "")
    assert seen.allocatable["nvidia.com/gpu"] == 8
    assert seen.allocatable["memory"] == 128 << 30
    assert listing.version == str(server.version)
    pods = api.listing(Selection(kind="pods", namespace="models", labels="ray.io/cluster=another")).items
    assert [pod_view(one).name for one in pods] == ["p2"]
    assert api.listing(Selection(kind="pods", namespace="other")).items == []


def test_forbidden_names_the_verb_the_resource_and_the_rule_to_add(server: ApiServer, api: KubernetesApi) -> None:
    server.forbidden.add("list pods")
    with pytest.raises(PermissionDenied) as caught:
        api.listing(Selection(kind="pods", namespace="models"))
    assert caught.value.metadata == {"verb": "list", "resource": "pods", "namespace": "models"}
    assert (
        '{apiGroups: [""], resources: ["pods"], verbs: ["list"]} in a Role in namespace models' in caught.value.message
    )
    assert server.count("GET .*/pods") == 1  # a refusal is not repeated
    server.forbidden.add("patch nodes")
    server.put("nodes", node("n1"))
    with pytest.raises(PermissionDenied, match=r'resources: \["nodes"\], verbs: \["patch"\]\} in a ClusterRole'):
        api.cordon("n1")


def test_what_is_not_there(api: KubernetesApi) -> None:
    with pytest.raises(NotFound, match="get nodes n9"):
        api.node("n9")
    api.evict("gone", "models")


def test_a_conflict_is_retried_and_a_lasting_one_told(server: ApiServer, api: KubernetesApi) -> None:
    server.put("nodes", node("n1"))
    server.faults.append(Fault("PATCH /api/v1/nodes/n1", 409, times=2))
    api.cordon("n1")
    assert server.objects["nodes"]["", "n1"]["spec"]["unschedulable"] is True
    assert server.count("PATCH") == 3
    server.faults.append(Fault("PATCH /api/v1/nodes/n1", 409, times=100))
    with pytest.raises(Aborted) as caught:
        api.cordon("n1", unschedulable=False)
    assert caught.value.reason == CONFLICT
    assert server.count("PATCH") == 3 + MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("status", "expected", "num_requests"),
    [(401, Unauthenticated, 1), (429, ResourceExhausted, 1), (500, Unavailable, MAX_ATTEMPTS)],
)
def test_other_answers(
    server: ApiServer, api: KubernetesApi, status: int, expected: type[SeamountError], num_requests: int
) -> None:
    server.faults.append(Fault("GET /api/v1/nodes", status, times=100))
    with pytest.raises(expected):
        api.listing(NODES)
    assert server.count("GET /api/v1/nodes") == num_requests


def test_a_server_that_is_away_for_a_moment_is_asked_again(server: ApiServer, api: KubernetesApi) -> None:
    server.faults.append(Fault("GET /api/v1/nodes", 503, times=2))
    assert api.listing(NODES).items == []


def test_nobody_there_is_unavailable(server: ApiServer, api: KubernetesApi) -> None:
    server.stop()
    with pytest.raises(Unavailable, match="list nodes"):
        api.listing(NODES)


def test_without_a_cluster_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="KUBECONFIG") as caught:
        KubernetesApi.connect(kubeconfig=tmp_path / "none")
    assert caught.value.reason == "NO_KUBERNETES"


def test_access_reviews_tell_what_one_may(server: ApiServer, api: KubernetesApi) -> None:
    server.forbidden.add("create pods/eviction")
    assert api.may(Access(verb="patch", resource="nodes"))
    assert not api.may(Access(verb="create", resource="pods/eviction", namespace="models"))


def test_versions_and_resources(server: ApiServer, api: KubernetesApi) -> None:
    server.minor, server.groups["ray.io/v1"] = "31+", ["rayservices", "rayclusters"]
    assert api.version() == (1, 31)
    assert api.resources("ray.io", "v1") == {"rayservices", "rayclusters"}
    assert api.resources("monitoring.coreos.com", "v1") == frozenset()
