"""The tokenizer: V3.2's control tokens, a word the same tokens wherever it stands, nothing that it cannot spell."""

from __future__ import annotations

import json
import random

import pytest

from examples.tiny_agent.bpe import VOCAB_SIZE
from examples.tiny_agent.documents import TOKENIZER
from examples.tiny_agent.tasks import make_task
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Draw, Split
from examples.tiny_agent.words import EVALUATION
from seamount.router.encoding import RunEncoder
from seamount.router.messages import ThinkingMode
from seamount.router.tokenizer import Control, Tokenizer

FRAMES = ('"{}"', " {} ", "_{}_", '":"{}",', ">{}<", "({})", "\n{}\n", ": {}.", "[{}]", '["{}"', "{}: ")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


def holds(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


def test_control_tokens_have_the_flags_of_the_original() -> None:
    definition = json.loads((TOKENIZER / "tokenizer.json").read_text())
    special = {token["content"]: token["special"] for token in definition["added_tokens"]}
    ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
    assert {control.value for control in Control} <= set(special)
    assert special[Control.DSML.value]
    assert not any(special[c.value] for c in (Control.THINK, Control.END_THINK, Control.USER, Control.ASSISTANT))
    assert (ids[Control.BOS.value], ids[Control.EOS.value]) == (0, 1)
    assert json.loads((TOKENIZER / "tokenizer_config.json").read_text())["add_bos_token"] is False


def test_the_vocabulary_has_the_size_that_it_says(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x2FFF)))) for _ in range(30))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_is_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    draw = Draw(Split.TRAINING, random.Random(3), invented_share=1.0)
    words = [word for word in sorted(EVALUATION.all()) if word.isalpha() and len(word) > 1]
    words += [draw.repeatable(()) for _ in range(300)]
    words += [draw.identifier(draw.id_format()) for _ in range(100)] + ["QX71", "9A7B", "A-1234"]
    for word in words:
        alone = tokenizer.encode(word)
        for frame in FRAMES:
            assert holds(tokenizer.encode(frame.format(word)), alone), (word, frame)


def test_every_digit_and_every_letter_of_a_code_is_a_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("3141592")) == 7
    assert len(tokenizer.encode("QXW")) == 3


def test_what_is_always_the_same_is_few_tokens(tokenizer: Tokenizer) -> None:
    task = make_task(TaskKind.SINGLE, split=Split.EVALUATION, seed=1, index=1)
    ids = RunEncoder(tokenizer).encode_messages(task.conversation.opening(), ThinkingMode.THINKING)
    schemas = sum(len(tokenizer.encode(tool.function_json())) for tool in task.conversation.tools)
    assert len(ids) - schemas < 120
