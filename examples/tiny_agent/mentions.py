"""Whether a text names a value: numbers as numbers, everything else as whole words in any case."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])(?<![\w]-)-?\d+(?:\.\d+)?(?![\w])(?!-\w)(?!\.\d)")


def numbers_in(text: str) -> Iterator[tuple[int, float]]:
    """(Position, number) of every number that stands by itself, not as a part of an identifier or a date."""
    for match in _NUMBER.finditer(text):
        yield match.start(), float(match.group())


def position_of(text: str, value: Any, start: int = 0) -> int:
    """Where a text first names a value, from ``start`` on; -1 if it does not."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return next((at for at, number in numbers_in(text) if at >= start and number == float(value)), -1)
    wanted = str(value).lower()
    if not wanted:
        return -1
    before = r"(?<!\w)(?<!\w-)" if wanted[0].isalnum() else ""
    after = r"(?!\w)(?!-\w)" if wanted[-1].isalnum() else ""
    match = re.compile(before + re.escape(wanted) + after).search(text.lower(), start)
    return match.start() if match else -1


def mentions(text: str, value: Any) -> bool:
    return position_of(text, value) >= 0
