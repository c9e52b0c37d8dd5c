"""Tasks attempted in groups by a sampling model, side by side, each attempt at its own pace."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from examples.tiny_agent.episodes import Episode
from examples.tiny_agent.rollouts import Reply, Rollouts
from examples.tiny_agent.tasks import MAKERS, Task, make_task
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Split
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer

INVALID_CALL_COST = 0.2
_LOG = logging.getLogger(__name__)
KINDS = tuple(MAKERS)
"""Needles are left out."""
SMALLEST_SHARE = 0.03
"""Of a kind that never fails."""
_MEMORY = 0.9


class Attempt(Protocol):
    """An attempt at a task, as ``episodes.Episode`` makes them."""

    done: bool

    def prompt(self) -> Sequence[int]:
        """All tokens up to the assistant's next reply."""

    def take(self, token_ids: Sequence[int]) -> None:
        """What the assistant said to that, EOS included where it came."""


Tried = TypeVar("Tried", bound=Attempt)


@dataclass(slots=True)
class Transcript:
    """Tokens of one context. drawn: each sampled one's log-probability, NaN for the others."""

    token_ids: list[int] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)

    @property
    def num_sampled(self) -> int:
        return sum(value == value for value in self.drawn)

    def extend(self, prompt: Sequence[int], reply: Reply) -> bool:
        """Append what the prompt has beyond this context, and the reply; False if it does not continue it."""
        known = len(self.token_ids)
        if list(prompt[:known]) != self.token_ids:
            return False
        self.token_ids += [*prompt[known:], *reply.token_ids]
        self.drawn += [*[float("nan")] * (len(prompt) - known), *reply.logprobs]
        return True


@dataclass(slots=True)
class Group(Generic[Tried]):
    """Attempts at one task. transcripts: the contexts of each; num_left: attempts that are not over."""

    attempts: Sequence[Tried]
    transcripts: list[list[Transcript]] = field(init=False)
    num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.transcripts = [[] for _ in self.attempts]
        self.num_left = len(self.attempts)


def play(
    coming: Iterator[Sequence[Tried]],
    rollouts: Rollouts,
    *,
    max_new: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    goes_on: Callable[[], bool] = lambda: True,
) -> Iterator[Group[Tried]]:
    """Attempt group after group; whoever is over makes room for the next. Groups come back as they are complete.

    max_new: tokens of a reply. goes_on: asked before each step; after False nothing more comes, and what is not
    complete is lost. An attempt whose prompt leaves no room in a context of ``rollouts`` is over, undone.
    """
    seats = _Seats(coming, rollouts)
    while goes_on():
        seats.fill()
        if not seats.playing:
            return
        replies = rollouts.step(max_new=max_new, temperature=temperature, generator=generator)
        for seat, reply in replies.items():
            group = seats.reply(seat, reply)
            if not group.num_left:
                yield group
    rollouts.drop()


class _Seats(Generic[Tried]):
    """Who plays in which conversation of ``rollouts``."""

    def __init__(self, coming: Iterator[Sequence[Tried]], rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self._coming = ((group, at) for group in map(Group, coming) for at in range(len(group.attempts)))
        self._free = list(range(rollouts.num_conversations))
        self._first = 0
        """Where an attempt of the group that comes asked first: the others ask the same."""
        self.playing: dict[int, tuple[Group[Tried], int, Sequence[int]]] = {}

    def fill(self) -> None:
        """Let attempts begin where there is room."""
        while self._free and (one := next(self._coming, None)) is not None:
            seat, (group, at) = self._free[-1], one
            self._rollouts.forget(seat)  # what a task before it left was computed with older weights
            like = self._first if at and self._first != seat else None
            if self._ask(seat, group, at, like):
                self._free.pop()
                self._first = seat if like is None else like

    def reply(self, seat: int, reply: Reply) -> Group[Tried]:
        """What was said in a seat: its attempt goes on, or is over. Returns its group."""
        group, at, prompt = self.playing.pop(seat)
        contexts = group.transcripts[at]
        if not contexts or not contexts[-1].extend(prompt, reply):
            contexts.append(Transcript())
            contexts[-1].extend(prompt, reply)
        group.attempts[at].take(reply.token_ids)
        if group.attempts[at].done or not self._ask(seat, group, at):
            group.num_left -= 1
            self._free.append(seat)
        return group

    def _ask(self, seat: int, group: Group[Tried], at: int, like: int | None = None) -> bool:
        prompt = group.attempts[at].prompt()
        if len(prompt) >= self._rollouts.max_tokens:
            return False
        self.playing[seat] = (group, at, prompt)
        self._rollouts.ask(seat, prompt, like=like)
        return True


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of its group's (not divided by the deviation: arXiv 2512.02556)."""
    values = np.asarray(rewards, np.float64)
    return [float(value) for value in values - values.mean()]


def reward(episode: Episode) -> float:
    """1 for a task that was done; a part of each call that its tool could not take is lost."""
    if not episode.done:
        return 0.0
    outcome = episode.outcome()
    invalid = (outcome.num_calls - outcome.num_valid_calls) / max(1, outcome.num_calls)
    return float(outcome.succeeded) - INVALID_CALL_COST * invalid


@dataclass(slots=True)
class KindShares:
    """How often each kind of task is drawn: by the share of its attempts that failed of late."""

    failing: dict[TaskKind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.5))

    def add(self, kind: TaskKind, succeeded: Sequence[bool]) -> None:
        """What became of a group."""
        failed = 1 - sum(succeeded) / len(succeeded)
        self.failing[kind] = _MEMORY * self.failing[kind] + (1 - _MEMORY) * failed

    def draw(self, draw: random.Random) -> TaskKind:
        weights = [max(SMALLEST_SHARE, self.failing[kind]) for kind in KINDS]
        return draw.choices(KINDS, weights)[0]


def training_groups(
    tokenizer: Tokenizer, shares: KindShares, *, size: int, seed: int, first: int, stride: int
) -> Iterator[list[Episode]]:
    """Endless groups of ``size`` attempts at tasks number ``first`` and every ``stride``-th one after it."""
    history = History(tokenizer, "reinforcement")
    index = first
    while True:
        kind = shares.draw(random.Random(repr((seed, index))))
        task = _task(kind, seed, index)
        yield [Episode(task, tokenizer, history) for _ in range(size)]
        index += stride


def single_attempts(tokenizer: Tokenizer, numbers: Sequence[int], *, seed: int) -> Iterator[list[Episode]]:
    """One attempt at each of these tasks of every kind."""
    history = History(tokenizer, "measurement")
    for index in numbers:
        for kind in KINDS:
            yield [Episode(_task(kind, seed, index), tokenizer, history)]


def _task(kind: TaskKind, seed: int, index: int) -> Task:
    """A training task; in place of one that cannot be made, as one world in millions contradicts itself, another."""
    try:
        return make_task(kind, split=Split.TRAINING, seed=seed, index=index)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        _LOG.warning("task %s %d %d could not be made: %s: %s", kind.value, seed, index, type(error).__name__, error)
        return make_task(kind, split=Split.TRAINING, seed=seed, index=-1 - index)
