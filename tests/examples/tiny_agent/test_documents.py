"""Training documents: the served encoding, exactly the assistant's tokens learnt, lengths as asked, repeatable."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from examples.tiny_agent import documents
from examples.tiny_agent.conversation import DocumentEncoder, marked_pieces
from examples.tiny_agent.corpus import read, write_batch
from examples.tiny_agent.data import PADDING, BatchShape, batches, make_batch
from examples.tiny_agent.documents import LONG, SHORT, TOKENIZER, DocumentSource, conversation
from examples.tiny_agent.long_documents import make_long_document
from examples.tiny_agent.values import Draw, Split
from seamount.router.encoding import RunEncoder, render, to_text
from seamount.router.messages import ThinkingMode, check_messages
from seamount.router.tokenizer import Control, Tokenizer

SHAPE = BatchShape(seed=4, sequence_length=3072, batch_size=16)
SAID = re.compile(
    rf"(?:{Control.ASSISTANT.value}|</function_results>\n\n)(?:<think>|</think>)(.*?{Control.EOS.value})", re.DOTALL
)
"""What the assistant says: from behind the tag that ends a prompt to EOS. Holds behind the first question."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


def test_documents_are_what_the_served_encoding_gives(tokenizer: Tokenizer) -> None:
    rng = random.Random(8)
    library = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    for mode in ThinkingMode:
        for _ in range(20):
            made = conversation(rng, SHORT)
            messages = made.messages()
            check_messages(messages)
            document = DocumentEncoder(tokenizer).encode([marked_pieces(made, mode)])[0]
            ids = document.token_ids.tolist()
            text = to_text(render(messages, mode=mode).pieces())
            assert ids == RunEncoder(tokenizer).encode_messages(messages, mode)
            assert tokenizer.decode(ids) == text
            assert ids == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("mode", ThinkingMode)
def test_exactly_what_the_assistant_says_is_learnt(tokenizer: Tokenizer, mode: ThinkingMode) -> None:
    rng = random.Random(9)
    num_compared = 0
    for _ in range(40):
        made = conversation(rng, SHORT)
        document = DocumentEncoder(tokenizer).encode([marked_pieces(made, mode)])[0]
        text = tokenizer.decode(document.token_ids.tolist())
        asked = text[text.index(Control.USER.value) :]
        last = len(made.turns) - 1
        places = [i for i, turn in enumerate(made.turns) for _ in range(len(turn.steps) + 1)]
        expected = [
            said
            for said, place in zip(SAID.findall(asked), places, strict=True)
            if made.turns[place].chat or (mode is ThinkingMode.THINKING and place == last)
        ]
        learnt = [
            tokenizer.decode(token_id for token_id, _ in run)
            for is_learnt, run in itertools.groupby(
                zip(document.token_ids, document.loss_mask, strict=True), lambda t: t[1]
            )
            if is_learnt
        ]
        assert learnt == expected
        num_compared += len(learnt)
    assert num_compared > 40


def test_reasoning_stands_in_the_last_turn_only(tokenizer: Tokenizer) -> None:
    rng = random.Random(10)
    made = next(c for c in iter(lambda: conversation(rng, LONG), None) if len(c.turns) > 1)
    text = tokenizer.decode(
        DocumentEncoder(tokenizer).encode([marked_pieces(made, ThinkingMode.THINKING)])[0].token_ids.tolist()
    )
    history, _, last = text.rpartition(Control.USER.value)
    assert made.turns[-1].reasoning in last
    assert "<think>" not in history[history.index(Control.USER.value) :]


def test_with_every_reasoning_each_turn_is_as_served_while_it_is_the_last(tokenizer: Tokenizer) -> None:
    rng = random.Random(13)
    encoder, num_turns = RunEncoder(tokenizer), 0
    for _ in range(15):
        made = conversation(rng, SHORT)
        pieces = marked_pieces(made, ThinkingMode.THINKING, every_reasoning=True)
        document = DocumentEncoder(tokenizer).encode([pieces], may_end=[True])[0]
        ids = document.token_ids.tolist()
        assert len(document.ends) == len(made.turns) - 1
        opening = encoder.encode_messages(made.opening(), ThinkingMode.THINKING)
        assert ids[: len(opening)] == opening
        for i, (begin, end) in enumerate(itertools.pairwise((len(opening), *document.ends, len(ids)))):
            alone = replace(made, turns=(made.turns[i],))
            assert opening + ids[begin:end] == encoder.encode_messages(alone.messages(), ThinkingMode.THINKING)
            said = DocumentEncoder(tokenizer).encode([marked_pieces(alone, ThinkingMode.THINKING)])[0]
            assert (document.loss_mask[begin:end] == said.loss_mask[len(opening) :]).all()
            num_turns += 1
    assert num_turns > 30


def test_a_document_may_lose_its_last_turns(tokenizer: Tokenizer) -> None:
    rng = random.Random(14)
    made = next(c for c in iter(lambda: conversation(rng, SHORT), None) if len(c.turns) > 2)
    pieces = marked_pieces(made, ThinkingMode.THINKING, every_reasoning=True)
    whole, fixed = (DocumentEncoder(tokenizer).encode([pieces], may_end=[may])[0] for may in (True, False))
    first, second, *_ = whole.ends
    assert [whole.length_within(room) for room in (first - 1, first, second - 1, second)] == [0, first, first, second]
    assert whole.length_within(99_999) == len(whole.token_ids)
    assert whole.first(second).ends == (first,)
    assert tokenizer.decode(whole.first(second).token_ids.tolist()).endswith(Control.EOS.value)
    assert fixed.length_within(len(fixed.token_ids) - 1) == 0


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_long_documents_have_the_length_and_the_depth_asked_for(
    tokenizer: Tokenizer, length: int, depth: float
) -> None:
    draw = Draw(Split.EVALUATION, random.Random(repr((length, depth))))
    document = make_long_document(draw, DocumentSource.shared().count_tokens, length=length, depth=depth)
    assert len(tokenizer.encode(document.text)) == document.num_tokens
    assert min(0.98 * length, length - 16) <= document.num_tokens <= length  # a line is missing at the most
    assert abs(document.depth - depth) < max(0.02, 40 / length)


def test_the_answer_stands_in_one_line_among_look_alikes() -> None:
    draw = Draw(Split.EVALUATION, random.Random(12))
    document = make_long_document(draw, DocumentSource.shared().count_tokens, length=2000, depth=0.3)
    target = document.targets[0]
    about = [
        fact for fact in document.facts if (fact.noun, fact.key, fact.field) == (target.noun, target.key, target.field)
    ]
    assert about == [target]
    lines = document.text.splitlines()
    assert sum(target.key in line and target.noun in line and target.field in line for line in lines) == 1
    assert sum(fact.field == target.field for fact in document.facts) > 10


def test_a_world_that_cannot_be_made_is_left_out(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, num_calls = documents.conversation, itertools.count()

    def fails_at_times(*args: Any, **kwargs: Any) -> Any:
        if next(num_calls) % every == every - 1:
            raise KeyError("speed")
        return made(*args, **kwargs)

    monkeypatch.setattr(documents, "conversation", fails_at_times)
    every = 10
    drawn = DocumentSource(tokenizer).documents(SHORT, seed=(1,), max_tokens=1024)
    assert len(list(itertools.islice(drawn, 30))) == 30
    assert "a document could not be made: KeyError" in caplog.text
    every = 1
    with pytest.raises(KeyError):
        next(DocumentSource(tokenizer).documents(SHORT, seed=(1,), max_tokens=1024))


def test_batches_hold_whole_documents_one_behind_the_other() -> None:
    batch = make_batch(SHAPE, 0)
    assert batch.tokens.shape == batch.loss_mask.shape == (SHAPE.batch_size, SHAPE.sequence_length)
    assert batch.num_tokens > 0.85 * batch.tokens.size  # 94 % of the batches that training takes, of more rows
    bos, eos = 0, 1
    for tokens, mask, ids, positions in zip(
        batch.tokens, batch.loss_mask, batch.document_ids, batch.positions, strict=True
    ):
        num_documents = ids.max() + 1
        for document in range(num_documents):
            (places,) = np.nonzero(ids == document)
            assert (positions[places] == np.arange(len(places))).all()
            assert tokens[places[0]] == bos
            assert tokens[places[-1]] == eos
            assert not mask[places[0]]
            assert mask[places[-1]] or not mask[places].any()
        assert (np.diff(ids[ids != PADDING]) >= 0).all()
        assert not mask[ids == PADDING].any()
        assert (ids[np.argmax(ids == PADDING) :] == PADDING).all() or PADDING not in ids


def test_batches_are_the_same_whoever_makes_them_and_wherever_they_begin() -> None:
    def some(num_workers: int, first_batch: int) -> list[np.ndarray]:
        made = batches(
            seed=SHAPE.seed,
            sequence_length=SHAPE.sequence_length,
            batch_size=SHAPE.batch_size,
            num_workers=num_workers,
            first_batch=first_batch,
        )
        try:
            return [next(made).tokens for _ in range(2)]
        finally:
            made.close()

    here, there, later = some(0, 0), some(1, 0), some(0, 1)
    assert all((own == other).all() for own, other in zip(here, there, strict=True))
    assert (later[0] == here[1]).all()
    assert (here[0] != here[1]).any()


def test_long_batches_reach_their_length() -> None:
    shape = BatchShape(seed=4, sequence_length=8192, batch_size=2, mixture=LONG)
    longest = max(int(make_batch(shape, i).positions.max()) for i in range(2))
    assert longest > 3000


def test_a_corpus_gives_its_batches_back(tmp_path: Path) -> None:
    for index in range(2):
        num_tokens = write_batch(SHAPE, tmp_path, index)
        assert num_tokens == make_batch(SHAPE, index).num_tokens
        assert write_batch(SHAPE, tmp_path, index) == num_tokens  # there already
    for index, batch in enumerate(read(tmp_path)):
        made = make_batch(SHAPE, index)
        for name in ("tokens", "loss_mask", "document_ids", "positions"):
            assert (getattr(batch, name) == getattr(made, name)).all()
    assert index == 1
