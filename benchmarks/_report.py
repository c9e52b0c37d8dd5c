"""What all benchmarks share: percentiles, the machine they ran on, rows on the screen and in a JSON Lines file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
WIDTH_OF_FILES = 180
Row = dict[str, str | int | float]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the (non-empty) values lie; linear between neighbours."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def machine() -> str:
    """Cores, processor and versions, in one line."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}, torch {torch.__version__}"


def load_average() -> float:
    """Of the last minute. Take it before the benchmark begins: other work on the machine shows in it."""
    return round(os.getloadavg()[0], 2)


def publish(
    name: str, rows: Sequence[Row], *, as_json: bool, load: float, constants: Mapping[str, float] | None = None
) -> None:
    """Print rows (all with the same keys) and write them, with date and machine, to ``results/<name>.jsonl``.

    load: ``load_average`` before the run. constants: of the whole run, the same in every line.
    """
    stamp: Row = {"benchmark": name, "date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    stamp |= {"load_before": load, **(constants or {})}
    lines = [json.dumps({**stamp, **row}) for row in rows]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if as_json:
        print("\n".join(lines))
        return
    about = [f"{key} {value:,.2f}" for key, value in stamp.items() if isinstance(value, float)]
    table = Table(title=f"{name}: {', '.join([str(stamp['machine']), *about])}")
    for key in rows[0]:
        table.add_column(key, justify="right" if not isinstance(rows[0][key], str) else "left")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH_OF_FILES)).print(table)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
