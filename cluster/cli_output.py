"""What the commands have in common: options, exit codes, and how a result is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from seamount.cluster.environment import CONFIG_VARIABLE

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help=f"serving.yaml; else {CONFIG_VARIABLE}, else ./serving.yaml, else the defaults."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def report(as_json: bool, for_programs: Any, for_people: Callable[[Console], None], *, passed: bool = True) -> None:
    """Print what a command has found; exit code 1 unless it passed. for_programs: anything that JSON holds."""
    if as_json:
        print(json.dumps(for_programs, indent=2))
    else:
        for_people(Console())
    if not passed:
        raise typer.Exit(EXIT_FAILED)
