"""JSON as RFC 8259 means it: what Python's reader lets through (NaN, duplicate keys, lone surrogates) is refused."""

from __future__ import annotations

import json
from typing import Any

from seamount.wire import limits


def parse(text: str, max_depth: int = limits.MAX_JSON_DEPTH) -> Any:
    """The value of a JSON text; key order is kept.

    Raises ``ValueError``, its message free of content: no JSON, NaN or an infinity (also by overflow), a key twice in
    one object, a lone surrogate, an integer of over 4300 digits, more than ``max_depth`` nested arrays and objects.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON (character {error.pos})") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {max_depth}") from None
    _check(value, max_depth)
    return value


def dump(value: object) -> str:
    """The one form in which JSON is rendered and delivered: ``", "`` and ``": "``, nothing escaped without need."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _refuse_constant(_: str) -> Any:
    raise ValueError("NaN and Infinity are not JSON")


def _check(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _check_string(key)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                _check_string(item)
            elif isinstance(item, float) and item - item != 0.0:
                raise ValueError("a number is too large")
        if not below and not any(isinstance(item, dict | list) for item in level):
            return
        level = below
    raise ValueError(f"it is nested deeper than {max_depth}")


def _check_string(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds a lone surrogate") from None
