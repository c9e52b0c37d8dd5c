"""Random words, identifiers and numbers; those of training and those of evaluation never meet.

- words: the lists of ``words``; in training most of them are invented, so that a word is a thing to copy, not to know,
  and most of those are made of the tokenizer's pieces, drawn evenly: a piece that training never shows has no embedding
  to copy, and held-out words are full of pieces that are rare in invented syllables;
- identifiers: formats of one split are not formats of the other;
- whole numbers from 10 on, and numbers with a fraction: by their residue modulo 7 (in tenths); those below 10 are
  shared;
- dates: January to August for training, September to December for evaluation.
"""

from __future__ import annotations

import enum
import functools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from examples.tiny_agent.words import EVALUATION, TRAINING, EnumWords, Words

_MODULUS = 7
_HELD_OUT_RESIDUE = 3
INVENTED_SHARE = 0.9
PIECED_SHARE = 0.6
"""Of invented words: those made of pieces."""
_TOKENIZER = Path(__file__).parent / "tokenizer" / "tokenizer.json"
_MAX_TRIES = 500
SMALLEST_SPLIT_NUMBER = 10
"""Whole numbers below it are in both splits."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ID_FORMATS = {
    "training": _split(
        "AA99 A999 AA-999 999-AA a9a9a9 AAAA9 99999 AA9999 A9-A9 aaa-99 9999 AA_99 99-99 A-99-A aa99aa AAAAAA 99AA99 "
        "a-999"
    ),
    "evaluation": _split("AAA99 9A9A A-9999 99-AA-9 999999 aa-9a"),
}
_RECURRING_SHARE = 0.25
_ALIKE_SHARE = 0.12
"""Of invented words: those that begin like another one of their task."""
_FORMAT_GROUPS = _split("9 99 999 9999 A AA AAA AAAA a aa aaa A9 9A a9 9a A99 99A 9AA AA9 A9A 9A9 a99 9aa aa9")
_INVENTED_FORMAT_SHARE = 0.7
"""Of the formats of training."""
_UPPER = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_LOWER = "abcdefghjkmnpqrstuvwxyz"
_NONE = ("",)
_ONSETS = (
    _split("b br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sm sn sp st str t th tr v w wh")
    + _split("y z")
    + 4 * _NONE
)
_NUCLEI = _split("a e i o u a e i o u ai ea ee ie oa oo ou ay ar er or")
_CODAS = _split("b ck d ft g l ll lt m mp n nd ng nk nt p r rd rk rm rn s sh ss st t tch th x") + 12 * _NONE
_ENDINGS = _split("er ing ion al ity or ment age et ic ow y le en on") + 15 * _NONE

Item = TypeVar("Item")


class Split(enum.Enum):
    TRAINING = "training"
    EVALUATION = "evaluation"


def is_of(split: Split, number: float) -> bool:
    """Whether a number may stand in tasks of a split; numbers with a fraction count in tenths."""
    if isinstance(number, int):
        if abs(number) < SMALLEST_SPLIT_NUMBER:
            return True
        held_out = number % _MODULUS == _HELD_OUT_RESIDUE
    else:
        held_out = round(number * 10) % _MODULUS == _HELD_OUT_RESIDUE
    return held_out == (split is Split.EVALUATION)


def id_formats(split: Split) -> tuple[str, ...]:
    """Formats of identifiers: ``A`` a capital letter, ``a`` a small one, ``9`` a digit, the rest as it is."""
    return _ID_FORMATS[split.value]


class Draw:
    """Draws of one task: everything comes from one generator of random numbers.

    invented_share: of words, in training; evaluation invents none. pieced_share: of invented words; 0 needs no
    tokenizer.
    """

    def __init__(
        self,
        split: Split,
        rng: random.Random,
        *,
        invented_share: float = INVENTED_SHARE,
        pieced_share: float = PIECED_SHARE,
    ) -> None:
        self.split = split
        self._pieced_share = pieced_share
        self._invented_share = invented_share if split is Split.TRAINING else 0.0
        self.rng = rng
        self.words: Words = TRAINING if split is Split.TRAINING else EVALUATION
        self._taken: set[str] = set()
        self._invented_before: list[str] = []
        self._recurring: dict[Sequence[str], list[str]] = {}

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def one(self, items: Sequence[Item]) -> Item:
        return _one(self.rng, items)

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """``count`` different ones, in random order."""
        return self.rng.sample(items, count)

    def between(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included, of either split."""
        return low + int(self.rng.random() * (high - low + 1))

    # --- words

    def word(self, words: Sequence[str]) -> str:
        """One of a list, or an invented one; none twice in a task while the list lasts."""
        for _ in range(50):
            word = self.repeatable(words)
            if word not in self._taken:
                break
        self._taken.add(word)
        return word

    def repeatable(self, words: Sequence[str]) -> str:
        """As ``word``, but it may come again: verbs, values."""
        return self._invented() if self._invents() else self.one(words)

    def recurring(self, words: Sequence[str]) -> str:
        """As ``repeatable``; in training often one that this list has given before, as a list of a few words does:
        verbs of tools, names of keys, of people."""
        before = self._recurring.setdefault(words, [])
        if before and self.split is Split.TRAINING and self.chance(_RECURRING_SHARE):
            return self.one(before)
        before.append(self.repeatable(words))
        self._taken.add(before[-1])
        return before[-1]

    def enumeration(self) -> EnumWords:
        """A field's name and its two to five values."""
        if self._invents():
            name = self._invented()
            while name in self._taken:
                name = self._invented()
            self._taken.add(name)
            return name, tuple({self._invented(): None for _ in range(self.between(2, 5))})
        for _ in range(50):
            name, values = self.one(self.words.enums)
            if name not in self._taken:
                break
        self._taken.add(name)
        return name, tuple(self.some(values, min(len(values), self.between(2, 5))))

    def person(self) -> str:
        """First and last name."""
        first, last = self.recurring(self.words.firsts), self.recurring(self.words.lasts)
        return f"{first.capitalize()} {last.capitalize()}"

    def place(self) -> str:
        return self._invented().capitalize() if self._invents() else self.one(self.words.places)

    def _invents(self) -> bool:
        return self.rng.random() < self._invented_share

    def _invented(self) -> str:
        while True:
            if self._invented_before and self.rng.random() < _ALIKE_SHARE:
                word = alike_word(self.rng, self.one(self._invented_before))
            else:
                word = pieced_word(self.rng) if self.rng.random() < self._pieced_share else invented_word(self.rng)
            if word not in _known_words() and not (self._pieced_share and word in _vocabulary()[1]):
                self._invented_before.append(word)
                return word

    # --- identifiers and numbers

    def id_format(self) -> str:
        """Invented where words are: who has seen eighteen formats only knows them instead of copying."""
        invents = self._invents() and self.chance(_INVENTED_FORMAT_SHARE)
        return invented_format(self.rng) if invents else self.one(id_formats(self.split))

    def identifier(self, id_format: str) -> str:
        return "".join(self._character(character) for character in id_format)

    def _character(self, character: str) -> str:
        if character == "A":
            return self.one(_UPPER)
        if character == "a":
            return self.one(_LOWER)
        return str(int(self.rng.random() * 10)) if character == "9" else character

    def integer(self, low: int, high: int) -> int:
        """A whole number of this split from ``low`` to ``high``, both included."""
        for _ in range(_MAX_TRIES):
            number = self.between(low, high)
            if is_of(self.split, number):
                return number
        raise AssertionError(f"no number from {low} to {high} belongs to {self.split.value}")

    def measure(self, low: int, high: int) -> float:
        """A number of this split with one digit behind the point, never a whole one."""
        for _ in range(_MAX_TRIES):
            tenths = self.between(10 * low, 10 * high)
            if tenths % 10 and is_of(self.split, tenths / 10):
                return tenths / 10
        raise AssertionError(f"no number from {low} to {high} belongs to {self.split.value}")

    def date(self) -> str:
        month = self.between(1, 8) if self.split is Split.TRAINING else self.between(9, 12)
        return f"2026-{month:02}-{self.between(1, 28):02}"


@functools.cache
def _known_words() -> frozenset[str]:
    words = EVALUATION.all() | TRAINING.all()
    return frozenset(word.lower() for word in words)


@functools.cache
def _vocabulary() -> tuple[tuple[str, ...], frozenset[str]]:
    """The tokens that words are made of (longer ones belong to the templates), and the templates' own small words,
    which are other tokens behind a blank."""
    tokens = json.loads(_TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    pieces = tuple(token for token in tokens if re.fullmatch("[a-z]{1,7}", token))
    return pieces, frozenset(token[1:] for token in tokens if re.fullmatch("Ġ[a-z]+", token))


def pieced_word(rng: random.Random) -> str:
    """Four to twelve letters: one to three pieces."""
    pieces, small_words = _vocabulary()
    while True:
        word = "".join(_one(rng, pieces) for _ in range(_one(rng, (1, 2, 2, 3))))
        if 4 <= len(word) <= 12 and word not in small_words:
            return word


def alike_word(rng: random.Random, word: str) -> str:
    """Four to twelve letters that begin as another word does: only all of a word tells the two apart."""
    begins = word[: rng.randint(2, max(2, min(8, len(word) - 2)))]
    return begins + invented_word(rng)[-rng.randint(2, 4) :]


def invented_format(rng: random.Random) -> str:
    """Four to nine characters in one to three groups, letters and digits; none of the held-out formats."""
    while True:
        separator = rng.choice(("", "-", "-", "_"))
        groups = [rng.choice(_FORMAT_GROUPS) for _ in range(rng.choice((1, 2, 2, 3)))]
        made = separator.join(groups)
        held_out = made in _ID_FORMATS[Split.EVALUATION.value]
        if 4 <= len(made) <= 9 and "9" in made and re.search("[Aa]", made) and not held_out:
            return made


def invented_word(rng: random.Random) -> str:
    """Four letters at least: one to three syllables as in English, or (one of ten) any letters."""
    while True:
        if rng.random() < 0.1:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 8)))
        else:
            count = 1 + (rng.random() < 0.65) + (rng.random() < 0.1)
            word = "".join(_syllable(rng) for _ in range(count)) + _one(rng, _ENDINGS)
        if 4 <= len(word) <= 11:
            return word


def _syllable(rng: random.Random) -> str:
    return _one(rng, _ONSETS) + _one(rng, _NUCLEI) + _one(rng, _CODAS)


def _one(rng: random.Random, items: Sequence[Item]) -> Item:
    """As ``rng.choice``, in a third of its time."""
    return items[int(rng.random() * len(items))]
