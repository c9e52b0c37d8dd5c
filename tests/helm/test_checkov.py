"""checkov over every profile, with pods as KubeRay makes them (it does not look into a RayService), and the image."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rendered_chart import NAMESPACE, ROOT, VALUES, pods, rendered

CHECKOV = ROOT / "build" / "tools" / "checkov" / "bin" / "checkov"
EXCEPTIONS = {
    "CKV_K8S_8": "no liveness probe of Redis: a busy one must not be killed for it, everyone waits for it",
    "CKV_K8S_9": "no readiness probe of Redis: one pod without a second has nobody to yield to",
    "CKV_K8S_15": "the pull policy is a value; tags are versions, latest is refused",
    "CKV_K8S_35": "Redis's password is part of an URL, and KubeRay takes it from the environment, too",
    "CKV_K8S_38": "the head's token: Ray's autoscaler and the fleet's watch need the API server",
    "CKV_K8S_43": "image.digest is a value: no image is published whose digest could stand here",
}
"""Checks of objects and pods that do not apply, with the reason."""
EXCEPTIONS_OF_THE_IMAGE = {
    "CKV_DOCKER_2": "no HEALTHCHECK: Kubernetes has probes of its own, and each group of pods another one",
    "CKV_DOCKER_7": "the base's tag is in the argument PYTHON, where checkov does not look for it",
}


def failed(folder: Path, *frameworks: str, at_least: int) -> set[tuple[str, str, str]]:
    """(check, its name, resource) of what does not pass; ``at_least`` so many checks have."""
    if not CHECKOV.exists():
        pytest.skip("no checkov: make chart-tools installs it")
    command = [CHECKOV, "--directory", folder, "--framework", *frameworks, "--skip-download", "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    reports: Any = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    assert sum(report["summary"]["passed"] for report in reports) >= at_least
    checks = [check for report in reports for check in report["results"]["failed_checks"]]
    return {(check["check_id"], check["check_name"], check["resource"]) for check in checks}


def test_objects_and_pods(tmp_path: Path) -> None:
    for name, values in VALUES.items():
        manifests = rendered(values)
        made = [{**entry, "metadata": {"namespace": NAMESPACE, **entry["metadata"]}} for entry in manifests]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all([*made, *pods(manifests).values()]))
    found = failed(tmp_path, "kubernetes", at_least=500)
    assert not sorted(entry for entry in found if entry[0] not in EXCEPTIONS)
    assert EXCEPTIONS.keys() <= {entry[0] for entry in found}, "an exception that is not needed"


def test_dockerfile_and_workflow(tmp_path: Path) -> None:
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    for name in ("Dockerfile", ".github/workflows/image.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    found = failed(tmp_path, "dockerfile", "github_actions", at_least=100)
    assert {entry[0] for entry in found} == EXCEPTIONS_OF_THE_IMAGE.keys()
