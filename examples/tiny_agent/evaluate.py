"""Scores of a checkpoint on held-out tasks: by kind of task, needles over length and depth, and paired comparisons.

    python -m examples.tiny_agent.evaluate --checkpoint DIR            (``make eval``)
    python -m examples.tiny_agent.evaluate --served 127.0.0.1:8000     a running system instead

Models asked on the same tasks: ``sparse`` as it is served in bfloat16; ``dense`` attends to every token; ``fp8`` has
block-scaled weights and FP8 caches. Everything is greedy and without constrained decoding.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.tiny_agent.documents import TOKENIZER, DocumentSource
from examples.tiny_agent.episodes import Episode, Inference, Outcome, gold_outputs, play
from examples.tiny_agent.inference import EVERY_TOKEN, LocalInference, ServedInference, load_transformer
from examples.tiny_agent.journal import Journal
from examples.tiny_agent.recall import LayerRecall, indexer_recall, load_model
from examples.tiny_agent.report import Report, write_report
from examples.tiny_agent.tasks import MAKERS, Task, make_needle, make_task
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Split
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer
from seamount.workers.model.checkpoint_files import model_fingerprint
from seamount.workers.model.quantize_checkpoint import quantize_checkpoint

LENGTHS = (1024, 2048, 4096, 8192, 16384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MODELS = ("sparse", "dense", "fp8")
SHORT_CONTEXT, ROOM = 2560, 512
"""Tokens: contexts of all tasks but needles; what a needle's context has beyond its document."""
_LONG_BATCH_TOKENS = 1 << 19
_RECALL_PROMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tasks that are played side by side. name: of the row that they count in; make: makes them, in order; first: index
    of the first one in its row; given: the first message is the gold one; keeps_reasoning: see ``Episode``."""

    name: str
    make: Callable[[], list[Task]]
    num_tasks: int
    first: int = 0
    given: bool = False
    keeps_reasoning: bool = True
    max_tokens: int = SHORT_CONTEXT
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to play. num_tasks: of each kind; num_needles: of each length and depth."""

    seed: int
    num_tasks: int
    num_needles: int
    kinds: tuple[TaskKind, ...] = tuple(MAKERS)
    lengths: tuple[int, ...] = LENGTHS
    depths: tuple[float, ...] = DEPTHS
    batch_size: int

    def groups(self, source: DocumentSource) -> Iterator[Group]:
        """In order. Plans are played three times: as they are; with the gold first message, whose choice is drawn at
        random; and so, with the reasoning taken out, which leaves a guess."""
        for kind in self.kinds:
            for start in range(0, self.num_tasks, self.batch_size):
                indices = range(start, min(start + self.batch_size, self.num_tasks))
                group = Group(
                    name=kind.value,
                    make=partial(self.tasks, kind, indices),
                    num_tasks=len(indices),
                    first=start,
                    batch_size=self.batch_size,
                )
                yield group
                if kind is TaskKind.PLAN:
                    yield replace(group, name="plan, given", given=True)
                    yield replace(group, name="plan, cut", given=True, keeps_reasoning=False)
        for length in self.lengths:
            for depth in self.depths:
                yield Group(
                    name=needle_row(length, depth),
                    make=partial(self.needles, source, length, depth, self.num_needles),
                    num_tasks=self.num_needles,
                    max_tokens=length + ROOM,
                    batch_size=max(1, min(self.batch_size, _LONG_BATCH_TOKENS // length)),
                )

    def tasks(self, kind: TaskKind, indices: range) -> list[Task]:
        return [make_task(kind, split=Split.EVALUATION, seed=self.seed, index=i) for i in indices]

    def needles(self, source: DocumentSource, length: int, depth: float, count: int) -> list[Task]:
        ask, split = source.count_tokens, Split.EVALUATION
        return [
            make_needle(ask, split=split, seed=self.seed, index=i, length=length, depth=depth) for i in range(count)
        ]

    @property
    def num_episodes(self) -> int:
        """Of each model."""
        rows = len(self.kinds) + 2 * (TaskKind.PLAN in self.kinds)
        return rows * self.num_tasks + len(self.lengths) * len(self.depths) * self.num_needles


def needle_row(length: int, depth: float) -> str:
    return f"needle {length} {depth:g}"


@dataclass(slots=True)
class Results:
    """Outcomes by model and row, in the order of the tasks, which is the same for all models."""

    outcomes: dict[str, dict[str, list[Outcome]]] = field(default_factory=dict)

    def add(self, model: str, row: str, outcomes: Sequence[Outcome]) -> None:
        self.outcomes.setdefault(model, {}).setdefault(row, []).extend(outcomes)


class Players:
    """The models under test; their caches are made for each size of contexts when it is first needed."""

    def __init__(self, folder: Path, stack: ExitStack, *, models: Sequence[str], device: str) -> None:
        self.names = tuple(models)
        self._caches: dict[str, tuple[tuple[int, int], LocalInference]] = {}
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        layout = "bf16" if device != "cpu" else "exact"
        self._models = {}
        for name in models:
            if name == "fp8":
                target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fp8"
                quantize_checkpoint(folder, target)
                self._models[name] = load_transformer(target, layout_name="fp8", dtype=dtype, device=device)
            else:
                topk = EVERY_TOKEN if name == "dense" else None
                self._models[name] = load_transformer(
                    folder, layout_name=layout, dtype=dtype, device=device, index_topk=topk
                )

    def inference(self, name: str, group: Group) -> Inference:
        size = (min(group.batch_size, group.num_tasks), group.max_tokens)
        known = self._caches.get(name)
        if known is None or known[0] != size:
            self._caches.pop(name, None)
            made = LocalInference(self._models[name], num_conversations=size[0], max_tokens=size[1])
            known = self._caches[name] = (size, made)
        return known[1]


class Served:
    """A running system as the only model."""

    names = ("served",)

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    def inference(self, name: str, group: Group) -> Inference:
        return self._inference


def run(
    plan: Plan,
    players: Players | Served,
    tokenizer: Tokenizer,
    console: Console,
    journal: Journal,
    deadline: float = math.inf,
) -> Results:
    """Play everything with every model, except what the journal knows. deadline: of ``time.monotonic``, when to stop
    before the next group; the results are those of complete groups."""
    results = Results()
    source = DocumentSource(tokenizer)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=plan.num_episodes * len(players.names))
        for group in plan.groups(source):
            known = {name: journal.outcomes(name, group.name, group.first) for name in players.names}
            if time.monotonic() >= deadline and None in known.values():
                continue
            for name, outcomes in known.items():
                progress.update(bar, description=f"{name}: {group.name}")
                if outcomes is None:
                    episodes = opened(group, tokenizer)
                    outcomes = play(episodes, players.inference(name, group), batch_size=group.batch_size)
                    journal.add(name, group.name, group.first, outcomes)
                results.add(name, group.name, outcomes)
                progress.advance(bar, len(outcomes))
    return results


def opened(group: Group, tokenizer: Tokenizer) -> list[Episode]:
    """Episodes of a group, up to where the model begins."""
    history = History(tokenizer, "evaluation")
    episodes = [Episode(task, tokenizer, history, keeps_reasoning=group.keeps_reasoning) for task in group.make()]
    if group.given:
        for episode in episodes:
            episode.take(gold_outputs(episode.task, tokenizer)[0])
    return episodes


def recall_by_length(plan: Plan, checkpoint: Path, tokenizer: Tokenizer, device: str) -> dict[int, list[LayerRecall]]:
    """The indexer's recall on needle prompts of each length."""
    model, source = load_model(checkpoint, device=device), DocumentSource(tokenizer)
    measured = {}
    for length in plan.lengths:
        make = partial(plan.needles, source, length, 0.5, _RECALL_PROMPTS)
        group = Group(name="recall", make=make, num_tasks=_RECALL_PROMPTS, batch_size=_RECALL_PROMPTS)
        prompts = [episode.prompt() for episode in opened(group, tokenizer)]
        measured[length] = indexer_recall(model, prompts)
    return measured


def main(
    checkpoint: Annotated[Path, typer.Option(help="folder of the model")] = Path("checkpoints/tiny-agent"),
    served: Annotated[str, typer.Option(help="host:port of a running system to ask instead")] = "",
    api_key: Annotated[str | None, typer.Option(help="of the running system")] = None,
    tasks: Annotated[int, typer.Option(help="of each kind")] = 2000,
    needles: Annotated[int, typer.Option(help="of each length and depth")] = 100,
    max_length: Annotated[int, typer.Option(help="of needles' documents, tokens")] = LENGTHS[-1],
    models: Annotated[
        str, typer.Option(help="of sparse, dense, fp8; the first is compared with the others")
    ] = ",".join(MODELS),
    seed: Annotated[int, typer.Option(help="of the tasks")] = 4,
    stop_after_s: Annotated[
        float, typer.Option(help="begin no more groups of tasks then; run again to go on")
    ] = math.inf,
    out: Annotated[Path, typer.Option(help="folder for evaluation.json and evaluation.png")] = Path(".run/evaluation"),
) -> None:
    """Evaluate a checkpoint."""
    names = tuple(models.split(","))
    if unknown := [name for name in names if name not in MODELS]:
        raise typer.BadParameter(f"{unknown[0]} is no model; use {', '.join(MODELS)}", param_hint="--models")
    console, began = Console(), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = tuple(length for length in LENGTHS if length <= max_length)
    at_once = 1024 if device == "cuda" else 16  # caches of 13 GB a model on a GPU, in bfloat16, and 0.5 GB on a CPU
    plan = Plan(seed=seed, num_tasks=tasks, num_needles=needles, lengths=lengths, batch_size=at_once)
    subject: dict[str, Any] = {"seed": seed, "tasks": tasks, "needles": needles, "lengths": lengths}
    subject["model"] = served or model_fingerprint(checkpoint)
    try:
        journal = Journal(out, subject)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    with ExitStack() as stack:
        if served:
            inference = ServedInference(served, api_key=api_key)
            stack.callback(inference.close)
            tokenizer, recalls = Tokenizer.load(TOKENIZER), {}
            results = run(plan, Served(inference), tokenizer, console, journal, began + stop_after_s)
        else:
            tokenizer = Tokenizer.load(checkpoint)
            players = Players(checkpoint, stack, models=names, device=device)
            results = run(plan, players, tokenizer, console, journal, began + stop_after_s)
            recalls = recall_by_length(plan, checkpoint, tokenizer, device)
    report = Report.of(
        results.outcomes, recalls, source=served or str(checkpoint), seed=seed, seconds=time.monotonic() - began
    )
    report.print(console)
    write_report(report, out)
    console.print(f"{out}/evaluation.json, {out}/evaluation.png")


if __name__ == "__main__":
    typer.run(main)
