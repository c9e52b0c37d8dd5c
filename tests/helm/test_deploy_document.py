"""docs/deploy.md speaks of commands, values, files and objects that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click.core import Command, Context, Group

from rendered_chart import CHART, RELEASE, ROOT, VALUES, Manifest, rendered, run_template
from seamount.cluster.cli import app

TEXT = (ROOT / "docs" / "deploy.md").read_text()
BLOCKS = [block.removeprefix("\n") for block in re.split(r"(?m)^```", TEXT)[1::2] if block.startswith("\n")]
COMMANDS = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()
]


def seamount_commands() -> list[list[str]]:
    found = []
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
        if program.endswith("seamount"):
            found.append(arguments)
    return found


@pytest.mark.parametrize("arguments", seamount_commands(), ids=" ".join)
def test_seamounts_own_commands_can_be_given_so(arguments: list[str]) -> None:
    command: Command = typer.main.get_command(app)
    context = Context(command, info_name="seamount")
    rest = list(arguments)
    while isinstance(command, Group):
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest, parent=context)  # parses, runs nothing


def test_every_other_command_is_of_a_known_program() -> None:
    programs = {shlex.split(line)[0] for line in COMMANDS}
    assert programs <= {"docker", "helm", "kubectl", "export", "seamount", ".venv/bin/seamount"}
    assert {"docker", "helm", "kubectl"} <= programs


def test_helm_is_given_files_that_exist() -> None:
    for line in COMMANDS:
        for file in re.findall(r"helm/seamount/\S+\.yaml", line):
            assert (ROOT / file).is_file()


def test_the_example_of_values_is_taken(tmp_path: Path) -> None:
    (block,) = re.findall(r"(?ms)^```yaml\n# mine.yaml\n(.*?)^```$", TEXT)
    (tmp_path / "mine.yaml").write_text(block)
    done = run_template(values=[VALUES["h200x8"], tmp_path / "mine.yaml"])
    assert done.returncode == 0, done.stderr


def test_named_values_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["draining"] = {"replacement_s": 0, "timeout_s": 0}
    named = set(re.findall(r"`((?:drain|routers|autoscaling|weights|serving|draining)(?:\.\w+)+)`", TEXT))
    assert len(named) > 8
    optional = {"serving.yaml", "serving.router.turn_deadline_s", "serving.cache.host_cache_bytes"}
    for name in named - optional:
        found: Any = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]


def test_named_objects_are_made() -> None:
    manifests: tuple[Manifest, ...] = rendered(VALUES["trial-cpu"])
    names = {(entry["kind"].lower(), entry["metadata"]["name"].replace(RELEASE, "seamount")) for entry in manifests}
    for kind, name in re.findall(r"(service|secret)[/ ](seamount[a-z-]*)", "\n".join(COMMANDS)):
        if "create secret" not in next(line for line in COMMANDS if name in line):
            assert (kind, name) in names
