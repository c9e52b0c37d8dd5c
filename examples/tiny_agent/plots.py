"""An evaluation as a plot: success by kind with intervals, needles over length and depth, the indexer's recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.tiny_agent.report import NEEDLE, Report
from examples.tiny_agent.scores import Share


def plot(report: Report, path: Path) -> None:
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (kinds, needles, recall) = pyplot.subplots(1, 3, figsize=(18, 4.5), width_ratios=(2, 1.2, 1))
    _plot_kinds(kinds, report)
    _plot_needles(needles, report)
    _plot_recall(recall, report)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_kinds(axes: Any, report: Report) -> None:
    names = [name for name in report.of_model(report.models[0]) if not name.startswith(NEEDLE)]
    width = 0.8 / len(report.models)
    for i, model in enumerate(report.models):
        shares = [report.of_model(model)[name].success for name in names]
        values = [100 * value.value for value in shares]
        below = [max(0.0, 100 * (value.value - value.interval[0])) for value in shares]
        above = [max(0.0, 100 * (value.interval[1] - value.value)) for value in shares]  # rounding at 0 and 100
        places = [place + (i - (len(report.models) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, values, width, yerr=[below, above], label=model, capsize=2)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="tasks done, %", ylim=(0, 105), title="held-out tasks, 95 % intervals")
    axes.legend()


def _plot_needles(axes: Any, report: Report) -> None:
    cells = report.needles(report.models[0])
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    grid = [[100 * cells.get((length, depth), Share(0, 0)).value for length in lengths] for depth in depths]
    axes.set(title=f"needles found, % ({report.models[0]})", xlabel="document, tokens", ylabel="depth")
    if not grid:
        return
    axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")


def _plot_recall(axes: Any, report: Report) -> None:
    lengths = [length for length, layers in report.recalls.items() if layers]
    for layer in range(max((len(report.recalls[length]) for length in lengths), default=0)):
        axes.plot(lengths, [report.recalls[length][layer].recall for length in lengths], "o-", label=f"layer {layer}")
    axes.set(title="attention mass on selected tokens", xlabel="document, tokens", ylim=(0, 1.02))
    if lengths:
        axes.set_xscale("log", base=2)
        axes.legend()
