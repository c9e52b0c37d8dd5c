"""What an evaluation found, on disk as it comes, so that it goes on where it stopped and is reported elsewhere.

``outcomes.jsonl``: what is evaluated in the first line; then a line for each group of tasks and model, for what each
process computed, and for the indexer's recall at each length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from examples.tiny_agent.episodes import Outcome
from examples.tiny_agent.players import Pace
from examples.tiny_agent.recall import LayerRecall
from examples.tiny_agent.rollouts import Work

GroupKey = tuple[str, int]
"""Row and number of the first task."""


@dataclass(slots=True)
class Results:
    """outcomes: by model and group, each in the order of its tasks. recalls: by length, layer by layer."""

    outcomes: dict[str, dict[GroupKey, list[Outcome]]] = field(default_factory=dict)
    recalls: dict[int, list[LayerRecall]] = field(default_factory=dict)
    paces: list[Pace] = field(default_factory=list)

    def has(self, model: str, row: str, first: int) -> bool:
        return (row, first) in self.outcomes.get(model, {})


class Journal:
    """subject: what is evaluated; a journal of another one is refused. results: all that it holds."""

    def __init__(self, folder: Path, subject: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the folder holds outcomes of another subject."""
        self._path = folder / "outcomes.jsonl"
        self.results = Results()
        folder.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            self._append(dict(subject))
            return
        _cut_last_line(self._path)
        known, self.results = read_journal(folder)
        if known != json.loads(json.dumps(dict(subject))):
            raise ValueError(f"{self._path} is of another model or other tasks; choose another folder, or remove it")

    def add_outcomes(self, model: str, row: str, first: int, outcomes: Sequence[Outcome]) -> None:
        self.results.outcomes.setdefault(model, {})[row, first] = list(outcomes)
        self._append({"model": model, "row": row, "first": first, "outcomes": [astuple(one) for one in outcomes]})

    def add_recall(self, length: int, layers: Sequence[LayerRecall]) -> None:
        self.results.recalls[length] = list(layers)
        self._append({"recall": length, "layers": [asdict(layer) for layer in layers]})

    def add_pace(self, pace: Pace) -> None:
        self.results.paces.append(pace)
        self._append({"pace": asdict(pace)})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_journal(folder: Path) -> tuple[dict[str, Any], Results]:
    """What was evaluated, and what was found. A last line that was cut off is left out."""
    subject, *lines, _ = (folder / "outcomes.jsonl").read_text(encoding="utf-8").split("\n")
    results = Results()
    for line in lines:
        _take(json.loads(line), results)
    return dict(json.loads(subject)), results


def _cut_last_line(path: Path) -> None:
    """Take away what stands behind the last line break."""
    written = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(written.rfind(b"\n") + 1)


def _take(line: dict[str, Any], results: Results) -> None:
    if "outcomes" in line:
        outcomes = [Outcome(*values) for values in line["outcomes"]]
        results.outcomes.setdefault(line["model"], {})[line["row"], line["first"]] = outcomes
    elif "recall" in line:
        results.recalls[line["recall"]] = [LayerRecall(**layer) for layer in line["layers"]]
    else:
        pace = line["pace"]
        results.paces.append(Pace(**pace | {"work": Work(**pace["work"])}))
