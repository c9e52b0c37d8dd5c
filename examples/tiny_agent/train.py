"""Trains tiny-agent, one stage at a time, in runs that stop and resume.

A run writes a Hugging Face checkpoint of its weights, ``training.json`` (where the stage stands) and ``metrics.jsonl``
into its folder: under 30 MB, in files under 16 MiB. The optimiser's moments are not saved: a resumed run raises the
learning rates anew over a few steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.tiny_agent.config import model_config
from examples.tiny_agent.data import batches
from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.export import load_checkpoint, save_checkpoint, write_json
from examples.tiny_agent.model import Model
from examples.tiny_agent.reinforce import STEPS, Reinforcement, draw_attempts, reward
from examples.tiny_agent.stages import STAGES
from examples.tiny_agent.training import Training, append_json_line
from seamount.router.tokenizer import Tokenizer

EPILOG = """Examples:

  python -m examples.tiny_agent.train --stage dense --minutes 9 --out runs/dense-1

  python -m examples.tiny_agent.train --stage dense --minutes 9 --resume runs/dense-1 --out runs/dense-2

  python -m examples.tiny_agent.train --stage indexer --resume runs/dense-4 --out runs/indexer

  python -m examples.tiny_agent.train --stage sparse --minutes 9 --resume runs/indexer --out runs/sparse

  python -m examples.tiny_agent.train --stage reinforce --minutes 9 --resume runs/sparse --out checkpoints/tiny-agent
"""
STATE = "training.json"
REINFORCE = "reinforce"
ORDER = (*STAGES, REINFORCE)
OnMetrics = Callable[[dict[str, Any]], None]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """seed: of batches, drawn rows, tasks and samples. step: of the stage, from which the run goes on. deadline: on
    the monotonic clock. steps: of this run at the most."""

    seed: int
    step: int
    deadline: float
    steps: int
    workers: int


@app.command(help=__doc__, epilog=EPILOG)
def main(
    stage: Annotated[str, typer.Option(help=f"One of {', '.join(ORDER)}, in this order.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; it may be the one resumed from.")],
    resume: Annotated[Path | None, typer.Option(help="Folder of an earlier run, of this stage or the last.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long, start-up included.")] = 9.0,
    steps: Annotated[int, typer.Option(help="Stop after so many steps of this run.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the batches and whatever is drawn.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that make batches; 0 makes them in this one.")] = 14,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    started = time.monotonic()
    if stage not in ORDER:
        raise typer.BadParameter(f"{stage!r} is unknown; choose one of {', '.join(ORDER)}", param_hint="--stage")
    if resume is None and stage != ORDER[0]:
        raise typer.BadParameter(f"stage {stage} starts from an earlier one", param_hint="--resume")
    total = STEPS if stage == REINFORCE else STAGES[stage].steps
    torch.manual_seed(seed)
    model = Model(model_config())
    step, history = (0, []) if resume is None else _resumed(model, resume, stage)
    if step >= total:
        raise typer.BadParameter(f"stage {stage} is done in {resume}: {step} steps", param_hint="--resume")
    model.to(device)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(seed=seed, step=step, deadline=started + 60 * minutes, steps=min(steps, total - step), workers=workers)
    with _progress() as progress:
        bar = progress.add_task(stage, total=total, completed=step, figures="compiling")

        def on_metrics(metrics: dict[str, Any]) -> None:
            append_json_line(out / "metrics.jsonl", metrics)
            progress.update(bar, completed=metrics["step"], figures=_figures(metrics))

        reached = _reinforce(model, run, on_metrics) if stage == REINFORCE else _train(model, stage, run, on_metrics)
    save_checkpoint(model, out, TOKENIZER)
    entry = {"stage": stage, "steps": [step, reached], "seed": seed, "seconds": round(time.monotonic() - started)}
    write_json(out / STATE, {"stage": stage, "step": reached, "done": reached == total, "runs": [*history, entry]})
    Console().print(f"{stage}: {reached} of {total} steps; saved in {out}")


def _train(model: Model, stage: str, run: Run, on_metrics: OnMetrics) -> int:
    plan = STAGES[stage]
    training = Training(model, plan, seed=run.seed, step=run.step)
    feeding = batches(
        seed=run.seed,
        sequence_length=plan.sequence_length,
        batch_size=plan.batch_size,
        mixture=plan.mixture,
        num_workers=run.workers,
        first_batch=run.step,
    )
    with closing(feeding):
        training.run(feeding, deadline=run.deadline, max_steps=run.steps, on_metrics=on_metrics)
    return training.step


def _reinforce(model: Model, run: Run, on_metrics: OnMetrics) -> int:
    tokenizer = Tokenizer.load(TOKENIZER)
    reinforcement = Reinforcement(model, seed=run.seed * 1_000_003 + run.step)
    step, last = run.step, run.step + run.steps
    while step < last and time.monotonic() < run.deadline:
        began = time.monotonic()
        metrics = reinforcement.step(draw_attempts(step, seed=run.seed, tokenizer=tokenizer), reward)
        step += 1
        seconds = round(time.monotonic() - began, 2)
        on_metrics({"stage": REINFORCE, "step": step, **metrics, "seconds": seconds})
    return step


def _resumed(model: Model, folder: Path, stage: str) -> tuple[int, list[dict[str, Any]]]:
    """Loads the weights; the step of the stage to go on at, and the runs so far."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        load_checkpoint(model, folder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--resume") from error
    if state["stage"] == stage:
        return state["step"], state["runs"]
    if not state["done"] or ORDER.index(state["stage"]) != ORDER.index(stage) - 1:
        told = f"{folder} stands at step {state['step']} of stage {state['stage']}"
        raise typer.BadParameter(f"{told}; stage {stage} cannot go on from there", param_hint="--resume")
    return 0, state["runs"]


def _progress() -> Progress:
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, TextColumn("{task.fields[figures]}"))


def _figures(metrics: dict[str, Any]) -> str:
    names = ("loss", "accuracy", "divergence", "reward")
    values = [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
    if "tokens_per_s" in metrics:
        values += [f"{metrics['tokens_per_s'] / 1e6:.2f} M tokens/s", f"MFU {metrics['mfu']:.0%}"]
    return ", ".join(values)


if __name__ == "__main__":
    app()
