"""An evaluation as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from examples.tiny_agent.players import Pace
from examples.tiny_agent.recall import LayerRecall
from examples.tiny_agent.report import NEEDLE, Comparison, Report, Row
from examples.tiny_agent.scores import Share


def tables(report: Report) -> Iterator[Table]:
    """In the order in which they are read."""
    totals = {row.model: row for row in report.totals}
    for model in report.models:
        yield _kinds_table(model, [*report.of_model(model).values(), totals[model]])
        if cells := report.needles(model):
            yield _needle_table(model, cells)
    if report.comparisons:
        yield _comparison_table(report.comparisons)
    if report.recalls:
        yield _recall_table(report.recalls)
    if report.paces:
        yield _pace_table(report.paces)


def _percent(value: Share) -> str:
    low, high = value.interval
    return f"{100 * value.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _kinds_table(model: str, rows: Sequence[Row]) -> Table:
    table = Table("task", "n", "success % (95 %)", "valid calls %", "tokens", "most frequent failure", title=model)
    for row in rows:
        if not row.name.startswith(NEEDLE):
            valid = f"{100 * row.valid_calls.value:.2f}" if row.valid_calls.total else "-"
            reason = f"{row.failures[0][0]} ({row.failures[0][1]})" if row.failures else ""
            tokens = f"{row.mean_output_tokens:.0f}"
            table.add_row(row.name, str(row.success.total), _percent(row.success), valid, tokens, reason)
    return table


def _needle_table(model: str, cells: Mapping[tuple[int, float], Share]) -> Table:
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    table = Table("length", *(f"depth {depth:g}" for depth in depths), "all", title=f"{model}: needles found, %")
    for length in lengths:
        row = [cells.get((length, depth), Share(0, 0)) for depth in depths]
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


def _pace_table(paces: Sequence[Pace]) -> Table:
    """One line a model and size of contexts; seconds are the longest process's."""
    title = "work of all processes"
    table = Table("model", "context", "processes", "steps", "prefilled", "sampled", "seconds", "sampled/s", title=title)
    for key in dict.fromkeys((pace.model, pace.max_tokens) for pace in paces):
        own = [pace for pace in paces if (pace.model, pace.max_tokens) == key]
        steps, prefilled, sampled = (
            sum(getattr(pace.work, name) for pace in own) for name in ("num_steps", "num_prefilled", "num_sampled")
        )
        seconds = max(pace.seconds for pace in own)
        counts = (len(own), steps, prefilled, sampled, round(seconds), round(sampled / seconds))
        table.add_row(key[0], str(key[1]), *(f"{count:,}" for count in counts))
    return table
