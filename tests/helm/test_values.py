"""Bad values are refused with a message that names them; the schema follows the settings; every value is explained."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rendered_chart import CHART, ROOT, groups, helm, of_kind, pods, rendered, run_template
from seamount.router.tenants import read_api_keys
from seamount.wire.credentials import read_secret

SCHEMA = json.loads((CHART / "values.schema.json").read_text())

REFUSED = {
    "pools.decode.gang=2": "at '/pools/decode': additional properties 'gang' not allowed",
    "pool.decode.gangs=2": "additional properties 'pool' not allowed",
    "pools.decode.gangs=two": "at '/pools/decode/gangs': got string, want integer",
    "pools.decode.minGangs=0": "at '/pools/decode/minGangs': minimum: got 0, want 1",
    "pools.decode.gangs=9": "pools.decode.gangs: 9 is not between minGangs = 1 and maxGangs = 4",
    "pools.decode.expertParallel=3": "pools.decode: gangs of 3 ranks in pods of 2 would share pods by halves",
    "pools.decode.cpusPerRank=3": "pools.decode.cpusPerRank: 2 ranks of 3 CPUs find no room in a pod of 2",
    "pools.prefill.gpu=true": "pools.prefill.gpu: true does not go with serving.engine.device = cpu",
    "serving.engine.device=cuda": "gpu: false does not go with serving.engine.device = cuda",
    "serving.engine.max_contxt=9": "at '/serving/engine': additional properties 'max_contxt' not allowed",
    "serving.cache.layout=fp4": "at '/serving/cache/layout': value must be one of 'fp8', 'bf16', 'exact'",
    "serving.router.host=0.0.0.0": "at '/serving/router': additional properties 'host' not allowed",
    "serving.router.port=9464": "serving.router.port: 9464 is taken in a router's pod",
    "serving.router.port=0": "at '/serving/router/port': minimum: got 0, want 1",
    "autoscaling.targets.first_token_s=0": "at '/autoscaling/targets/first_token_s': exclusiveMinimum",
    "routers.replicas=1": "routers.replicas: 1 is not between minReplicas = 2 and maxReplicas = 8",
    "image.tag=latest": "image.tag: latest is another image tomorrow",
    "image.pullPolicy=Sometimes": "value must be one of 'Always', 'IfNotPresent', 'Never'",
    "routers.resources.limits.memory=3 GB": "at '/routers/resources/limits/memory': '3 GB' does not match pattern",
    "podSecurity.runAsUser=0": "at '/podSecurity/runAsUser': minimum: got 0, want 1",
    "weights.source=s3": "value must be one of 'image', 'pvc', 'hostPath', 'download'",
    "weights.source=pvc": "weights.pvc.claimName: name the claim",
    "weights.source=hostPath": "weights.hostPath.path: name the folder",
    "weights.source=download": "weights.download.baseUrl: the address",
    "redis.external.enabled=true": "redis.external.host: name the server",
    "tls.existingSecret=router-tls": "tls.serverName: give a DNS name of the certificate",
    "drain.deadlineSeconds=60": "drain.deadlineSeconds: 60 s are too few",
    "drain.clusterDeletionDelaySeconds=839": "Seconds: 839 s are too few: a turn takes up to 600 s",
}


@pytest.mark.parametrize("value", REFUSED)
def test_a_bad_value_is_refused_by_name(value: str) -> None:
    done = run_template("--set", value)
    assert done.returncode != 0
    assert REFUSED[value] in done.stderr


def test_a_release_needs_a_name_that_kuberay_takes() -> None:
    assert "release 9lives: KubeRay takes names that begin with a letter" in run_template(release="9lives").stderr
    done = run_template(release=f"a.{'b' * 50}")
    (service,) = of_kind([entry for entry in yaml.safe_load_all(done.stdout) if entry], "RayService")
    assert service["metadata"]["name"] == f"a-{'b' * 38}"


def test_devices_must_be_as_many_as_ranks() -> None:
    done = run_template(
        "--set", "serving.engine.device=cuda,pools.decode.gpu=true,pools.prefill.maxGangs=0,pools.prefill.gangs=0"
    )
    assert (
        "pools.decode.resources.limits: a pod of ranksPerPod = 2 ranks on GPUs needs nvidia.com/gpu: 2, not 0"
        in done.stderr
    )


def test_a_longer_turn_delays_the_deletion_of_the_old_cluster() -> None:
    done = run_template(
        "--set-json", "serving.router.turn_deadline_s=3600.5", "--show-only", "templates/rayservice.yaml"
    )
    assert yaml.safe_load(done.stdout)["spec"]["rayClusterDeletionDelaySeconds"] == 3601 + 240


def test_pods_are_counted_from_gangs() -> None:
    chosen = "pools.decode.expertParallel=4,pools.decode.gangs=3,pools.decode.maxGangs=5"
    done = run_template("--set", chosen, "--show-only", "templates/rayservice.yaml")
    decode = groups([yaml.safe_load(done.stdout)])["decode"]
    assert [decode[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [6, 2, 12]  # two pods a gang
    done = run_template("--set", f"{chosen},autoscaling.enabled=false", "--show-only", "templates/rayservice.yaml")
    fixed = groups([yaml.safe_load(done.stdout)])["decode"]
    assert [fixed[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [8, 8, 8]


def test_pods_use_an_account_that_is_there() -> None:
    for chosen, expected in (("create=false", "default"), ("create=false,serviceAccount.name=mine", "mine")):
        done = run_template("--set", f"serviceAccount.{chosen}")
        made = [entry for entry in yaml.safe_load_all(done.stdout) if entry]
        assert not of_kind(made, "ServiceAccount")
        assert {pod["spec"]["serviceAccountName"] for pod in pods(made).values()} == {expected}
        (binding,) = of_kind(made, "RoleBinding")
        assert binding["subjects"][0]["name"] == expected


def test_two_releases_share_no_name_beyond_their_namespace() -> None:
    names = []
    for namespace in ("one", "two"):
        done = run_template("--namespace", namespace, "--set", "drain.watchNodes=true")
        made = [entry for entry in yaml.safe_load_all(done.stdout) if entry]
        wide = [
            entry for kind in ("PriorityClass", "ClusterRole", "ClusterRoleBinding") for entry in of_kind(made, kind)
        ]
        names.append({(entry["kind"], entry["metadata"]["name"]) for entry in wide})
    assert len(names[0]) == 4
    assert not names[0] & names[1]


def test_the_notes_tell_how_to_call() -> None:
    command = [helm(), "install", "release", str(CHART), "--dry-run=client", "--namespace", "serving"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    assert "port-forward service/release 7411:7411" in notes
    assert "get secret release-api-keys -o jsonpath='{.data.trial-key}'" in notes
    assert "seamount chat --address 127.0.0.1:7411" in notes
    assert "Redis is the trial's own" in notes
    assert "No image is published: unless nodes hold one named seamount:" in notes


def test_the_key_that_is_made_is_one_that_the_router_knows(tmp_path: Path) -> None:
    (data,) = [entry["data"] for entry in of_kind(rendered(None), "Secret") if "api-keys" in entry["data"]]
    (tmp_path / "api-keys").write_bytes(base64.b64decode(data["api-keys"]))
    who = read_api_keys(tmp_path / "api-keys").find(base64.b64decode(data["trial-key"]).decode())
    assert who is not None
    assert (who.tenant, who.admin) == ("trial", True)


def test_the_worker_token_that_is_made_is_one_that_ranks_take(tmp_path: Path) -> None:
    (data,) = [entry["data"] for entry in of_kind(rendered(None), "Secret") if "token" in entry["data"]]
    (tmp_path / "token").write_bytes(base64.b64decode(data["token"]))
    assert len(read_secret(tmp_path / "token", field="token")) == 48


def test_the_schema_follows_the_settings() -> None:
    path = ROOT / ".ci" / "values_schema.py"
    spec = importlib.util.spec_from_file_location("values_schema", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.generated(SCHEMA) == SCHEMA, "the settings have changed: .venv/bin/python .ci/values_schema.py"


def test_every_value_is_in_the_schema_and_has_a_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    definitions = SCHEMA["definitions"]

    def compare(value: Any, schema: dict[str, Any], place: str) -> None:
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
        if place.startswith("serving") or place == "autoscaling.targets":  # optional: the settings have defaults
            return
        if "properties" in schema:
            assert set(value) == set(schema["properties"]) - {"global"}, place
            for key, child in value.items():
                compare(child, schema["properties"][key], f"{place}.{key}".lstrip("."))

    compare(values, SCHEMA, "")


def test_every_section_of_the_values_is_explained() -> None:
    text = (CHART / "values.yaml").read_text()
    sections = {match[1]: part for part in text.split("\n\n") if (match := re.search(r"(?m)^([a-zA-Z]+):", part))}
    assert set(sections) == set(yaml.safe_load(text))
    assert not [name for name, part in sections.items() if "#" not in part]
