"""Where two outputs part, and which tasks are compared; the comparison itself runs in tests/system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.parity import Difference, Twofold, held_out
from examples.tiny_agent.suite import Suite
from examples.tiny_agent.turns import TaskKind
from seamount.router.tokenizer import Tokenizer


class Says:
    def __init__(self, outputs: dict[int, list[int]]) -> None:
        self._outputs = outputs

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        return {number: self._outputs[number] for number in prompts}


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ([5, 6, 1], [5, 6, 1], None),
        ([5, 6, 1], [5, 7, 1], (1, 6, 7)),
        ([5, 6, 1], [5, 6], (2, 1, None)),
        ([], [5], (0, None, 5)),
    ],
)
def test_the_first_difference_is_told(
    first: list[int], second: list[int], difference: tuple[int, int | None, int | None] | None
) -> None:
    both = Twofold(Says({0: [9, 1], 3: first}), Says({0: [9, 1], 3: second}))
    assert both.generate({0: [2], 3: [2, 3, 4, 4]}, max_output_tokens=8) == {0: [9, 1], 3: first}
    assert (both.num_outputs, both.num_tokens) == (2, 2 + len(first))
    expected = []
    if difference is not None:
        at, one, other = difference
        expected = [Difference(num_prompt_tokens=4, at=at, first=one, second=other)]
    assert both.differences == expected


def test_long_prompts_are_left_out() -> None:
    tokenizer = Tokenizer.load(TOKENIZER)
    groups = Suite(seed=4, num_tasks=6, num_needles=0, kinds=(TaskKind.NO_TOOL,)).groups()
    sizes = [len(episode.prompt()) for episode in held_out(groups, tokenizer, 1 << 20)]
    limit = sorted(sizes)[2]
    kept = [len(episode.prompt()) for episode in held_out(groups, tokenizer, limit)]
    assert kept == [size for size in sizes if size <= limit]
    assert 3 <= len(kept) < 6
