"""A process that attempts tasks with the model as it is served, while another one trains it on what it tells.

New weights are taken up between two steps, in the midst of attempts (arXiv 2509.19128): what was cached stays, and
every sampled token keeps the log-probability that it was drawn with.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from examples.tiny_agent.attempts import (
    Group,
    KindShares,
    Transcript,
    advantages,
    play,
    reward,
    single_attempts,
    training_groups,
)
from examples.tiny_agent.captured import copy_weights
from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.episodes import Episode
from examples.tiny_agent.rollouts import Rollouts
from examples.tiny_agent.shared_weights import SharedWeights
from examples.tiny_agent.turns import TaskKind
from seamount.router.tokenizer import Tokenizer

_ADMIT_SHARE = 12
"""A step computes prompts where one of so many conversations has asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """num_conversations: of one process at one time; max_tokens: of a context; max_new: of a reply; group: attempts at
    one task."""

    num_conversations: int
    max_tokens: int
    max_new: int
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of the attempts at one task. version: of the weights when it was complete. samples: contexts with
    their advantages, none where all rewards are equal; num_sampled, num_tokens: of all its contexts."""

    kind: TaskKind
    rewards: list[float]
    succeeded: list[bool]
    version: int
    samples: list[tuple[Transcript, float]]
    num_sampled: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Measure:
    """One greedy attempt at each of ``num_tasks`` tasks of every kind, shared among the processes."""

    num_tasks: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Groups of attempts without end, at tasks from number ``first`` on, shared among the processes."""

    first: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A process has done what it was told. steps: of its model, in so many seconds; error: empty if all went well."""

    steps: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What a process shares with the one that trains. commands: Measure, Sample, or None at the end; results: Result,
    and Over after each command; is_open: until sampling is to end; may_sample: cleared while the device is wanted."""

    weights: SharedWeights
    commands: Any
    results: Any
    is_open: Any
    may_sample: Any


class Sampler:
    """The process number ``number`` of ``count``."""

    def __init__(self, links: Links, sizes: Sizes, device: torch.device, *, number: int, count: int, seed: int) -> None:
        self._links, self._sizes, self._device = links, sizes, device
        self._number, self._count = number, count
        self._model, self._version = links.weights.served(device)
        self._rollouts = Rollouts(
            self._model,
            num_conversations=sizes.num_conversations,
            max_tokens=sizes.max_tokens,
            admit_at=max(1, sizes.num_conversations // _ADMIT_SHARE),
            captured=True,
        )
        self._generator = torch.Generator(device=device).manual_seed(seed * count + number)
        self._tokenizer = Tokenizer.load(TOKENIZER)

    def obey(self) -> None:
        """Do what comes, until nothing more will."""
        while (command := self._links.commands.get()) is not None:
            began, steps = time.monotonic(), self._rollouts.work.num_steps
            self._rollouts.drop()
            self._refresh()
            for result in self._measured(command) if isinstance(command, Measure) else self._sampled(command):
                self._links.results.put(result)
            seconds = time.monotonic() - began
            self._links.results.put(Over(steps=self._rollouts.work.num_steps - steps, seconds=seconds))

    def _measured(self, command: Measure) -> Iterator[Result]:
        numbers = range(self._number, command.num_tasks, self._count)
        coming = single_attempts(self._tokenizer, numbers, seed=command.seed)
        for group in self._play(coming, 0.0, lambda: True):
            yield result_of(group, self._version)

    def _sampled(self, command: Sample) -> Iterator[Result]:
        shares = KindShares()
        coming = training_groups(
            self._tokenizer,
            shares,
            size=self._sizes.group,
            seed=command.seed,
            first=command.first + self._number,
            stride=self._count,
        )
        for group in self._play(coming, 1.0, self._goes_on):
            result = result_of(group, self._version)
            shares.add(result.kind, result.succeeded)
            yield result

    def _play(
        self, coming: Iterator[list[Episode]], temperature: float, goes_on: Callable[[], bool]
    ) -> Iterator[Group[Episode]]:
        return play(
            coming,
            self._rollouts,
            max_new=self._sizes.max_new,
            temperature=temperature,
            generator=self._generator,
            goes_on=goes_on,
        )

    def _goes_on(self) -> bool:
        self._links.may_sample.wait()
        self._refresh()
        return bool(self._links.is_open.is_set())

    def _refresh(self) -> None:
        if self._links.weights.version != self._version:
            model, self._version = self._links.weights.served(self._device)
            copy_weights(model, self._model)


def result_of(group: Group[Episode], version: int) -> Result:
    """Judges the attempts of a group that is complete."""
    rewards = [reward(episode) for episode in group.attempts]
    weights = advantages(rewards)
    pairs = [(one, weight) for many, weight in zip(group.transcripts, weights, strict=True) for one in many]
    return Result(
        kind=group.attempts[0].task.kind,
        rewards=rewards,
        succeeded=[episode.done and episode.outcome().succeeded for episode in group.attempts],
        version=version,
        samples=[(one, weight) for one, weight in pairs if weight],
        num_sampled=sum(one.num_sampled for one, _ in pairs),
        num_tokens=sum(len(one.token_ids) for one, _ in pairs),
    )


def run_sampler(links: Links, sizes: Sizes, device: str, number: int, count: int, seed: int) -> None:
    """The body of a process, which ends with the one that started it; what fails is told as ``Over``."""
    torch.set_num_threads(1)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        with torch.no_grad():
            Sampler(links, sizes, torch.device(device), number=number, count=count, seed=seed).obey()
    except Exception:
        links.results.put(Over(error=traceback.format_exc()))


def _end_with(parent: Any) -> None:
    """A trainer that is killed cannot tell its processes to end."""
    parent.join()
    os._exit(1)
