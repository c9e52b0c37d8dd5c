"""What ``seamount k8s preflight`` reads from the values is what Helm makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rendered_chart import CHART, NAMESPACE, VALUES, groups, of_kind, pods, rendered, resources_of, secret_references
from seamount.cluster.kubernetes.chart_values import claim, demands, read_values, rights, secrets, storage_class
from seamount.cluster.kubernetes.preflight import MIN_VERSION


@pytest.fixture(params=sorted(VALUES))
def values_file(request: pytest.FixtureRequest) -> Path:
    return VALUES[request.param]


def test_the_least_version_of_kubernetes() -> None:
    major, minor = MIN_VERSION
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={major}.{minor}.0-0"


def test_pods(values_file: Path) -> None:
    found = {demand.group: demand for demand in demands(read_values(CHART, [values_file]))}
    present = groups(rendered(values_file))
    assert found.keys() == present.keys()
    for name, group in present.items():
        assert found[name].num_pods == group.get("replicas", 1)
        assert found[name].max_pods == group.get("maxReplicas", 1)
        pod = pods(rendered(values_file))[name]["spec"]
        assert found[name].node_selector == pod.get("nodeSelector", {})
        assert list(found[name].tolerations) == pod.get("tolerations", [])
        assert found[name].requests.keys() == pod["containers"][0]["resources"]["requests"].keys()


def test_rights(values_file: Path) -> None:
    asked = {
        (access.group, access.resource, access.namespace)
        for access in rights(read_values(CHART, [values_file]), NAMESPACE)
    }
    assert asked == resources_of(rendered(values_file)) | {("", "secrets", NAMESPACE)}  # Helm's own


def test_names(values_file: Path) -> None:
    values, manifests = read_values(CHART, [values_file]), rendered(values_file)
    made = {entry["metadata"]["name"] for entry in of_kind(manifests, "Secret")}
    named = {name for pod in pods(manifests).values() for name, _ in secret_references(pod)}
    assert set(secrets(values)) == named - made
    claims = {volume["persistentVolumeClaim"]["claimName"] for pod in pods(manifests).values()
              for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume}  # fmt: skip
    assert claims == ({claim(values)} if claim(values) else set())
    assert (storage_class(values) is not None) == bool(of_kind(manifests, "StatefulSet"))
