from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router.stop_strings import StopStrings


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    strings=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 1 << 30),
    base=st.integers(0, 1000),
)
def test_agrees_with_a_plain_search(text: str, strings: list[str], seed: int, base: int) -> None:
    matcher, rng = StopStrings(strings), random.Random(seed)
    shown, match, position = "", None, 0
    while position < len(text) and match is None:
        piece = text[position : position + rng.randint(0, 4)]
        passed, match = matcher.feed(piece, base + position)
        shown, position = shown + passed, position + len(piece)
        assert text.startswith(shown)
    ends = [(text.find(string) + len(string), -len(string)) for string in strings if string in text]
    if not ends:
        assert match is None
        assert shown + matcher.flush() == text
        return
    end, length = min(ends)
    assert match == base + end + length
    assert shown == text[: end + length]


def test_a_string_inside_the_beginning_of_another() -> None:
    assert StopStrings(["xabz", "ab"]).feed("1xab", 10) == ("1x", 12)


def test_no_more_than_the_beginning_of_a_string_is_withheld() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.feed("a ST", 0) == ("a ", None)
    assert matcher.feed("A", 4) == ("STA", None)
    assert matcher.feed("S", 5) == ("", None)
    assert matcher.flush() == "S"
    assert matcher.feed("TOP", 90) == ("TOP", None)


def test_without_strings_everything_passes() -> None:
    assert StopStrings([]).feed("a\n", 0) == ("a\n", None)
