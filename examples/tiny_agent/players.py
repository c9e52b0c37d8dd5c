"""Models that play groups of tasks, in this process or in several, each with a share of a GPU."""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from examples.tiny_agent.documents import DocumentSource
from examples.tiny_agent.episodes import MAX_OUTPUT_TOKENS, Episode, Outcome
from examples.tiny_agent.inference import EVERY_TOKEN, load_transformer
from examples.tiny_agent.rollouts import Rollouts, Work
from examples.tiny_agent.suite import Group
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer
from seamount.workers.model.transformer import Transformer

_SPAWN = multiprocessing.get_context("spawn")
MODELS = ("sparse", "dense", "fp8")
_ADMITTED_AT_ONCE = 32
"""Episodes that begin before the others get their next token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Groups that one model plays over caches of one size. num_conversations: at one time, of a process."""

    model: str
    groups: tuple[Group, ...]
    num_conversations: int

    @property
    def max_tokens(self) -> int:
        return max(group.max_tokens for group in self.groups)

    @property
    def work(self) -> int:
        """Roughly, in tokens of a long prompt: a conversation of 200 sampled tokens takes as long as 700 of those."""
        return sum(group.num_tasks * (group.length or 700) for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The folders of the bfloat16 form and of the FP8 form."""

    plain: Path
    fp8: Path

    def load(self, name: str, device: str) -> Transformer:
        """``sparse`` as it is served, ``dense`` with every token selected, ``fp8`` with FP8 weights and caches."""
        on_cpu = device == "cpu"
        layout = "fp8" if name == "fp8" else ("exact" if on_cpu else "bf16")
        return load_transformer(
            self.fp8 if name == "fp8" else self.plain,
            layout_name=layout,
            dtype=torch.float32 if on_cpu else torch.bfloat16,
            device=device,
            index_topk=EVERY_TOKEN if name == "dense" else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A group that is over. outcomes: in the order of its tasks."""

    model: str
    group: Group
    outcomes: list[Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a process computed for a lane, and how long it took."""

    model: str
    max_tokens: int
    work: Work
    seconds: float


Told = Played | Pace
Job = Callable[[Callable[[Any], None]], None]
"""What a process does; it gets the function to tell with."""
Take = Callable[[int], int | None]
"""Of a lane's number: the number of its next group that nobody has played yet, None where there is none."""


def play_lanes(
    lanes: Sequence[Lane],
    checkpoints: Checkpoints,
    device: str,
    take: Take,
    tell: Callable[[Told], None],
    *,
    first: int = 0,
) -> None:
    """Play what ``take`` gives, lane after lane from lane ``first`` on, then those before it. One that fails does not
    keep the others from being played.

    Raises RuntimeError with the errors of those that failed.
    """
    tokenizer = Tokenizer.load(checkpoints.plain)
    errors = []
    for number in (*range(first, len(lanes)), *range(first)):
        lane = lanes[number]
        try:
            _play_lane(lane, checkpoints, device, tokenizer, partial(take, number), tell)
        except Exception:
            errors.append(traceback.format_exc())
    if errors:
        raise RuntimeError("\n".join(errors))


def _play_lane(
    lane: Lane,
    checkpoints: Checkpoints,
    device: str,
    tokenizer: Tokenizer,
    take: Callable[[], int | None],
    tell: Callable[[Told], None],
) -> None:
    first = take()
    if first is None:
        return
    began = time.monotonic()
    rollouts = Rollouts(
        checkpoints.load(lane.model, device), num_conversations=lane.num_conversations, max_tokens=lane.max_tokens
    )
    for group, outcomes in play_groups(_taken(lane, first, take), rollouts, tokenizer):
        tell(Played(model=lane.model, group=group, outcomes=outcomes))
    seconds = time.monotonic() - began
    tell(Pace(model=lane.model, max_tokens=lane.max_tokens, work=rollouts.work, seconds=seconds))


def _taken(lane: Lane, first: int, take: Callable[[], int | None]) -> Iterator[Group]:
    at: int | None = first
    while at is not None:
        yield lane.groups[at]
        at = take()


@dataclass(slots=True)
class _Open:
    """A group being played. outcomes: None where they are still to come."""

    group: Group
    outcomes: list[Outcome | None] = field(default_factory=list)


def play_groups(
    groups: Iterator[Group], rollouts: Rollouts, tokenizer: Tokenizer
) -> Iterator[tuple[Group, list[Outcome]]]:
    """Play greedily; whoever is done makes room for the next one. Groups come back as they are complete."""
    generator = torch.Generator(device="cpu")
    coming = _coming(groups, tokenizer)
    seats = list(range(rollouts.num_conversations))
    playing: dict[int, tuple[_Open, int, Episode]] = {}
    more = True
    while more or playing:
        for _ in range(min(len(seats), _ADMITTED_AT_ONCE) if more else 0):
            if (one := next(coming, None)) is None:
                more = False
                break
            playing[seats[-1]] = one
            rollouts.ask(seats.pop(), one[2].prompt())
        replies = rollouts.step(max_new=MAX_OUTPUT_TOKENS, temperature=0.0, generator=generator)
        for seat, reply in replies.items():
            place, at, episode = playing[seat]
            prompt = _next_prompt(episode, reply.token_ids, rollouts.max_tokens)
            if prompt is not None:
                rollouts.ask(seat, prompt)
                continue
            del playing[seat]
            seats.append(seat)
            place.outcomes[at] = episode.outcome()
            if None not in place.outcomes and len(place.outcomes) == place.group.num_tasks:
                yield place.group, [outcome for outcome in place.outcomes if outcome is not None]


def _coming(groups: Iterator[Group], tokenizer: Tokenizer) -> Iterator[tuple[_Open, int, Episode]]:
    source, history = DocumentSource(tokenizer), History(tokenizer, "evaluation")
    for group in groups:
        place = _Open(group)
        for at, episode in enumerate(group.episodes(tokenizer, source, history)):
            place.outcomes.append(None)
            yield place, at, episode


def _next_prompt(episode: Episode, said: Sequence[int], max_tokens: int) -> list[int] | None:
    """What the model reads next, None if it is over. A prompt that leaves no room is answered by nothing."""
    episode.take(said)
    while not episode.done:
        prompt = episode.prompt()
        if len(prompt) < max_tokens:
            return prompt
        episode.take([])
    return None


def play_jobs(lanes: Sequence[Lane], checkpoints: Checkpoints, devices: Sequence[str], deadline: float) -> list[Job]:
    """``play_lanes`` for processes, one for each of ``devices``, which share the groups among them.

    deadline: of ``time.time``, when to begin no more groups.
    """
    taken = [_SPAWN.Value("q", 0) for _ in lanes]
    firsts = first_lanes([lane.work for lane in lanes], len(devices))
    return [
        partial(_play_in_this, lanes, first, checkpoints, device, taken, deadline)
        for device, first in zip(devices, firsts, strict=True)
    ]


def first_lanes(work: Sequence[int], num_processes: int) -> list[int]:
    """With which lane each process begins: seats by D'Hondt's rule, so that an evaluation that is cut short has played
    the same share of all."""
    seats = [0] * len(work)
    for _ in range(num_processes if work else 0):
        seats[max(range(len(work)), key=lambda lane: work[lane] / (seats[lane] + 1))] += 1
    return [lane for lane, count in enumerate(seats) for _ in range(count)] or [0] * num_processes


def run_jobs(jobs: Sequence[Job], tell: Callable[[Any], None]) -> None:
    """Run each job in a process of its own; what they tell arrives here.

    Raises RuntimeError with the errors of those that failed, after the others are over.
    """
    told: Any = _SPAWN.Queue()
    processes = {number: _SPAWN.Process(target=_run, args=(job, number, told)) for number, job in enumerate(jobs)}
    for process in processes.values():
        process.start()
    errors = []
    while processes:
        try:
            number, message = told.get(timeout=1.0)
        except queue.Empty:
            dead = [number for number, process in processes.items() if process.exitcode not in (None, 0)]
            errors += [f"the process of job {number} died: {processes.pop(number).exitcode}" for number in dead]
            continue
        if isinstance(message, _Over):
            processes.pop(number).join()
            errors += [message.error] if message.error else []
        else:
            tell(message)
    if errors:
        raise RuntimeError("\n".join(errors))


@dataclass(frozen=True, slots=True)
class _Over:
    """The last that a job tells. error: a traceback, empty if all went well."""

    error: str = ""


def _run(job: Job, number: int, told: Any) -> None:
    torch.set_num_threads(1)
    try:
        job(lambda message: told.put((number, message)))
        told.put((number, _Over()))
    except Exception:
        told.put((number, _Over(traceback.format_exc())))


def _play_in_this(
    lanes: Sequence[Lane],
    first: int,
    checkpoints: Checkpoints,
    device: str,
    taken: Sequence[Synchronized[int]],
    deadline: float,
    tell: Callable[[Told], None],
) -> None:
    def take(lane: int) -> int | None:
        with taken[lane].get_lock():
            at = taken[lane].value
            if at == len(lanes[lane].groups) or time.time() >= deadline:
                return None
            taken[lane].value = at + 1
            return at

    play_lanes(lanes, checkpoints, device, take, tell, first=first)
