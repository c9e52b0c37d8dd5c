"""Writes packed training documents to a folder, for runs that should not make their own.

    python -m examples.tiny_agent.corpus --out DIR --tokens 100000000 --workers 8 --seed 1

One file a batch, ``batch-00000000.npz``: ``tokens`` [B, T] uint16, ``loss_mask`` [B, ceil(T / 8)] uint8 (bits),
``lengths`` [documents] int32 of all rows one after the other, ``documents_per_row`` [B] int32. ``read`` gives them back
as batches, in order.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from examples.tiny_agent.data import Batch, BatchShape, PackedBatch, begin_worker, packed_batch, unpacked
from examples.tiny_agent.documents import LONG, SHORT

MIXTURES = {mixture.name: mixture for mixture in (SHORT, LONG)}


def write_batch(shape: BatchShape, folder: Path, index: int) -> int:
    """Makes batch ``index`` and writes it, unless it is there already; returns its number of tokens."""
    path = folder / f"batch-{index:08}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return int(stored["lengths"].sum())
    packed = packed_batch(shape, index)
    lengths = np.array([length for row in packed.lengths for length in row], np.int32)
    partial_path = path.with_suffix(".partial.npz")
    np.savez(
        partial_path,
        tokens=packed.tokens,
        loss_mask=packed.loss_mask,
        lengths=lengths,
        documents_per_row=np.array([len(row) for row in packed.lengths], np.int32),
    )
    partial_path.rename(path)
    return int(lengths.sum())


def read(folder: Path) -> Iterator[Batch]:
    """The batches of a folder, in order."""
    for path in sorted(folder.glob("batch-????????.npz")):
        with np.load(path, allow_pickle=False) as stored:
            ends = np.cumsum(stored["documents_per_row"])[:-1]
            lengths = [row.tolist() for row in np.split(stored["lengths"], ends)]
            yield unpacked(PackedBatch(stored["tokens"], stored["loss_mask"], lengths))


def main(
    out: Annotated[Path, typer.Option(help="folder to write to; batches that are there are kept")],
    tokens: Annotated[int, typer.Option(help="number of tokens, at least")] = 10_000_000,
    workers: Annotated[int, typer.Option(help="processes")] = 1,
    seed: Annotated[int, typer.Option(help="of the documents")] = 1,
    sequence_length: Annotated[int, typer.Option(help="tokens of a row")] = 2048,
    batch_size: Annotated[int, typer.Option(help="rows of a file")] = 64,
    mixture: Annotated[str, typer.Option(help="short or long")] = SHORT.name,
) -> None:
    """Write a corpus."""
    if mixture not in MIXTURES:
        raise typer.BadParameter(f"{mixture} is no mixture; use {' or '.join(MIXTURES)}", param_hint="--mixture")
    out.mkdir(parents=True, exist_ok=True)
    shape = BatchShape(seed=seed, sequence_length=sequence_length, batch_size=batch_size, mixture=MIXTURES[mixture])
    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[rate]}"))
    with (
        Progress(*columns) as progress,
        multiprocessing.get_context("spawn").Pool(workers, initializer=begin_worker) as pool,
    ):
        bar = progress.add_task("tokens", total=tokens, rate="")
        written = 0
        for count in pool.imap(partial(write_batch, shape, out), _indices(tokens, shape)):
            written += count
            speed = progress.tasks[0].speed or 0.0
            progress.update(bar, completed=min(written, tokens), rate=f"{speed / 1e3:.0f}K tokens/s")
    typer.echo(f"{written} tokens in {out}")


def _indices(tokens: int, shape: BatchShape) -> range:
    """So many batches that they hold ``tokens`` tokens even where a few places stay empty."""
    return range(-(-tokens * 21 // (20 * shape.batch_size * shape.sequence_length)))


if __name__ == "__main__":
    typer.run(main)
