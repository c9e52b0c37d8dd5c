"""A checkpoint served by the whole system against the same one in this process: equal tokens, needles found.

    python -m examples.tiny_agent.parity --tasks 200 --needles 5             (``make eval-served``)

The system is routers, a prefill rank and a decode gang of two as plain processes of this machine. Both sides are greedy
and get the same prompts, which go on with what this process says. In float64 with the ``exact`` layout the tokens must
be equal; in float32 rounding may tip a close choice, and the first difference is told.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from examples.tiny_agent.documents import DocumentSource
from examples.tiny_agent.episodes import Episode, Inference, Outcome, play
from examples.tiny_agent.inference import LocalInference, ServedInference, load_transformer
from examples.tiny_agent.suite import DEPTHS, SHORT_CONTEXT, Group, Suite
from examples.tiny_agent.turns import TaskKind
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import Settings, validate
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer

NEEDLE_LENGTH = 8192
_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token at which two outputs to a prompt part; None: an output ended."""

    num_prompt_tokens: int
    at: int
    first: int | None
    second: int | None


@dataclass(slots=True)
class Twofold:
    """Two models that are asked the same, side by side; conversations go on with what the first one says."""

    first: Inference
    second: Inference
    num_outputs: int = 0
    num_tokens: int = 0
    differences: list[Difference] = field(default_factory=list)

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        """See ``episodes.Inference``."""
        with ThreadPoolExecutor(1) as thread:
            later = thread.submit(self.second.generate, prompts, max_output_tokens=max_output_tokens)
            ours = self.first.generate(prompts, max_output_tokens=max_output_tokens)
            theirs = later.result()
        for number, prompt in prompts.items():
            self.num_outputs += 1
            self.num_tokens += len(ours[number])
            if ours[number] != theirs[number]:
                self.differences.append(_difference(len(prompt), ours[number], theirs[number]))
        return ours


def _difference(num_prompt_tokens: int, first: Sequence[int], second: Sequence[int]) -> Difference:
    same = next((i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), None)
    at = min(len(first), len(second)) if same is None else same
    ours, theirs = (side[at] if at < len(side) else None for side in (first, second))
    return Difference(num_prompt_tokens=num_prompt_tokens, at=at, first=ours, second=theirs)


def served_settings(checkpoint: Path, folder: Path, layout: str, dtype: str, threads: int) -> Settings:
    """Every prompt goes to the prefill rank. folder: for logs and Redis."""
    return validate(
        {
            "run_dir": str(folder),
            "redis": {"data_dir": str(folder / "redis")},
            "model": {"path": str(checkpoint), "name": "tiny-agent"},
            "cache": {"layout": layout, "dtype": dtype, "num_pages": 512},
            "engine": {
                "max_context_tokens": 12_288,
                "prefill_chunk_tokens": 128,
                "step_timeout_s": 120,
                "num_threads": threads,
            },
            "placement": {"path": "remote"},
            "router": {"port": 0},
        }
    )


def held_out(groups: Iterable[Group], tokenizer: Tokenizer, max_tokens: int) -> list[Episode]:
    """The episodes of groups, without those whose first prompt is longer than ``max_tokens``."""
    source, history = DocumentSource(tokenizer), History(tokenizer, "parity")
    episodes = (episode for group in groups for episode in group.episodes(tokenizer, source, history))
    return [episode for episode in episodes if len(episode.prompt()) <= max_tokens]


def compare(
    checkpoint: Path, address: str, episodes: Sequence[Episode], dtype: torch.dtype
) -> Iterator[tuple[Twofold, list[Outcome]]]:
    """Play episodes with the model in this process and with the system at ``address``, a few at a time."""
    model = load_transformer(checkpoint, layout_name="exact", dtype=dtype, device="cpu")
    local = LocalInference(model, num_conversations=_AT_ONCE, max_tokens=SHORT_CONTEXT)
    with closing(ServedInference(address, num_streams=_AT_ONCE)) as served:
        for first in range(0, len(episodes), _AT_ONCE):
            both = Twofold(local, served)
            yield both, play(episodes[first : first + _AT_ONCE], both, batch_size=_AT_ONCE)


def find_needles(address: str, numbers: range, seed: int, tokenizer: Tokenizer) -> list[Outcome]:
    """Needles of ``NEEDLE_LENGTH`` tokens, one after the other, each at another depth."""
    groups = [
        Group(
            row="",
            kind=TaskKind.NEEDLE,
            seed=seed,
            first=number,
            num_tasks=1,
            length=NEEDLE_LENGTH,
            depth=DEPTHS[number % len(DEPTHS)],
        )
        for number in numbers
    ]
    with closing(ServedInference(address, num_streams=1)) as served:
        return play(held_out(groups, tokenizer, 2 * NEEDLE_LENGTH), served, batch_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What both sides said to held-out tasks."""

    dtype: str
    num_tasks: int
    num_done: int
    num_outputs: int
    num_tokens: int
    num_different: int
    first_difference: Difference | None
    seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """What the served model found in documents of ``length`` tokens."""

    length: int
    num_needles: int
    num_found: int
    seconds: int


async def compare_tasks(
    checkpoint: Path, dtype: str, tasks: range, seed: int, threads: int, tell: Callable[[Compared], None]
) -> None:
    """Tasks of all kinds in turns, those whose prompts stay below 2K tokens, in the ``exact`` layout."""
    suite = Suite(seed=seed, num_tasks=tasks.stop, num_needles=0, group_size=1)
    groups = (group for group in suite.groups() if group.row == group.kind.value)
    episodes = held_out(islice(groups, tasks.start, tasks.stop), Tokenizer.load(checkpoint), 1536)

    def play_all(address: str) -> None:
        began = time.monotonic()
        for both, outcomes in compare(checkpoint, address, episodes, getattr(torch, dtype)):
            result = Compared(
                dtype=dtype,
                num_tasks=len(outcomes),
                num_done=sum(one.succeeded for one in outcomes),
                num_outputs=both.num_outputs,
                num_tokens=both.num_tokens,
                num_different=len(both.differences),
                first_difference=next(iter(both.differences), None),
                seconds=round(time.monotonic() - began),
            )
            tell(result)
            began = time.monotonic()

    with tempfile.TemporaryDirectory() as scratch:
        settings = served_settings(checkpoint, Path(scratch), "exact", dtype, threads)
        async with LocalCluster(settings=settings) as cluster:
            await asyncio.to_thread(play_all, cluster.address)


async def look_for_needles(checkpoint: Path, numbers: range, seed: int, threads: int) -> Needles:
    """In float32 and with the default layout."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        settings = served_settings(checkpoint, Path(scratch), "bf16", "float32", threads)
        async with LocalCluster(settings=settings) as cluster:
            tokenizer = Tokenizer.load(checkpoint)
            outcomes = await asyncio.to_thread(find_needles, cluster.address, numbers, seed, tokenizer)
    return Needles(
        length=NEEDLE_LENGTH,
        num_needles=len(outcomes),
        num_found=sum(one.succeeded for one in outcomes),
        seconds=round(time.monotonic() - began),
    )


def main(
    checkpoint: Annotated[Path, typer.Option(help="folder of the model")] = Path("checkpoints/tiny-agent"),
    tasks: Annotated[int, typer.Option(help="of all kinds together")] = 200,
    needles: Annotated[int, typer.Option(help=f"of {NEEDLE_LENGTH} tokens; minutes each")] = 5,
    first: Annotated[int, typer.Option(help="number of the first task, and of the first needle")] = 0,
    dtype: Annotated[str, typer.Option(help="of the tasks: float64 or float32")] = "float64",
    threads: Annotated[int, typer.Option(help="of each rank, and of this process")] = 1,
    seed: Annotated[int, typer.Option(help="of the tasks")] = 4,
    out: Annotated[Path | None, typer.Option(help="file to which the results are added, a line of JSON each")] = None,
) -> None:
    """Compare the served model with the one in this process. Exit code 1 where something does not hold."""
    if dtype not in ("float64", "float32"):
        raise typer.BadParameter(f"{dtype} is none of float64, float32", param_hint="--dtype")
    torch.set_num_threads(threads)
    results: list[Compared | Needles] = []

    def tell(result: Compared | Needles) -> None:
        results.append(result)
        Console().print(result)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")

    if tasks:
        asyncio.run(compare_tasks(checkpoint, dtype, range(first, first + tasks), seed, threads, tell))
    if needles:
        tell(asyncio.run(look_for_needles(checkpoint, range(first, first + needles), seed, threads)))
    if not all(map(_holds, results)):
        raise typer.Exit(1)


def _holds(result: Compared | Needles) -> bool:
    if isinstance(result, Needles):
        return result.num_found == result.num_needles
    return result.num_different == 0 or result.dtype != "float64"


if __name__ == "__main__":
    typer.run(main)
