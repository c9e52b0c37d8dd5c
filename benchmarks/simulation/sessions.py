"""A session's tokens as its turns go on: numbers that are never used twice stand for text that was never seen."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from benchmarks.simulation.traffic import Plan, Step
from seamount.router.history import common_len

IDS_BITS = 21
"""Each session has 2^21 ids of its own; the shared system prompts have those of session 0."""


def shared_prefix(agent: int, num_tokens: int) -> array[int]:
    """The system prompt of an agent."""
    first = agent << (IDS_BITS - 2)
    return array("I", range(first, first + num_tokens))


def owner(token_id: int) -> int:
    """Number of the session that first brought the id; 0 for system prompts."""
    return token_id >> IDS_BITS


@dataclass(slots=True, kw_only=True)
class Session:
    """kept: what the next question's prompt begins with, without reasoning; context: all that the last turn left, with
    reasoning since the last question; first_question_len: of ``kept``, where a reset cuts."""

    number: int
    plan: Plan
    kept: array[int]
    context: array[int] = field(default_factory=lambda: array("I"))
    parent: int = 0
    at: int = 0
    rank: str = ""
    first_question_len: int = 0
    num_fresh: int = 0
    _common: tuple[tuple[int, int, int], int] = ((0, 0, 0), 0)

    @property
    def name(self) -> str:
        return f"s{self.number}"

    @property
    def step(self) -> Step:
        return self.plan.steps[self.at]

    @property
    def is_over(self) -> bool:
        return self.at == len(self.plan.steps)

    def fresh(self, num_tokens: int) -> array[int]:
        """Text that nobody has seen."""
        first = (self.number << IDS_BITS) + self.num_fresh
        self.num_fresh += num_tokens
        return array("I", range(first, first + num_tokens))

    def prompt(self) -> tuple[array[int], int]:
        """The next turn's prompt, and how many of its tokens were never seen."""
        step = self.step
        if step.text is not None:
            return step.text, step.num_appended
        if step.resets:
            self.kept = self.kept[: self.first_question_len]
            self.context = self.kept[:]
        elif not step.tool:
            self.context = self.kept[:]
        new = self.fresh(step.num_appended)
        self.kept += new
        if not self.first_question_len:
            self.first_question_len = len(self.kept)
        return self.context + new, len(new)

    def answered(self, prompt: array[int], sampled: array[int]) -> None:
        """The turn is over: ``context`` is all that the caches can hold of it."""
        self.context = prompt + sampled
        self.kept += sampled[self.step.num_reasoning :]
        self.at += 1

    def expected_reuse_len(self) -> int:
        """Tokens of ``context`` that the next prompt can begin with, as a router knows: all while tools run, else what
        lies before the reasoning that a question cuts."""
        if not self.is_over and self.step.tool:
            return len(self.context)
        key = self.at, len(self.context), len(self.kept)
        if self._common[0] != key:
            self._common = key, common_len(self.context, self.kept)
        return self._common[1]

    def reuse_len(self) -> int:
        """Tokens of ``context`` that the next turn's prompt does begin with; 0 where none comes."""
        if self.is_over:
            return 0
        if self.step.text is not None:
            return common_len(self.context, self.step.text)
        return self.first_question_len if self.step.resets else self.expected_reuse_len()

    def fork(self, number: int, steps: tuple[Step, ...]) -> Session:
        """A session that goes on from here by itself."""
        return Session(
            number=number,
            plan=Plan(agent=self.plan.agent, steps=steps),
            kept=self.kept[:],
            context=self.context[:],
            parent=self.number,
            rank=self.rank,
            first_question_len=self.first_question_len,
        )
