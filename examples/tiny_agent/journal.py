"""Outcomes on disk as they come, so that an evaluation goes on where it stopped.

``outcomes.jsonl``: what is evaluated in the first line, then one line a group of tasks and model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from examples.tiny_agent.episodes import Outcome


class Journal:
    """subject: what is evaluated; a journal of another one is refused."""

    def __init__(self, folder: Path, subject: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the folder holds outcomes of another subject."""
        self._path = folder / "outcomes.jsonl"
        self._known: dict[tuple[str, str, int], list[Outcome]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        if not lines:
            self._append(dict(subject))
        elif json.loads(lines[0]) != json.loads(json.dumps(dict(subject))):
            raise ValueError(f"{self._path} is of another model or other tasks; choose another folder, or remove it")
        for line in lines[1:]:
            group = json.loads(line)
            outcomes = [Outcome(*values) for values in group["outcomes"]]
            self._known[group["model"], group["row"], group["first"]] = outcomes

    def outcomes(self, model: str, row: str, first: int) -> list[Outcome] | None:
        """Of a group that was played already."""
        return self._known.get((model, row, first))

    def add(self, model: str, row: str, first: int, outcomes: Sequence[Outcome]) -> None:
        self._append({"model": model, "row": row, "first": first, "outcomes": [astuple(one) for one in outcomes]})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
