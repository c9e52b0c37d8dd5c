"""Training documents: conversations of several turns over one world, and long documents with several questions."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from examples.tiny_agent.conversation import Conversation, Document, DocumentEncoder, MarkedPiece, marked_pieces
from examples.tiny_agent.long_documents import make_long_document, needle_turn
from examples.tiny_agent.shapes import NoVariant
from examples.tiny_agent.tasks import make_turn, system_text
from examples.tiny_agent.tools import Tool
from examples.tiny_agent.turns import Scene, TaskKind, Turn
from examples.tiny_agent.values import INVENTED_SHARE, PIECED_SHARE, Draw, Split
from seamount.router.messages import ThinkingMode
from seamount.router.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
TOKENIZER = Path(__file__).parent / "tokenizer"
_AT_ONCE = 24
"""Conversations that are tokenised together."""
_FULL_SHARE = 0.6
"""Of conversations whose tools allow long chains of calls."""
_SERVED_SHARE = 0.2
"""Of thinking conversations that look as they do when the last turn is asked: without the reasoning of earlier ones."""
_SERVED_TURNS = 3
_TOOLS_BESIDE_NOTES = 0.35
"""Of long documents that leave room for them: tools, and turns that need them between the questions."""
_ROOM_FOR_TOOLS = 2500
_MAX_REFUSALS = 12
_MAX_ATTEMPTS = 4
_MIN_QUESTIONS = 6
_TOKENS_OF_A_QUESTION = 90
"""Roughly, with its answer: what a long document leaves room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What training documents are drawn from.

    weights: of the kinds of turns. needle_share: of documents that are a long document with questions, between
    ``min_length`` tokens and what fits. max_turns: of a conversation; half of the conversations have at most
    ``usual_turns``. max_tools: likewise. chat_share: of conversations without any reasoning.
    """

    name: str
    weights: tuple[tuple[TaskKind, float], ...]
    needle_share: float
    min_length: int
    usual_turns: int
    max_turns: int
    max_tools: int
    chat_share: float
    invented_share: float = INVENTED_SHARE
    pieced_share: float = PIECED_SHARE

    def draw(self, rng: random.Random) -> Draw:
        """Draws of one training document."""
        return Draw(Split.TRAINING, rng, invented_share=self.invented_share, pieced_share=self.pieced_share)


_WEIGHTS = (
    (TaskKind.SINGLE, 0.17),
    (TaskKind.MULTI, 0.36),
    (TaskKind.PARALLEL, 0.13),
    (TaskKind.ERRORS, 0.1),
    (TaskKind.FOLLOW_UP, 0.24),
    (TaskKind.NO_TOOL, 0.04),
    (TaskKind.PLAN, 0.05),
)
SHORT = Mixture(
    name="short",
    weights=_WEIGHTS,
    needle_share=0.08,
    min_length=200,
    usual_turns=4,
    max_turns=9,
    max_tools=9,
    chat_share=0.04,
)
"""For sequences of about 2K tokens."""
LONG = Mixture(
    name="long",
    weights=_WEIGHTS,
    needle_share=0.3,
    min_length=512,
    usual_turns=4,
    max_turns=16,
    max_tools=16,
    chat_share=0.03,
)
"""For sequences of up to 16K tokens."""


class DocumentSource:
    """Makes documents with one tokenizer."""

    _shared: ClassVar[DocumentSource | None] = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoder = DocumentEncoder(tokenizer)

    @classmethod
    def shared(cls) -> DocumentSource:
        """This process's own, with the recipe's tokenizer."""
        if cls._shared is None:
            cls._shared = cls(Tokenizer.load(TOKENIZER))
        return cls._shared

    def documents(self, mixture: Mixture, *, seed: tuple[int, ...], max_tokens: int) -> Iterator[Document]:
        """Endless documents of at most ``max_tokens`` tokens each, a function of the arguments alone."""
        rng = random.Random(repr((mixture.name, seed, max_tokens)))
        while True:
            every = [rng.random() >= _SERVED_SHARE for _ in range(_AT_ONCE)]
            renderings = [self._drawn(rng, mixture, max_tokens, every_reasoning=each) for each in every]
            for document in self._encoder.encode(renderings, may_end=every):
                length = document.length_within(max_tokens)
                if length:
                    yield document.first(length)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self._tokenizer.encode_all(texts)]

    def _drawn(
        self, rng: random.Random, mixture: Mixture, max_tokens: int, *, every_reasoning: bool
    ) -> list[MarkedPiece]:
        """The first that can be made: one world in millions that contradicts itself must not end a run.

        Raises what the last of ``_MAX_ATTEMPTS`` in a row failed with: such a mixture is at fault itself.
        """
        for _ in range(_MAX_ATTEMPTS - 1):
            try:
                return self._rendering(rng, mixture, max_tokens, every_reasoning=every_reasoning)
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                _LOG.warning("a document could not be made: %s: %s", type(error).__name__, error)
        return self._rendering(rng, mixture, max_tokens, every_reasoning=every_reasoning)

    def _rendering(
        self, rng: random.Random, mixture: Mixture, max_tokens: int, *, every_reasoning: bool
    ) -> list[MarkedPiece]:
        if rng.random() < mixture.needle_share:
            made, mode = self._needles(mixture.draw(rng), mixture, max_tokens), ThinkingMode.THINKING
        else:
            mode = ThinkingMode.CHAT if rng.random() < mixture.chat_share else ThinkingMode.THINKING
            max_turns = mixture.max_turns if every_reasoning else _SERVED_TURNS
            made = conversation(rng, mixture, max_turns=max_turns)
        return marked_pieces(made, mode, every_reasoning=every_reasoning)

    def _needles(self, draw: Draw, mixture: Mixture, max_tokens: int) -> Conversation:
        """A long document and questions about it; on a logarithmic scale, the longer of two lengths drawn evenly."""
        least, most = mixture.min_length, max(mixture.min_length, max_tokens - _MIN_QUESTIONS * _TOKENS_OF_A_QUESTION)
        length = int(least * (most / least) ** max(draw.rng.random(), draw.rng.random()))
        num_questions = max(1, min(24, (max_tokens - length) // _TOKENS_OF_A_QUESTION, length // 64))
        document = make_long_document(draw, self.count_tokens, length=length, num_targets=num_questions)
        turns = [needle_turn(draw, document, fact) for fact in document.targets]
        tools: tuple[Tool, ...] = ()
        if most - length > _ROOM_FOR_TOOLS and draw.chance(_TOOLS_BESIDE_NOTES):
            scene = _scene(draw, mixture)
            tools = tuple(scene.tools.tools)
            turns = [*turns[: len(turns) // 2], *_turns(scene, mixture, at_most=max(1, len(turns) // 4))]
            draw.rng.shuffle(turns)
        return Conversation(system=document.text, tools=tools, turns=tuple(turns))


def conversation(rng: random.Random, mixture: Mixture, *, max_turns: int | None = None) -> Conversation:
    """Some turns over one world. max_turns: in place of the mixture's."""
    most = mixture.max_turns if max_turns is None else max_turns
    usual = min(mixture.usual_turns, most)
    while True:
        draw = mixture.draw(rng)
        scene = _scene(draw, mixture)
        turns = _turns(scene, mixture, at_most=draw.between(1, usual) if draw.chance(0.5) else most)
        if turns:
            return Conversation(system=system_text(scene), tools=tuple(scene.tools.tools), turns=turns)


def _scene(draw: Draw, mixture: Mixture) -> Scene:
    while True:
        full = draw.chance(_FULL_SHARE)
        least, fewest = (2, 6) if full else (1, 2)
        try:
            return Scene(
                draw,
                num_tables=draw.between(least, 3),
                max_tools=draw.between(fewest, mixture.max_tools),
                full=full,
                for_checking=False,
            )
        except NoVariant:
            continue


def _turns(scene: Scene, mixture: Mixture, *, at_most: int) -> tuple[Turn, ...]:
    kinds, weights = zip(*mixture.weights, strict=True)
    turns: list[Turn] = []
    refusals = 0
    while len(turns) < at_most and refusals < _MAX_REFUSALS:
        turn = make_turn(scene.draw.rng.choices(kinds, weights)[0], scene)
        if turn is None:
            refusals += 1
        else:
            turns.append(turn)
    return tuple(turns)
