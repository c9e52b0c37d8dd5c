"""What an evaluation plays: groups of held-out tasks, each small enough to be lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from examples.tiny_agent.documents import DocumentSource
from examples.tiny_agent.episodes import Episode, gold_outputs
from examples.tiny_agent.tasks import MAKERS, Task, make_needle, make_task
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Split
from seamount.router.history import History
from seamount.router.tokenizer import Tokenizer

LENGTHS = (1024, 2048, 4096, 8192, 16384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORT_CONTEXT, ROOM = 2560, 512
"""Tokens: contexts of all tasks but needles; what a needle's context has beyond its document."""
_NEEDLES_OF_A_GROUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tasks number ``first`` and on of a row. length, depth: of needles; given: the first message is the gold one;
    keeps_reasoning: see ``Episode``."""

    row: str
    kind: TaskKind
    seed: int
    first: int
    num_tasks: int
    length: int = 0
    depth: float = 0.0
    given: bool = False
    keeps_reasoning: bool = True

    @property
    def max_tokens(self) -> int:
        return self.length + ROOM if self.kind is TaskKind.NEEDLE else SHORT_CONTEXT

    def tasks(self, source: DocumentSource) -> Iterator[Task]:
        for i in range(self.first, self.first + self.num_tasks):
            if self.kind is TaskKind.NEEDLE:
                yield make_needle(
                    source.count_tokens,
                    split=Split.EVALUATION,
                    seed=self.seed,
                    index=i,
                    length=self.length,
                    depth=self.depth,
                )
            else:
                yield make_task(self.kind, split=Split.EVALUATION, seed=self.seed, index=i)

    def episodes(self, tokenizer: Tokenizer, source: DocumentSource, history: History) -> Iterator[Episode]:
        """Each up to where the model begins."""
        for task in self.tasks(source):
            episode = Episode(task, tokenizer, history, keeps_reasoning=self.keeps_reasoning)
            if self.given:
                episode.take(gold_outputs(task, tokenizer)[0])
            yield episode


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """num_tasks: of each kind; num_needles: of each length and depth; group_size: tasks of a group at the most.

    The first tasks of a larger suite are those of a smaller one.
    """

    seed: int
    num_tasks: int
    num_needles: int
    kinds: tuple[TaskKind, ...] = tuple(MAKERS)
    lengths: tuple[int, ...] = LENGTHS
    depths: tuple[float, ...] = DEPTHS
    group_size: int = 64

    def groups(self) -> list[Group]:
        """The kinds in turns, so that an evaluation that is cut knows something of each, then the needles.

        Plans are played three times: as they are; with the gold first message, whose choice was drawn at random; and
        so, with the reasoning taken out, which leaves a guess.
        """
        return [*self._short(), *self._needles()]

    def _short(self) -> Iterator[Group]:
        for first in range(0, self.num_tasks, self.group_size):
            size = min(self.group_size, self.num_tasks - first)
            for kind in self.kinds:
                group = Group(row=kind.value, kind=kind, seed=self.seed, first=first, num_tasks=size)
                yield group
                if kind is TaskKind.PLAN:
                    yield replace(group, row="plan, given", given=True)
                    yield replace(group, row="plan, cut", given=True, keeps_reasoning=False)

    def _needles(self) -> Iterator[Group]:
        size = min(self.group_size, _NEEDLES_OF_A_GROUP)
        for first in range(0, self.num_needles, size):
            for length in sorted(self.lengths, reverse=True):
                for depth in self.depths:
                    yield Group(
                        row=needle_row(length, depth),
                        kind=TaskKind.NEEDLE,
                        seed=self.seed,
                        first=first,
                        num_tasks=min(size, self.num_needles - first),
                        length=length,
                        depth=depth,
                    )

    @property
    def num_episodes(self) -> int:
        """Of each model."""
        return sum(group.num_tasks for group in self.groups())


def needle_row(length: int, depth: float) -> str:
    return f"needle {length} {depth:g}"
