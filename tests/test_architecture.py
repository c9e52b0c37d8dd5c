"""ARCHITECTURE.md speaks of what exists: every dotted name in the path of a turn resolves."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(seamount\.[\w.]+)`", TEXT)))


def resolve(name: str) -> object:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {name}")


def test_the_path_names_every_package() -> None:
    assert len(NAMES) > 25
    assert {name.split(".")[1] for name in NAMES} >= {"router", "workers"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "seamount.v1.Status"])
def test_every_name_resolves(name: str) -> None:
    resolve(name)


def test_every_path_exists() -> None:
    for document in ("ARCHITECTURE.md", "README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:router|workers|kernels|cluster|proto|tests|docs|benchmarks)/[\w./]*)`", text):
            assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), f"{document}: {path}"
