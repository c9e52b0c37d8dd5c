"""The image's own steps in plain shell, as far as they go without a container: no image is built here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from rendered_chart import CHART, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STEPS = ROOT / ".ci" / "install_image.sh"


def test_the_wheel_that_the_image_installs_is_whole(tmp_path: Path) -> None:
    """Built in a copy of what .dockerignore lets through; pip's own part (build requirements) is taken from here."""
    tree = tmp_path / "tree"
    tree.mkdir()
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    for name in [line.removeprefix("!") for line in lines if line.startswith("!")]:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            if name != "checkpoints/tiny-agent":
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", str(STEPS), "wheel", str(tmp_path / "wheels")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    wanted = {"cluster/declared.py", "router/functions.lua", "workers/server.py", "kernels/layout.py", "wire/limits.py"}
    assert {f"seamount/{name}" for name in wanted} | {"seamount/v1/session_pb2.py"} <= names


@pytest.mark.parametrize("arguments", [("packages", "rocm"), ("everything", "now")])
def test_other_steps_are_refused(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["sh", str(STEPS), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 2
    assert arguments[-1 if arguments[0] == "packages" else 0] in done.stderr


def test_what_the_image_copies_is_there() -> None:
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    copied = [
        source
        for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", DOCKERFILE)
        for source in shlex.split(line)[:-1]
        if source != "."
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert source in allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_last_words_of_each_image_are_those_of_a_user_without_rights() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    stages = dict(re.findall(r"(?ms)^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE))
    wanted = f"{values['podSecurity']['runAsUser']}:{values['podSecurity']['runAsGroup']}"
    for name in ("base", "cuda"):
        assert re.findall(r"(?m)^USER (\S+)$", stages[name])[-1] == wanted
    assert "USER" not in stages["cpu"]
    assert f"/opt/seamount/{Path(values['serving']['model']['path']).relative_to('/opt/seamount')}" in stages["base"]


def test_the_chart_names_the_ray_that_the_image_installs() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    (pinned,) = re.findall(r"(?m)^ray==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert values["rayVersion"] == pinned


def test_the_workflow_builds_every_target() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "image.yaml").read_text())
    targets = {entry["target"] for entry in workflow["jobs"]["build"]["strategy"]["matrix"]["include"]}
    assert targets == {"cpu", "cuda"}
    assert targets <= set(re.findall(r"(?m)^FROM \S+ AS (\S+)$", DOCKERFILE))


def test_what_kuberay_starts_beside_the_head_is_part_of_ray() -> None:
    command = [Path(sys.executable).with_name("ray"), "kuberay-autoscaler", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--cluster-namespace" in done.stdout
