"""An evaluation's results as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.tiny_agent.episodes import Outcome
from examples.tiny_agent.recall import LayerRecall
from examples.tiny_agent.scores import Paired, Share, paired, share

_NEEDLE = "needle "
Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""By model and row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model on one kind of task. failures: why tasks did not count, the most frequent reasons."""

    model: str
    name: str
    success: Share
    valid_calls: Share
    num_arguments: int
    num_plain_arguments: int
    mean_output_tokens: float
    failures: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first model against another one on the same tasks."""

    name: str
    first: str
    second: str
    paired: Paired


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    source: str
    seed: int
    seconds: float
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    recalls: Mapping[int, Sequence[LayerRecall]]

    @staticmethod
    def of(
        outcomes: Outcomes, recalls: Mapping[int, Sequence[LayerRecall]], *, source: str, seed: int, seconds: float
    ) -> Report:
        rows = tuple(_row(model, name, made) for model, by_row in outcomes.items() for name, made in by_row.items())
        return Report(
            source=source, seed=seed, seconds=seconds, rows=rows, comparisons=_comparisons(outcomes), recalls=recalls
        )

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))

    def of_model(self, model: str) -> dict[str, Row]:
        return {row.name: row for row in self.rows if row.model == model}

    def print(self, console: Console) -> None:
        for model in self.models:
            console.print(_kinds_table(model, list(self.of_model(model).values())))
            if cells := self.needles(model):
                console.print(_needle_table(model, cells))
        if self.comparisons:
            console.print(_comparison_table(self.comparisons))
        if self.recalls:
            console.print(_recall_table(self.recalls))

    def needles(self, model: str) -> dict[tuple[int, float], Share]:
        """By length and depth."""
        cells = {}
        for name, row in self.of_model(model).items():
            if name.startswith(_NEEDLE):
                length, depth = name.removeprefix(_NEEDLE).split()
                cells[int(length), float(depth)] = row.success
        return cells

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "rows": [
                asdict(row)
                | {"success": _share_json(row.success), "valid_calls": _share_json(row.valid_calls)}
                | {"failures": dict(row.failures)}
                for row in self.rows
            ],
            "comparisons": [
                {
                    "name": one.name,
                    "first": one.first,
                    "second": one.second,
                    **asdict(one.paired),
                    "difference": one.paired.difference,
                    "interval": one.paired.interval,
                    "p_value": one.paired.p_value,
                }
                for one in self.comparisons
            ],
            "recall": {str(length): [asdict(layer) for layer in layers] for length, layers in self.recalls.items()},
        }


def write_report(report: Report, folder: Path) -> None:
    """``evaluation.json`` and ``evaluation.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    plot(report, folder / "evaluation.png")


def plot(report: Report, path: Path) -> None:
    """Success by kind with intervals, needles over length and depth, the indexer's recall."""
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


def _row(model: str, name: str, outcomes: Sequence[Outcome]) -> Row:
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure)
    return Row(
        model=model,
        name=name,
        success=share([outcome.succeeded for outcome in outcomes]),
        valid_calls=Share(
            sum(outcome.num_valid_calls for outcome in outcomes), sum(outcome.num_calls for outcome in outcomes)
        ),
        num_arguments=sum(outcome.num_arguments for outcome in outcomes),
        num_plain_arguments=sum(outcome.num_plain_arguments for outcome in outcomes),
        mean_output_tokens=sum(outcome.num_output_tokens for outcome in outcomes) / max(1, len(outcomes)),
        failures=tuple(failures.most_common(5)),
    )


def _comparisons(outcomes: Outcomes) -> tuple[Comparison, ...]:
    """The first model with every other one: row by row, all needles as one, and all together."""
    first, *others = outcomes
    made = []
    for other in others:
        groups: dict[str, list[str]] = {}
        for name in outcomes[first]:
            groups.setdefault("needle" if name.startswith(_NEEDLE) else name, []).append(name)
        groups["all"] = list(outcomes[first])
        for group, names in groups.items():
            ours, theirs = (
                [outcome.succeeded for name in names for outcome in outcomes[model][name]] for model in (first, other)
            )
            made.append(Comparison(name=group, first=first, second=other, paired=paired(ours, theirs)))
    return tuple(made)


def _share_json(value: Share) -> dict[str, Any]:
    return {
        "successes": value.successes,
        "total": value.total,
        "value": round(value.value, 4),
        "interval": [round(bound, 4) for bound in value.interval],
    }


def _percent(value: Share) -> str:
    low, high = value.interval
    return f"{100 * value.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _kinds_table(model: str, rows: Sequence[Row]) -> Table:
    table = Table("task", "n", "success % (95 %)", "valid calls %", "tokens", "most frequent failure", title=model)
    for row in rows:
        if not row.name.startswith(_NEEDLE):
            valid = f"{100 * row.valid_calls.value:.2f}" if row.valid_calls.total else "-"
            reason = f"{row.failures[0][0]} ({row.failures[0][1]})" if row.failures else ""
            tokens = f"{row.mean_output_tokens:.0f}"
            table.add_row(row.name, str(row.success.total), _percent(row.success), valid, tokens, reason)
    return table


def _needle_table(model: str, cells: Mapping[tuple[int, float], Share]) -> Table:
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    table = Table("length", *(f"depth {depth:g}" for depth in depths), "all", title=f"{model}: needles found, %")
    for length in lengths:
        row = [cells[length, depth] for depth in depths]
        together = Share(sum(cell.successes for cell in row), sum(cell.total for cell in row))
        table.add_row(str(length), *(f"{100 * cell.value:.0f}" for cell in row), _percent(together))
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("task", "models", "points (95 %)", "only first", "only second", "p", title="paired (McNemar)")
    for one in comparisons:
        low, high = one.paired.interval
        points = f"{100 * one.paired.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        counts = (str(one.paired.only_first), str(one.paired.only_second))
        table.add_row(one.name, f"{one.first} - {one.second}", points, *counts, f"{one.paired.p_value:.3g}")
    return table


def _recall_table(recalls: Mapping[int, Sequence[LayerRecall]]) -> Table:
    layers = max((len(layers) for layers in recalls.values()), default=0)
    title = "attention mass on selected tokens (on the best selection)"
    table = Table("length", *(f"layer {layer}" for layer in range(layers)), title=title)
    for length, measured in recalls.items():
        table.add_row(str(length), *(f"{layer.recall:.3f} ({layer.best:.3f})" for layer in measured))
    return table


def _plot_kinds(axes: Any, report: Report) -> None:
    names = [name for name in report.of_model(report.models[0]) if not name.startswith(_NEEDLE)]
    width = 0.8 / len(report.models)
    for i, model in enumerate(report.models):
        shares = [report.of_model(model)[name].success for name in names]
        values = [100 * value.value for value in shares]
        below = [100 * (value.value - value.interval[0]) for value in shares]
        above = [100 * (value.interval[1] - value.value) for value in shares]
        places = [place + (i - (len(report.models) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, values, width, yerr=[below, above], label=model, capsize=2)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="tasks done, %", ylim=(0, 105), title="held-out tasks, 95 % intervals")
    axes.legend()


def _plot_needles(axes: Any, report: Report) -> None:
    cells = report.needles(report.models[0])
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    grid = [[100 * cells[length, depth].value for length in lengths] for depth in depths]
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
