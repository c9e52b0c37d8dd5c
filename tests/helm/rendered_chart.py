"""The chart as Helm renders it, and what KubeRay would make of it: one pod for each group of the RayService."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "seamount"
VALUES = {
    file.stem.removesuffix("-values"): file for folder in ("profiles", "ci") for file in CHART.glob(f"{folder}/*")
}
RELEASE, NAMESPACE = "release", "serving"

Manifest = dict[str, Any]


def helm() -> str:
    """The program; skips the test where there is none."""
    fetched = ROOT / "build" / "tools" / "helm"
    found = str(fetched) if fetched.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("no helm: make chart-tools fetches one")
    return found


def run_template(
    *arguments: str, values: Iterable[Path] = (), release: str = RELEASE
) -> subprocess.CompletedProcess[str]:
    """``helm template`` of the chart; arguments such as ``--set a=b``."""
    files = [part for file in values for part in ("--values", str(file))]
    command = [helm(), "template", release, str(CHART), "--namespace", NAMESPACE, *files, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@cache
def rendered(values: Path | None) -> tuple[Manifest, ...]:
    """Every object of the release with the values of one file."""
    done = run_template(values=[] if values is None else [values])
    assert done.returncode == 0, done.stderr
    return tuple(manifest for manifest in yaml.safe_load_all(done.stdout) if manifest)


def of_kind(manifests: Iterable[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def ray_service(manifests: Iterable[Manifest]) -> Manifest:
    (service,) = of_kind(manifests, "RayService")
    return service


def serve_config(manifests: Iterable[Manifest]) -> dict[str, Any]:
    """What KubeRay would send to Serve."""
    config: dict[str, Any] = yaml.safe_load(ray_service(manifests)["spec"]["serveConfigV2"])
    return config


def groups(manifests: Iterable[Manifest]) -> dict[str, dict[str, Any]]:
    """The groups of Ray pods by name, the head's among them."""
    cluster = ray_service(manifests)["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def pods(manifests: Iterable[Manifest]) -> dict[str, Manifest]:
    """One pod of each group, and of the trial's Redis, as manifests of kind Pod."""
    manifests = list(manifests)
    templates = {name: group["template"] for name, group in groups(manifests).items()}
    for owner in of_kind(manifests, "StatefulSet"):
        templates[owner["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]] = owner["spec"][
            "template"
        ]
    made = {}
    for name, template in templates.items():
        metadata = {"name": f"{RELEASE}-{name}", "namespace": NAMESPACE, **template["metadata"]}
        made[name] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    return made


def containers(pod: Manifest) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def secret_references(node: Any) -> Iterator[tuple[str, str | None]]:
    """(secret, key) wherever a pod names one; no key where all of it is mounted."""
    if isinstance(node, dict):
        if "secretKeyRef" in node:
            yield node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]
        for entry in node.get("imagePullSecrets", []):
            yield entry["name"], None
        if "secretName" in node:
            for item in node.get("items", [{"key": None}]):
                yield node["secretName"], item["key"]
    children: Iterable[Any] = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from secret_references(child)


def resources_of(manifests: Iterable[Manifest]) -> set[tuple[str, str, str | None]]:
    """(API group, resource, namespace) of each object; no namespace for those that belong to the whole cluster."""
    wide = {"PriorityClass", "ClusterRole", "ClusterRoleBinding"}
    found: set[tuple[str, str, str | None]] = set()
    for manifest in manifests:
        group = manifest["apiVersion"].rpartition("/")[0]
        kind = manifest["kind"].lower()
        plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}es" if kind.endswith("s") else f"{kind}s"
        found.add((group, plural, None if manifest["kind"] in wide else NAMESPACE))
    return found
