"""Trains tiny-agent, one stage at a time, in runs that stop and resume.

A run writes a Hugging Face checkpoint of its weights, ``training.json`` (where the stage stands) and ``metrics.jsonl``
into its folder: under 30 MB, in files under 16 MiB. The optimiser's moments are not saved: a resumed run raises the
learning rates anew over a few steps.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
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
from examples.tiny_agent.stages import STAGES, Stage
from examples.tiny_agent.training import Training, append_json_line

EPILOG = """Examples:

  python -m examples.tiny_agent.train --stage dense --minutes 9 --out runs/dense-1

  python -m examples.tiny_agent.train --stage dense --minutes 9 --resume runs/dense-1 --out runs/dense-2

  python -m examples.tiny_agent.train --stage indexer --resume runs/dense-4 --out runs/indexer

  python -m examples.tiny_agent.train --stage sparse --minutes 9 --resume runs/indexer --out checkpoints/tiny-agent
"""
STATE = "training.json"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__, epilog=EPILOG)
def main(
    stage: Annotated[str, typer.Option(help="One of dense, indexer, sparse, in this order.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; it may be the one resumed from.")],
    resume: Annotated[Path | None, typer.Option(help="Folder of an earlier run, of this stage or the last.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long, start-up included.")] = 9.0,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps of this run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the batches and the drawn rows.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that make batches; 0 makes them in this one.")] = 14,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    started = time.monotonic()
    if stage not in STAGES:
        raise typer.BadParameter(f"{stage!r} is unknown; choose one of {', '.join(STAGES)}", param_hint="--stage")
    if resume is None and stage != "dense":
        raise typer.BadParameter(f"stage {stage} starts from an earlier one", param_hint="--resume")
    plan = STAGES[stage]
    torch.manual_seed(seed)
    model = Model(model_config())
    step, history = 0, []
    if resume is not None:
        step, history = _resumed(model, resume, plan)
    if step >= plan.steps:
        raise typer.BadParameter(f"stage {stage} is done in {resume}: {step} steps", param_hint="--resume")
    training = Training(model.to(device), plan, seed=seed, step=step)
    out.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        bar = progress.add_task(stage, total=plan.steps, completed=step, figures="compiling")

        def on_metrics(metrics: dict[str, Any]) -> None:
            append_json_line(out / "metrics.jsonl", metrics)
            progress.update(bar, completed=metrics["step"], figures=_figures(metrics))

        feeding = batches(
            seed=seed,
            sequence_length=plan.sequence_length,
            batch_size=plan.batch_size,
            mixture=plan.mixture,
            num_workers=workers,
            first_batch=step,
        )
        with closing(feeding):
            training.run(feeding, deadline=started + 60 * minutes, max_steps=steps, on_metrics=on_metrics)
    save_checkpoint(model, out, TOKENIZER)
    run = {"stage": stage, "steps": [step, training.step], "seed": seed, "seconds": round(time.monotonic() - started)}
    state = {"stage": stage, "step": training.step, "done": training.step == plan.steps, "runs": [*history, run]}
    write_json(out / STATE, state)
    Console().print(f"{stage}: {training.step} of {plan.steps} steps; saved in {out}")


def _resumed(model: Model, folder: Path, stage: Stage) -> tuple[int, list[dict[str, Any]]]:
    """Loads the weights; the step of the stage to go on at, and the runs so far."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        load_checkpoint(model, folder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--resume") from error
    order = list(STAGES)
    before = order.index(stage.name) - 1
    if state["stage"] == stage.name:
        return state["step"], state["runs"]
    if before < 0 or state["stage"] != order[before] or not state["done"]:
        told = f"{folder} stands at step {state['step']} of stage {state['stage']}"
        raise typer.BadParameter(f"{told}; stage {stage.name} cannot go on from there", param_hint="--resume")
    return 0, state["runs"]


def _progress() -> Progress:
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, TextColumn("{task.fields[figures]}"))


def _figures(metrics: dict[str, Any]) -> str:
    names = ("loss", "accuracy", "divergence")
    values = [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
    return ", ".join([*values, f"{metrics['tokens_per_s'] / 1e6:.2f} M tokens/s", f"MFU {metrics['mfu']:.0%}"])


if __name__ == "__main__":
    app()
