"""A run of the trainer: the stages that are left, from where its folder stands until its time is up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from examples.tiny_agent.config import model_config
from examples.tiny_agent.data import batches
from examples.tiny_agent.export import load_checkpoint
from examples.tiny_agent.model import Model
from examples.tiny_agent.parallel import Ranks
from examples.tiny_agent.progress import STATE, OnMetrics, Recorder, progress_bar
from examples.tiny_agent.reinforce import STAGE as REINFORCE
from examples.tiny_agent.reinforce import STEPS, Reinforcement
from examples.tiny_agent.stages import STAGES
from examples.tiny_agent.training import Training

ORDER = (*STAGES, REINFORCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """last: the stage to stop behind. seed: of batches, drawn rows, tasks and samples. deadline: on the monotonic
    clock; ends: when stages are to be done, by name. steps: of a stage in this run at the most. workers: processes that
    make batches, for each rank."""

    last: str
    seed: int
    deadline: float
    ends: Mapping[str, float]
    steps: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The stage to go on with, at a step of it; the runs that led here."""

    stage: str
    step: int
    runs: list[dict[str, Any]]


def run(out: Path, resume: Path | None, stage: str | None, limits: Limits, device: str) -> None:
    """Go on with ``stage`` alone, or with all that are left. resume: a folder to start from, None for ``out`` itself.

    Raises BadParameter for a folder that cannot be resumed, and for a stage that is not next.
    """
    if resume is None and (out / STATE).exists():
        resume = out
    ranks = Ranks.join(device)
    torch.manual_seed(limits.seed)
    model = Model(model_config())
    standing = Standing(stage=ORDER[0], step=0, runs=[]) if resume is None else _resumed(model, resume)
    if stage is not None and stage != standing.stage:
        told = f"stage {standing.stage} is next, at step {standing.step}"
        raise typer.BadParameter(f"{told}; {stage} cannot be run now", param_hint="--stage")
    model.to(device)
    with progress_bar(disable=ranks.rank > 0) as bar:
        recorder = Recorder(model, out, seed=limits.seed, earlier_runs=standing.runs, bar=bar, ranks=ranks)
        step = standing.step
        for name in ORDER[ORDER.index(standing.stage) :]:
            total = _total(name)
            recorder.begin(name, step, total)
            step, done = _run_stage(model, name, step, limits, ranks, recorder.metrics)
            recorder.end(step, done=done)
            if name == limits.last or not done:
                break
            step = 0
    ranks.leave()


def _total(stage: str) -> int:
    return STEPS if stage == REINFORCE else STAGES[stage].steps


def _run_stage(
    model: Model, stage: str, step: int, limits: Limits, ranks: Ranks, on_metrics: OnMetrics
) -> tuple[int, bool]:
    """From a step of the stage on; returns the step reached, and whether the stage is done."""
    if stage == REINFORCE:
        return _reinforce(model, step, limits, ranks, on_metrics)
    plan = STAGES[stage]
    training = Training(model, plan, seed=limits.seed, step=step, ranks=ranks)
    feeding = batches(
        seed=limits.seed * len(ORDER) + ORDER.index(stage),  # each stage sees documents of its own
        sequence_length=plan.sequence_length,
        batch_size=ranks.share(plan.batch_size),
        mixture=plan.mixture,
        num_workers=limits.workers,
        first_batch=step * ranks.size + ranks.rank,
        stride=ranks.size,
    )
    with closing(feeding):
        training.run(
            feeding,
            deadline=limits.deadline,
            max_steps=limits.steps,
            end=limits.ends.get(stage),
            on_metrics=on_metrics,
        )
    return training.step, training.done


def _reinforce(model: Model, step: int, limits: Limits, ranks: Ranks, on_metrics: OnMetrics) -> tuple[int, bool]:
    stage = Reinforcement(model, seed=limits.seed, num_workers=limits.workers, ranks=ranks)
    end = limits.ends.get(REINFORCE, float("inf"))
    return stage.run(step, max_steps=limits.steps, deadline=limits.deadline, end=end, on_metrics=on_metrics)


def _resumed(model: Model, folder: Path) -> Standing:
    """Loads the weights of a run."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        load_checkpoint(model, folder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--resume") from error
    at = ORDER.index(state["stage"])
    if not state["done"]:
        return Standing(stage=state["stage"], step=state["step"], runs=state["runs"])
    if at + 1 == len(ORDER):
        raise typer.BadParameter(f"all stages are done in {folder}", param_hint="--resume")
    return Standing(stage=ORDER[at + 1], step=0, runs=state["runs"])
