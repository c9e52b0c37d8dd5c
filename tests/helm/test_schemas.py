"""What is rendered is what Kubernetes, KubeRay and Seamount itself accept."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rendered_chart import CHART, VALUES, Manifest, groups, helm, of_kind, pods, ray_service, serve_config
from seamount.cluster.settings import Settings, validate

CUSTOM_KINDS = {"RayService", "ServiceMonitor", "PrometheusRule"}
SECRETS = "/etc/seamount-secrets"


@pytest.mark.parametrize("name", sorted(VALUES))
def test_helm_finds_nothing_to_complain_of(name: str) -> None:
    command = [helm(), "lint", "--strict", "--quiet", str(CHART), "--values", str(VALUES[name])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_accepts_every_object_and_pod(manifests: tuple[Manifest, ...]) -> None:
    core = [manifest for manifest in manifests if manifest["kind"] not in CUSTOM_KINDS]
    assert len(core) >= 7
    for manifest in [*core, *pods(manifests).values()]:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_kuberay_accepts_the_ray_service(manifests: tuple[Manifest, ...]) -> None:
    schema = json.loads((Path(__file__).parent / "kuberay" / "rayservice_v1.json").read_text())
    jsonschema.Draft7Validator(strict(schema)).validate(ray_service(manifests))


def test_the_schema_of_kuberay_refuses_what_it_does_not_know(manifests: tuple[Manifest, ...]) -> None:
    schema = json.loads((Path(__file__).parent / "kuberay" / "rayservice_v1.json").read_text())
    service = json.loads(json.dumps(ray_service(manifests)))
    service["spec"]["rayClusterConfig"]["gcsFaultTolerance"] = {}
    with pytest.raises(jsonschema.ValidationError, match="gcsFaultTolerance"):
        jsonschema.Draft7Validator(strict(schema)).validate(service)


def test_kuberay_accepts_it_beyond_its_schema(manifests: tuple[Manifest, ...]) -> None:
    """What the operator refuses when it reads a RayService (its validation.go), as far as it concerns this chart."""
    service = ray_service(manifests)
    cluster = service["spec"]["rayClusterConfig"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    assert len(service["metadata"]["name"]) <= 47
    assert [int(part) for part in cluster["rayVersion"].split(".")] >= [2, 52, 0]  # for tokens
    scales = cluster["enableInTreeAutoscaling"]
    assert ("autoscalerOptions" in cluster) == scales
    for name, group in groups(manifests).items():
        assert not group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory", "resources", "labels"}
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        if name != "head":
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert ("idleTimeoutSeconds" in group) <= scales
    named = {entry["name"] for entry in pods(manifests)["head"]["spec"]["containers"][0]["env"]}
    assert not named & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}


def strict(schema: Any) -> Any:
    """An object that lists its properties has no others: Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


def test_serve_accepts_the_applications(manifests: tuple[Manifest, ...]) -> None:
    parsed = ServeDeploySchema.model_validate(serve_config(manifests))
    assert [application.name for application in parsed.applications] == ["fleet", "router", "readiness"]
    for application in parsed.applications:
        assert application.import_path == f"seamount.cluster.declared:{application.name}"


def test_the_settings_are_valid_and_say_what_the_pods_have(manifests: tuple[Manifest, ...], tmp_path: Path) -> None:
    fleet, router, readiness = (application["args"] for application in serve_config(manifests)["applications"])
    (told,) = (entry["data"]["serving.yaml"] for entry in of_kind(manifests, "ConfigMap"))
    assert yaml.safe_load(told) == fleet
    settings = with_secrets(fleet, tmp_path)
    assert with_secrets(router, tmp_path).router == settings.router
    assert readiness.pop("start_timeout_s") > 0
    assert with_secrets(readiness, tmp_path).cluster_name == settings.cluster_name
    assert with_secrets(readiness, tmp_path).redis.timeout_s == settings.redis.timeout_s
    present = groups(manifests)
    for name in ("prefill", "decode"):
        pool = getattr(settings.pools, name)
        if name not in present:
            assert pool.gangs == 0
            continue
        held = {key: float(value) for key, value in present[name]["resources"].items()}
        assert pool.resources[name] == 1
        gangs_or_pods = held[name] / pool.expert_parallel
        assert gangs_or_pods.is_integer() or (1 / gangs_or_pods).is_integer()
        assert present[name]["replicas"] * held[name] >= pool.gangs * pool.expert_parallel
    assert present["router"]["resources"] == {"router": "1"}


def with_secrets(chosen: dict[str, Any], folder: Path) -> Settings:
    """The settings as in a pod, whose secrets lie in ``folder`` here."""
    text = json.dumps(chosen).replace(SECRETS, str(folder))
    for file in ("keys/api-keys", "worker/token", "tls/tls.crt", "tls/tls.key", "tls/ca.crt"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    return validate(json.loads(text))
