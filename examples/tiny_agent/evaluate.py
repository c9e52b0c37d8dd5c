"""Scores of a checkpoint on held-out tasks: by kind of task, needles over length and depth, and paired comparisons.

    python -m examples.tiny_agent.evaluate --checkpoint DIR            (``make eval``)
    python -m examples.tiny_agent.evaluate --served 127.0.0.1:8000     a running system instead

Models asked on the same tasks: ``sparse`` as it is served in bfloat16; ``dense`` attends to every token; ``fp8`` has
block-scaled weights and FP8 caches. Everything is greedy and without constrained decoding. Where ``dense`` is asked,
the indexer's recall is measured, too.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.tiny_agent.documents import TOKENIZER, DocumentSource
from examples.tiny_agent.episodes import Inference, play
from examples.tiny_agent.inference import ServedInference
from examples.tiny_agent.journal import Journal
from examples.tiny_agent.players import MODELS, Checkpoints, Job, Lane, Pace, Played, play_jobs, run_jobs
from examples.tiny_agent.recall import LayerRecall, indexer_recall, load_model
from examples.tiny_agent.report import Report, write_json
from examples.tiny_agent.suite import LENGTHS, ROOM, Group, Suite
from examples.tiny_agent.turns import TaskKind
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer
from seamount.workers.model.checkpoint_files import model_fingerprint
from seamount.workers.model.quantize_checkpoint import quantize_checkpoint

PROCESSES_PER_GPU = 8
"""A step of so small a model is bound by launches: several processes keep a GPU busy."""
_RECALL_PROMPTS = 8
Conversations = tuple[int, int]
"""At one time, of a process: of short tasks, and of needles."""
_ON_GPU: Conversations = (512, 48)
_ON_CPU: Conversations = (16, 2)
Measured = tuple[int, list[LayerRecall]]


def lanes_of(suites: Mapping[str, Suite], journal: Journal, conversations: Conversations) -> list[Lane]:
    """What is not in the journal yet: all of the first model, then the others' short tasks, then their needles.

    suites: by model.
    """

    def lane(model: str, needles: bool) -> Lane:
        groups = [group for group in suites[model].groups() if (group.kind is TaskKind.NEEDLE) == needles]
        missing = tuple(group for group in groups if not journal.results.has(model, group.row, group.first))
        return Lane(model=model, groups=missing, num_conversations=conversations[needles])

    first, *others = suites
    order = [(first, False), (first, True), *((other, needles) for needles in (False, True) for other in others)]
    return [made for made in (lane(*place) for place in order) if made.groups]


def play_served(
    suite: Suite,
    inference: Inference,
    tokenizer: Tokenizer,
    journal: Journal,
    tell: Callable[[Played], None],
    deadline: float,
) -> None:
    """Play what is not in the journal yet, group after group. deadline: see ``players.play_jobs``."""
    source, history = DocumentSource(tokenizer), History(tokenizer, "evaluation")
    for group in suite.groups():
        if journal.results.has("served", group.row, group.first):
            continue
        if time.time() >= deadline:
            return
        outcomes = play(list(group.episodes(tokenizer, source, history)), inference)
        tell(Played(model="served", group=group, outcomes=outcomes))


def measure_recall(
    lengths: Sequence[int], seed: int, checkpoint: Path, device: str, tell: Callable[[Measured], None]
) -> None:
    """The indexer's recall on needle prompts of each length."""
    tokenizer = Tokenizer.load(checkpoint)
    model, source, history = load_model(checkpoint, device=device), DocumentSource(tokenizer), History(tokenizer, "")
    room = max(lengths, default=0) + ROOM
    for length in lengths:
        group = Group(
            row="", kind=TaskKind.NEEDLE, seed=seed, first=0, num_tasks=_RECALL_PROMPTS, length=length, depth=0.5
        )
        prompts = [episode.prompt() for episode in group.episodes(tokenizer, source, history)]
        tell((length, indexer_recall(model, prompts, length=room if device != "cpu" else 0)))


def devices_of(num_processes: int) -> list[str]:
    """The device of each process; 0 processes: as many as suit this machine."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    count = num_processes or (1 if gpus == ["cpu"] else PROCESSES_PER_GPU * len(gpus))
    return [gpus[i % len(gpus)] for i in range(count)]


class Keeper:
    """Writes what is told into the journal, and shows it."""

    def __init__(self, journal: Journal, progress: Progress, total: int) -> None:
        self._journal, self._progress = journal, progress
        self._bar = progress.add_task("", total=total)

    def __call__(self, told: Played | Pace | Measured) -> None:
        if isinstance(told, Played):
            self._journal.add_outcomes(told.model, told.group.row, told.group.first, told.outcomes)
            self._progress.update(self._bar, description=f"{told.model}: {told.group.row}", advance=len(told.outcomes))
        elif isinstance(told, Pace):
            self._journal.add_pace(told)
        else:
            self._journal.add_recall(*told)


def main(
    checkpoint: Annotated[Path, typer.Option(help="folder of the model")] = Path("checkpoints/tiny-agent"),
    served: Annotated[str, typer.Option(help="host:port of a running system to ask instead")] = "",
    api_key: Annotated[str | None, typer.Option(help="of the running system")] = None,
    tasks: Annotated[int, typer.Option(help="of each kind")] = 2000,
    needles: Annotated[int, typer.Option(help="of each length and depth")] = 100,
    compared: Annotated[float, typer.Option(help="share of the tasks that models but the first play")] = 1.0,
    lengths: Annotated[str, typer.Option(help="of needles' documents, tokens")] = ",".join(map(str, LENGTHS)),
    models: Annotated[
        str, typer.Option(help="of sparse, dense, fp8; the first is compared with the others")
    ] = ",".join(MODELS),
    seed: Annotated[int, typer.Option(help="of the tasks")] = 4,
    processes: Annotated[int, typer.Option(help="that play; 0 = 8 on each GPU, or 1 without one")] = 0,
    stop_after_s: Annotated[
        float, typer.Option(help="begin no more groups of tasks then; run again to go on")
    ] = math.inf,
    out: Annotated[Path, typer.Option(help="folder for outcomes.jsonl and evaluation.json")] = Path(".run/evaluation"),
) -> None:
    """Evaluate a checkpoint."""
    names = tuple(models.split(","))
    if unknown := [name for name in names if name not in MODELS]:
        raise typer.BadParameter(f"{unknown[0]} is no model; use {', '.join(MODELS)}", param_hint="--models")
    deadline = time.time() + stop_after_s
    chosen = tuple(int(length) for length in lengths.split(",") if length)
    suite = Suite(seed=seed, num_tasks=tasks, num_needles=needles, lengths=chosen)
    part = replace(suite, num_tasks=round(tasks * compared), num_needles=round(needles * compared))
    suites = {name: part if number else suite for number, name in enumerate(names)}
    subject: dict[str, Any] = {"seed": seed, "tasks": tasks, "needles": needles, "lengths": chosen}
    subject |= {"model": served or model_fingerprint(checkpoint), "source": served or checkpoint.name}
    try:
        journal = Journal(out, subject)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    console, failure = Console(), ""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, tempfile.TemporaryDirectory() as scratch:
        keep = Keeper(
            journal, progress, suite.num_episodes if served else sum(one.num_episodes for one in suites.values())
        )
        if served:
            inference = ServedInference(served, api_key=api_key)
            play_served(suite, inference, Tokenizer.load(TOKENIZER), journal, keep, deadline)
            inference.close()
        else:
            forms = Checkpoints(plain=checkpoint, fp8=Path(scratch) / "fp8")
            if "fp8" in names:
                quantize_checkpoint(checkpoint, forms.fp8)
            devices = devices_of(processes)
            lanes = lanes_of(suites, journal, _ON_CPU if devices == ["cpu"] else _ON_GPU)
            missing = [length for length in chosen if length not in journal.results.recalls]
            jobs: list[Job] = []
            if missing and "dense" in names:
                jobs.append(partial(measure_recall, missing, seed, checkpoint, devices[-1]))
            try:
                run_jobs([*jobs, *play_jobs(lanes, forms, devices, deadline)], keep)
            except RuntimeError as error:  # what was played is reported all the same
                failure = str(error)
    report = Report.of(journal.results, subject)
    report.print(console)
    write_json(report, out)
    console.print(f"{out}/evaluation.json; python -m examples.tiny_agent.report {out} draws a plot")
    if failure:
        console.print(failure, style="red", markup=False, highlight=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
