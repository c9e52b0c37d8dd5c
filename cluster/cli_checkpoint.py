"""``seamount checkpoint``: commands that write checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

checkpoint_app = typer.Typer(help="Make checkpoints.", no_args_is_help=True)


@checkpoint_app.command("init")
def checkpoint_init(
    path: Annotated[Path, typer.Argument(help="New folder.")],
    seed: Annotated[int, typer.Option(help="The same one gives the same bytes.")] = 0,
    geometry: Annotated[str, typer.Option(help="demo (sizes that GPU kernels fit) or test (smaller).")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    fp8: Annotated[bool, typer.Option("--fp8", help="Projections in FP8 with block scales.")] = False,
) -> None:
    """Write a tiny random model with a byte-level tokenizer, in the format of the real checkpoint.

    \b
    Examples:
      seamount checkpoint init checkpoints/mine --seed 1
      seamount checkpoint init /tmp/small --geometry test --dtype float32
    """
    from seamount.cluster.checkpoint import init_checkpoint

    console = Console()
    with console.status(f"writing {path}"):
        init_checkpoint(path, seed=seed, geometry=geometry, dtype=dtype, fp8=fp8)
    console.print(f"wrote {path}", markup=False, highlight=False)


@checkpoint_app.command("quantize")
def checkpoint_quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a bfloat16 or float32 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a checkpoint's FP8 form: projections as e4m3 with a power-of-two scale a block of 128 x 128.

    Embedding, head, gate, norms and projections that are no whole blocks stay as they are; other files are copied.

    \b
    Examples:
      seamount checkpoint quantize checkpoints/mine checkpoints/mine-fp8
    """
    from seamount.cluster.terminal import ReadingBar
    from seamount.workers.model.quantize_checkpoint import quantize_checkpoint

    console = Console()
    with ReadingBar(console, f"quantising {source}") as bar:
        quantize_checkpoint(source, target, progress=bar.show)
    console.print(f"wrote {target}", markup=False, highlight=False)
