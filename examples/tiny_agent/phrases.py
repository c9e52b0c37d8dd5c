"""How values, fields and records are spoken of. Small words are shared by all tasks, everything else is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.tiny_agent.tables import Field, Kind, Table
from examples.tiny_agent.values import Draw

SIGN_WORDS = {"+": "plus", "-": "minus", "*": "times"}


def listed(items: Sequence[str], last: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def spoken(value: Any) -> str:
    """A value in a sentence."""
    if isinstance(value, list):
        return listed([str(item) for item in value])
    if isinstance(value, dict):
        return listed([f"{name} {number}" for name, number in value.items()])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def assignment(field: Field, value: Any) -> str:
    """``price 30``, ``not insured``, ``tags soft and hard``, ``frame row 3 and zone 4``."""
    if field.kind is Kind.FLAG:
        return field.name if value else f"not {field.name}"
    return f"{field.name} {spoken(value)}"


def condition(field: Field, bound: str, value: Any) -> str:
    """``price at least 30`` or an assignment."""
    if bound:
        return f"{field.name} at {'least' if bound == 'min' else 'most'} {value}"
    return assignment(field, value)


def record(table: Table, key: str) -> str:
    return f"{table.noun} {key}"


def question(draw: Draw, fields: Sequence[Field], subject: str) -> str:
    """Asks for fields of a record; of a flag alone it asks yes or no."""
    if len(fields) == 1 and fields[0].kind is Kind.FLAG:
        name = fields[0].name
        return draw.one(
            (f"Is {subject} {name}?", f"Tell me whether {subject} is {name}.", f"{subject}: {name} or not?")
        )
    names = listed([field.name for field in fields])
    verb = "is" if len(fields) == 1 else "are"
    return draw.one(
        (
            f"What {verb} the {names} of {subject}?",
            f"Tell me the {names} of {subject}.",
            f"I need the {names} of {subject}.",
            f"Please look up the {names} of {subject}.",
        )
    )


def compared(name: str, numbers: Sequence[tuple[str, float]]) -> str:
    """Numbers of records that are to be compared. The key comes again behind each: who finds the best number need not
    look back for its key."""
    return f"{name}: {', '.join(f'{key} has {number} ({key})' for key, number in numbers)}."


def statement(field: Field, subject: str, value: Any) -> str:
    """One field's value, as an answer."""
    if field.kind is Kind.FLAG:
        return f"Yes, {subject} is {field.name}." if value else f"No, {subject} is not {field.name}."
    return f"The {field.name} of {subject} is {spoken(value)}."


def statements(fields: Sequence[Field], subject: str, values: dict[str, Any]) -> str:
    """Several fields' values, as an answer."""
    if len(fields) == 1:
        return statement(fields[0], subject, values[fields[0].name])
    return f"{subject}: {listed([assignment(field, values[field.name]) for field in fields])}."


def finding(fields: Sequence[Field], values: dict[str, Any]) -> str:
    """What a result says, as a thought."""
    return f"It says {listed([f'{field.name} {spoken(values[field.name])}' for field in fields])}."
