"""Training curves: a run's against a recorded one, and a plot of them.

    python -m examples.tiny_agent.curves runs/tiny-agent --recorded checkpoints/tiny-agent/metrics.jsonl

Seed and recipe being the same, a run sees the same documents in the same order; what differs is rounding on the device,
which grows along the way. So means over ``WINDOW`` steps are compared, not single lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

WINDOW = 100
"""Steps of a mean."""
WATCHED: Mapping[str, str] = {"indexer": "divergence", "reinforce": "reward"}
"""What is compared of a stage, where it is not the loss."""
Curve = dict[int, float]
"""Means by the number of their window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of one stage: windows that both have, and the largest relative difference of their means, at a step."""

    stage: str
    quantity: str
    windows: int
    largest: float
    step: int


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's folder or of a file of metrics that are points of a curve; success before and after
    reinforcement is none. Raises BadParameter where there are none."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file} holds no metrics: {error}") from error
    points = [line for line in lines if quantity(line["stage"]) in line]
    if not points:
        raise typer.BadParameter(f"{file} holds no curves")
    return points


def curve(lines: Sequence[Mapping[str, Any]], stage: str) -> Curve:
    """Means over windows of steps; a window that a run left half-way counts with what it has. Of a stage that was begun
    anew only the last pass counts."""
    values: dict[int, list[float]] = {}
    for last in passes(lines, stage)[-1:]:
        for line in last:
            values.setdefault((line["step"] - 1) // WINDOW, []).append(line[quantity(stage)])
    return {number: sum(some) / len(some) for number, some in values.items()}


def passes(lines: Sequence[Mapping[str, Any]], stage: str) -> list[list[Mapping[str, Any]]]:
    """A stage's lines, cut where its steps begin anew."""
    found: list[list[Mapping[str, Any]]] = []
    for line in lines:
        if line["stage"] == stage:
            if not found or line["step"] <= found[-1][-1]["step"]:
                found.append([])
            found[-1].append(line)
    return found


def quantity(stage: str) -> str:
    return WATCHED.get(stage, "loss")


def compare(run: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Stage by stage, in the recorded order; stages that one of them lacks are left out."""
    found = []
    for stage in dict.fromkeys(line["stage"] for line in recorded):
        own, other = curve(run, stage), curve(recorded, stage)
        # The first one holds the fall from an untrained model, where a step more or less is a large difference.
        both = sorted((own.keys() & other.keys()) - {0}) or sorted(own.keys() & other.keys())
        if both:
            differences = {number: abs(own[number] - other[number]) / max(1e-9, abs(other[number])) for number in both}
            worst = max(differences, key=differences.__getitem__)
            found.append(
                Comparison(
                    stage=stage,
                    quantity=quantity(stage),
                    windows=len(both),
                    largest=differences[worst],
                    step=worst * WINDOW + 1,
                )
            )
    return found


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a stage."""
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure, panels = pyplot.subplots(1, len(stages), figsize=(3.6 * len(stages), 3.2), squeeze=False)
    for panel, stage in zip(panels[0], stages, strict=True):
        for number, own in enumerate(passes(lines, stage), 1):
            steps = [line["step"] for line in own]
            for name in (quantity(stage), "mtp_loss"):
                if all(name in line for line in own):
                    panel.plot(steps, [line[name] for line in own], label=f"{name}, pass {number}", linewidth=1)
        if quantity(stage) == "loss":
            panel.set_yscale("log")
        panel.set(title=stage, xlabel="step")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a file of metrics.")],
    recorded: Annotated[Path | None, typer.Option(help="What to compare it with.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of means over 100 steps.")] = 0.05,
    image: Annotated[Path | None, typer.Option(help="Where to draw the run's curves.")] = None,
) -> None:
    """Compare the curves of a training run with recorded ones; exit 1 if they differ by more than the tolerance."""
    lines = read(run)
    if image is not None:
        plot(lines, image)
    if recorded is None:
        return
    found = compare(lines, read(recorded))
    table = Table("stage", "quantity", f"means of {WINDOW} steps", "largest difference", "from step")
    for one in found:
        table.add_row(one.stage, one.quantity, str(one.windows), f"{one.largest:.1%}", str(one.step))
    Console().print(table)
    if not found or any(one.largest > tolerance for one in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
