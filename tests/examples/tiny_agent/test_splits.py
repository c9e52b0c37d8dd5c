"""Training and evaluation share sentence templates and nothing else."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.shapes import Parameter, split_of
from examples.tiny_agent.tables import World
from examples.tiny_agent.tasks import MAKERS, Task, make_task
from examples.tiny_agent.toolbox import OPERATORS
from examples.tiny_agent.values import SMALLEST_SPLIT_NUMBER, Draw, Split, id_formats, invented_format, is_of
from examples.tiny_agent.words import EVALUATION, TRAINING
from seamount.router.tokenizer import Tokenizer

NUM_TASKS = 30


def tasks(split: Split) -> Iterator[Task]:
    return (make_task(kind, split=split, seed=5, index=i) for kind in MAKERS for i in range(NUM_TASKS))


def parameters(task: Task) -> Iterator[Parameter]:
    for tool in task.conversation.tools:
        yield from with_inner(tool.parameters)


def with_inner(given: tuple[Parameter, ...]) -> Iterator[Parameter]:
    for parameter in given:
        yield parameter
        yield from with_inner(parameter.inner)


def scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from scalars(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from scalars(inner)
    else:
        yield value


def values(world: World) -> set[Any]:
    return {value for table in world.tables.values() for value in scalars(table.rows)}


def split_numbers(world: World) -> set[float]:
    return {
        value
        for value in values(world)
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= SMALLEST_SPLIT_NUMBER
    }


def pieces(words: set[str]) -> set[str]:
    return {piece for word in words for piece in word.lower().split("_")}


def test_no_word_is_in_both_lists_not_even_as_a_part_of_a_name() -> None:
    assert not pieces(TRAINING.all()) & pieces(EVALUATION.all())


def test_names_and_shapes_of_tools_are_disjoint() -> None:
    seen: dict[Split, tuple[set[str], set[str], set[str]]] = {}
    for split in Split:
        made = list(tasks(split))
        tools = [tool for task in made for tool in task.conversation.tools]
        seen[split] = (
            {tool.name for tool in tools},
            {parameter.name for task in made for parameter in parameters(task)},
            {tool.shape() for tool in tools},
        )
        assert {split_of(shape) for shape in seen[split][2]} == {split}
    for of_training, of_evaluation in zip(seen[Split.TRAINING], seen[Split.EVALUATION], strict=True):
        assert of_training
        assert of_evaluation
        assert not of_training & of_evaluation


def test_enumerations_are_disjoint() -> None:
    of_split = {
        split: {choice for task in tasks(split) for parameter in parameters(task) for choice in parameter.choices}
        for split in Split
    }
    assert of_split[Split.TRAINING] & of_split[Split.EVALUATION] <= set(OPERATORS)


def test_values_of_records_are_disjoint() -> None:
    worlds = {split: [task.world for task in tasks(split)] for split in Split}
    texts = {
        split: {value for world in of_split for value in values(world) if isinstance(value, str)}
        for split, of_split in worlds.items()
    }
    numbers = {split: set().union(*map(split_numbers, of_split)) for split, of_split in worlds.items()}
    assert texts[Split.TRAINING]
    assert not texts[Split.TRAINING] & texts[Split.EVALUATION]
    assert not numbers[Split.TRAINING] & numbers[Split.EVALUATION]


def matches_format(text: str, id_format: str) -> bool:
    classes = {"A": "[A-Z]", "a": "[a-z]", "9": "[0-9]"}
    return re.fullmatch("".join(classes.get(c, re.escape(c)) for c in id_format), text) is not None


def test_identifiers_of_one_split_have_no_format_of_the_other() -> None:
    draw = Draw(Split.EVALUATION, random.Random(1))
    for own in id_formats(Split.EVALUATION):
        for _ in range(20):
            identifier = draw.identifier(own)
            assert matches_format(identifier, own)
            assert not any(matches_format(identifier, other) for other in id_formats(Split.TRAINING))


def test_invented_formats_are_none_of_the_held_out_ones() -> None:
    rng = random.Random(5)
    invented = {invented_format(rng) for _ in range(20_000)}
    assert len(invented) > 1000
    assert not invented & set(id_formats(Split.EVALUATION))
    assert all(re.search("[Aa]", made) and "9" in made for made in invented)


def test_every_number_belongs_to_one_split_and_small_ones_to_both() -> None:
    for number in range(SMALLEST_SPLIT_NUMBER, 2000):
        assert is_of(Split.TRAINING, number) != is_of(Split.EVALUATION, number)
    assert all(is_of(split, number) for split in Split for number in range(SMALLEST_SPLIT_NUMBER))


def test_invented_words_are_no_words_of_a_list() -> None:
    draw = Draw(Split.TRAINING, random.Random(3), invented_share=1.0)
    invented = {draw.repeatable(()) for _ in range(3000)}
    assert not invented & pieces(TRAINING.all() | EVALUATION.all())


def test_training_words_hold_the_pieces_of_held_out_words() -> None:
    """A token that training never shows has no embedding, so a word that holds it cannot be copied."""
    tokenizer = Tokenizer.load(TOKENIZER)
    draw = Draw(Split.TRAINING, random.Random(4))
    words = [draw.repeatable(TRAINING.nouns) for _ in range(60_000)]
    known = {token for ids in tokenizer.encode_all(words) for token in ids}
    held_out = {word: set(tokenizer.encode(word)) for word in EVALUATION.all() if re.fullmatch("[a-z]+", word)}
    lacking = {word for word, tokens in held_out.items() if not tokens <= known}
    print(sorted(lacking))
    assert len(held_out) > 150
    assert len(lacking) <= 0.02 * len(held_out)
