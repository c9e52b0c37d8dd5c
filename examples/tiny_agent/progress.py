"""What a training run leaves behind: weights, where it stands, metrics; and the bar it shows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.export import save_checkpoint, write_json
from examples.tiny_agent.model import Model
from examples.tiny_agent.parallel import Ranks

STATE = "training.json"
METRICS = "metrics.jsonl"
SAVE_EVERY_S = 60.0
"""A run that is killed loses no more than this."""
OnMetrics = Callable[[dict[str, Any]], None]


class Recorder:
    """Writes into a run's folder, as the first of its ranks. earlier_runs: those that led to this one, oldest first."""

    def __init__(
        self, model: Model, out: Path, *, seed: int, earlier_runs: list[dict[str, Any]], bar: Progress, ranks: Ranks
    ) -> None:
        self._model, self._out, self._seed, self._runs, self._bar = model, out, seed, list(earlier_runs), bar
        self._writes, self._num_ranks = ranks.rank == 0, ranks.size
        self._stage, self._first, self._step, self._total = "", 0, 0, 0
        self._began = self._saved = time.monotonic()
        self._task = TaskID(0)
        out.mkdir(parents=True, exist_ok=True)

    def begin(self, stage: str, step: int, total: int) -> None:
        """A stage goes on at ``step`` of ``total``."""
        self._stage, self._first, self._step, self._total = stage, step, step, total
        self._began = self._saved = time.monotonic()
        self._task = self._bar.add_task(stage, total=total, completed=step, figures="compiling")

    def metrics(self, values: dict[str, Any]) -> None:
        """A line of metrics, at a step that it names."""
        self._step = values["step"]
        if not self._writes:
            return
        with (self._out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self._bar.update(self._task, completed=self._step, figures=_figures(values))
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._save([*self._runs, self._entry()], self._step == self._total)

    def end(self, step: int, *, done: bool) -> None:
        """The run leaves the stage at ``step``."""
        self._step = step
        self._runs.append(self._entry())
        if not self._writes:
            return
        self._save(self._runs, done)
        self._bar.console.print(f"{self._stage}: {step} of {self._total} steps; saved in {self._out}")

    def _entry(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self._began)
        steps = [self._first, self._step]
        ranks = self._num_ranks
        return {"stage": self._stage, "steps": steps, "seed": self._seed, "ranks": ranks, "seconds": seconds}

    def _save(self, runs: list[dict[str, Any]], done: bool) -> None:
        save_checkpoint(self._model, self._out, TOKENIZER)
        write_json(self._out / STATE, {"stage": self._stage, "step": self._step, "done": done, "runs": runs})
        self._saved = time.monotonic()


def progress_bar(*, disable: bool = False) -> Progress:
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn())
    figures = TextColumn("{task.fields[figures]}")
    return Progress(TextColumn("{task.description}"), *columns, figures, disable=disable)


def _figures(values: dict[str, Any]) -> str:
    names = ("loss", "accuracy", "divergence", "reward")
    told = [f"{name} {values[name]:.3f}" for name in names if name in values]
    if "tokens_per_s" in values:
        told += [f"{values['tokens_per_s'] / 1e6:.2f} M tokens/s", f"MFU {values['mfu']:.0%}"]
    return ", ".join(told)
