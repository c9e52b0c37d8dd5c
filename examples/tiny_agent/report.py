"""An evaluation's results: rows of shares with intervals, paired comparisons, as tables, as JSON and as a plot.

python -m examples.tiny_agent.report .run/evaluation         tables, evaluation.json, evaluation.png
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from examples.tiny_agent.episodes import Outcome
from examples.tiny_agent.journal import GroupKey, Results, read_journal
from examples.tiny_agent.players import MODELS, Pace
from examples.tiny_agent.recall import LayerRecall
from examples.tiny_agent.scores import Paired, Share, paired, share

NEEDLE = "needle "
"""How the names of needles' rows begin."""
_GIVEN = "plan, "
"""How the names of rows begin whose first message is given: not all of it is the model's."""
_ALL_NEEDLES, _ALL = "needle", "all"


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
    """subject: what was evaluated. totals: of each model, all that is its own in one row."""

    subject: Mapping[str, Any]
    rows: tuple[Row, ...]
    totals: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    recalls: Mapping[int, Sequence[LayerRecall]]
    paces: tuple[Pace, ...]

    @staticmethod
    def of(results: Results, subject: Mapping[str, Any]) -> Report:
        rows, totals = [], []
        outcomes = dict(sorted(results.outcomes.items(), key=_place))
        for model, by_group in outcomes.items():
            by_row = _rows(by_group)
            rows += [_row(model, name, made) for name, made in by_row.items()]
            own = [one for name, made in by_row.items() if not name.startswith(_GIVEN) for one in made]
            totals.append(_row(model, _ALL, own))
        return Report(
            subject=subject,
            rows=tuple(rows),
            totals=tuple(totals),
            comparisons=tuple(_comparisons(outcomes)),
            recalls=dict(sorted(results.recalls.items())),
            paces=tuple(results.paces),
        )

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))

    def of_model(self, model: str) -> dict[str, Row]:
        return {row.name: row for row in self.rows if row.model == model}

    def needles(self, model: str) -> dict[tuple[int, float], Share]:
        """By length and depth."""
        cells = {}
        for name, row in self.of_model(model).items():
            if name.startswith(NEEDLE):
                length, depth = name.removeprefix(NEEDLE).split()
                cells[int(length), float(depth)] = row.success
        return dict(sorted(cells.items()))

    def print(self, console: Console) -> None:
        from examples.tiny_agent.report_tables import tables

        for table in tables(self):
            console.print(table)

    def as_json(self) -> dict[str, Any]:
        return {
            "subject": dict(self.subject),
            "rows": [_row_json(row) for row in self.rows],
            "totals": [_row_json(row) for row in self.totals],
            "comparisons": [_comparison_json(one) for one in self.comparisons],
            "recall": {str(length): [asdict(layer) for layer in layers] for length, layers in self.recalls.items()},
            "paces": [asdict(pace) for pace in self.paces],
        }


def write_json(report: Report, folder: Path) -> None:
    """``evaluation.json``."""
    text = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")


def _place(of_model: tuple[str, object]) -> int:
    """Of a model in the report: whichever was played first, the served one comes first."""
    return MODELS.index(of_model[0]) if of_model[0] in MODELS else len(MODELS)


def _rows(by_group: Mapping[GroupKey, Sequence[Outcome]]) -> dict[str, list[Outcome]]:
    rows: dict[str, list[Outcome]] = {}
    for (name, _), outcomes in sorted(by_group.items(), key=lambda item: item[0][1]):
        rows.setdefault(name, []).extend(outcomes)
    return rows


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


def _comparisons(outcomes: Mapping[str, Mapping[GroupKey, Sequence[Outcome]]]) -> list[Comparison]:
    """The first model with every other one over the groups that both played: row by row, all needles as one, and
    all together."""
    first, *others = outcomes or ("",)
    made = []
    for other in others:
        names: dict[str, list[GroupKey]] = {}
        for key in outcomes[first].keys() & outcomes[other].keys():
            names.setdefault(_ALL_NEEDLES if key[0].startswith(NEEDLE) else key[0], []).append(key)
            if not key[0].startswith(_GIVEN):
                names.setdefault(_ALL, []).append(key)
        for name, keys in sorted(names.items(), key=lambda item: (item[0] == _ALL, item[0])):
            # The last group of a model that plays fewer tasks is shorter; its tasks are the first ones of the other's.
            pairs = [
                (ours.succeeded, theirs.succeeded)
                for key in keys
                for ours, theirs in zip(outcomes[first][key], outcomes[other][key], strict=False)
            ]
            both = paired([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
            made.append(Comparison(name=name, first=first, second=other, paired=both))
    return made


def _row_json(row: Row) -> dict[str, Any]:
    shares = {"success": _share_json(row.success), "valid_calls": _share_json(row.valid_calls)}
    return asdict(row) | shares | {"failures": dict(row.failures)}


def _comparison_json(one: Comparison) -> dict[str, Any]:
    return {
        "name": one.name,
        "first": one.first,
        "second": one.second,
        **asdict(one.paired),
        "difference": one.paired.difference,
        "interval": one.paired.interval,
        "p_value": one.paired.p_value,
    }


def _share_json(value: Share) -> dict[str, Any]:
    return {
        "successes": value.successes,
        "total": value.total,
        "value": round(value.value, 6),
        "interval": [round(bound, 6) for bound in value.interval],
    }


def main(
    folder: Annotated[Path, typer.Argument(help="where an evaluation wrote outcomes.jsonl")] = Path(".run/evaluation"),
) -> None:
    """Tables, evaluation.json and evaluation.png of what was played so far."""
    from examples.tiny_agent.plots import plot

    subject, results = read_journal(folder)
    report, console = Report.of(results, subject), Console()
    report.print(console)
    write_json(report, folder)
    plot(report, folder / "evaluation.png")
    console.print(f"{folder}/evaluation.json, {folder}/evaluation.png")


if __name__ == "__main__":
    typer.run(main)
