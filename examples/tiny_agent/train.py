"""Trains tiny-agent in runs that stop and resume.

The same command again goes on where the folder stands, through the stages dense, anneal, long, indexer, sparse,
sparse_long and reinforce.

Started by torchrun, one process a GPU shares every step's sequences; the steps stay the same.

A run writes a Hugging Face checkpoint of its weights, training.json (where it stands) and metrics.jsonl into its
folder: under 30 MB, in files under 16 MiB. The optimiser's moments are not saved: a resumed run raises the learning
rates anew over a few steps. The folder can be served; before the sparse stage its indexers select at random.
"""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

  python -m examples.tiny_agent.train --out runs/tiny-agent --minutes 9

  torchrun --standalone --nproc-per-node 2 -m examples.tiny_agent.train --out runs/tiny-agent

  python -m examples.tiny_agent.train --out runs/sparse --stage sparse --resume runs/indexer
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class StageName(enum.Enum):
    """In their order."""

    DENSE = "dense"
    ANNEAL = "anneal"
    LONG = "long"
    INDEXER = "indexer"
    SPARSE = "sparse"
    SPARSE_LONG = "sparse_long"
    REINFORCE = "reinforce"


@app.command(help=__doc__, epilog=EPILOG)
def main(
    out: Annotated[Path, typer.Option(help="Folder to write to; a run that stands there is resumed.")],
    stage: Annotated[StageName | None, typer.Option(help="This one alone. Default: all that are left.")] = None,
    last: Annotated[StageName, typer.Option(help="The last one to run.")] = StageName.REINFORCE,
    resume: Annotated[Path | None, typer.Option(help="Folder to resume from instead, written by another run.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long, start-up included.")] = 9.0,
    steps: Annotated[int, typer.Option(help="Stop after so many steps of a stage.")] = 1_000_000,
    until: Annotated[
        list[str] | None,
        typer.Option(help="STAGE=MINUTES: be done with it by then, after fewer steps if need be; repeat for others."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the batches and whatever is drawn.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that make batches, for each GPU; 0: none but this one.")] = 14,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    began = time.monotonic()
    ends = dict(_until(text, began) for text in until or ())
    # Here, because the processes that make batches import this module, and should not have to import torch.
    from examples.tiny_agent.running import Limits, run

    limits = Limits(
        last=(stage or last).value, seed=seed, deadline=began + 60 * minutes, ends=ends, steps=steps, workers=workers
    )
    run(out, resume, None if stage is None else stage.value, limits, device)


def _until(text: str, began: float) -> tuple[str, float]:
    name, _, minutes = text.partition("=")
    try:
        return StageName(name).value, began + 60 * float(minutes)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no STAGE=MINUTES; for example dense=4.5", param_hint="--until") from None


if __name__ == "__main__":
    app()
