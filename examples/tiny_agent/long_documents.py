"""Long system documents of a given length in tokens: facts and look-alikes, one of which answers the question.

Every fact names a kind of thing, an identifier, a field and a value. Look-alikes share three of the four: the same
identifier with another field, the same field with an identifier that differs in one character, the same identifier
under another kind of thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from examples.tiny_agent.mentions import mentions
from examples.tiny_agent.turns import Check, TaskKind, Turn
from examples.tiny_agent.values import Draw

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Number of tokens of each line by itself."""

_OPENING = ("Notes. Answer from them.", "These are my notes.", "Use these notes for your answers.", "Register:")
_STYLES = (
    "The {field} of {noun} {key} is {value}.",
    "{noun} {key}: {field} {value}.",
    "{noun} {key} has {field} {value}.",
    "{key} ({noun}) - {field}: {value}",
)
_FILLERS = (
    "It was {a} and {b} that day.",
    "Nobody saw the {a} {b}.",
    "A {a} {noun} is not a {b} {noun}.",
    "Then came the {a} ones, all {b}.",
)
_TOKENS_OF_A_LINE = 16
"""Roughly."""
_SHORTEST_LINE = 8
_MAX_MISFITS = 6
_MAX_FORBIDDEN = 40


@dataclass(frozen=True, slots=True)
class Fact:
    noun: str
    key: str
    field: str
    value: str


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    text: str
    fact: Fact | None
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LongDocument:
    """text: of ``num_tokens`` tokens. targets: facts to ask for, each in the text once. depth: position of the first
    target's line, 0 at the beginning and 1 at the end, as it came out. style: of all lines."""

    text: str
    num_tokens: int
    targets: tuple[Fact, ...]
    facts: tuple[Fact, ...]
    depth: float
    style: str


def make_long_document(
    draw: Draw, count_tokens: CountTokens, *, length: int, depth: float | None = None, num_targets: int = 1
) -> LongDocument:
    """A document of ``length`` tokens or a few less. depth: where the first target stands; None for anywhere."""
    opening, facts = draw.one(_OPENING), _Facts(draw)
    style = draw.one(_STYLES)
    budget = length - count_tokens([opening])[0]
    lines: list[_Line] = []
    used = misfits = 0
    while budget - used >= _SHORTEST_LINE and misfits < _MAX_MISFITS:
        drawn = [facts.draw() for _ in range(max(4, (budget - used) // _TOKENS_OF_A_LINE))]
        texts = [_text_of(draw, fact, style) for fact in drawn]
        before = used
        for fact, text, count in zip(drawn, texts, count_tokens(texts), strict=True):
            if used + count + 1 <= budget:
                lines.append(_Line(text, fact, count + 1))
                used += count + 1
        misfits += used == before
    targets = draw.some([line for line in lines if line.fact is not None], num_targets)
    if depth is not None:
        lines = _at_depth(lines, targets[0], depth * used)
    before = sum(line.num_tokens for line in lines[: lines.index(targets[0])])
    return LongDocument(
        text="\n".join([opening, *(line.text for line in lines)]),
        num_tokens=length - budget + used,
        targets=tuple(line.fact for line in targets if line.fact is not None),
        facts=tuple(line.fact for line in lines if line.fact is not None),
        depth=before / max(1, used),
        style=style,
    )


def needle_turn(draw: Draw, document: LongDocument, fact: Fact) -> Turn:
    """Asks for one fact of a document."""
    subject = f"{fact.noun} {fact.key}"
    question = draw.one(
        (
            f"What is the {fact.field} of {subject}?",
            f"What do the notes say of the {fact.field} of {subject}?",
            f"Find the {fact.field} of {subject} in the notes.",
        )
    )
    similar = [
        other.value
        for other in document.facts
        if other.value != fact.value and (other.key == fact.key or other.field == fact.field)
    ]
    answer = f"The {fact.field} of {subject} is {fact.value}."
    forbidden = tuple(value for value in dict.fromkeys(similar) if not mentions(answer, value))[:_MAX_FORBIDDEN]
    check = Check(values=(fact.value,), forbidden=forbidden, max_calls=0)
    return Turn(
        kind=TaskKind.NEEDLE,
        question=question,
        steps=(),
        reasoning=f"The notes say: {_line(fact, document.style)}",
        answer=answer,
        check=check,
    )


def _at_depth(lines: list[_Line], target: _Line, position: float) -> list[_Line]:
    """The same lines, with the target at about a position in tokens."""
    others, before = [line for line in lines if line is not target], 0.0
    for place, line in enumerate(others):
        if before >= position:
            return [*others[:place], target, *others[place:]]
        before += line.num_tokens
    return [*others, target]


class _Facts:
    """Draws facts that resemble each other; no two of them are about the same field of the same thing."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        words = draw.words
        self._nouns = [draw.word(words.nouns) for _ in range(draw.between(1, 3))]
        self._numeric = [draw.word(words.quantities) for _ in range(2)]
        self._fields = self._numeric + [draw.word(words.texts) for _ in range(2)]
        self._id_format = draw.id_format()
        self._keys: list[str] = []
        self._seen: set[tuple[str, str, str]] = set()

    def draw(self) -> Fact | None:
        """A fact, or None: a line that says nothing."""
        draw = self._draw
        if draw.chance(0.15):
            return None
        key = _key(draw, self._keys, self._id_format)
        place = (draw.one(self._nouns), key, draw.one(self._fields))
        if place in self._seen:
            return None
        self._seen.add(place)
        self._keys.append(key)
        value = str(draw.integer(10, 9999)) if place[2] in self._numeric else _text(draw)
        return Fact(*place, value)


def _key(draw: Draw, keys: list[str], id_format: str) -> str:
    """A new identifier, one that is there already, or one that differs from it in a single character."""
    if not keys or draw.chance(0.4):
        return draw.identifier(id_format)
    old = draw.one(keys)
    if draw.chance(0.5):
        return old
    fresh = draw.identifier(id_format)
    places = [place for place, character in enumerate(id_format) if character in "Aa9"]
    place = draw.one(places)
    return old[:place] + fresh[place] + old[place + 1 :]


def _text(draw: Draw) -> str:
    match draw.between(0, 3):
        case 0:
            return draw.person()
        case 1:
            return draw.place()
        case 2:
            return draw.identifier(draw.id_format())
    return draw.repeatable(draw.words.tags)


def _line(fact: Fact, style: str) -> str:
    return style.format(noun=fact.noun, key=fact.key, field=fact.field, value=fact.value)


def _text_of(draw: Draw, fact: Fact | None, style: str) -> str:
    if fact is not None:
        return _line(fact, style)
    tags, nouns = draw.words.tags, draw.words.nouns
    return draw.one(_FILLERS).format(a=draw.repeatable(tags), b=draw.repeatable(tags), noun=draw.repeatable(nouns))
