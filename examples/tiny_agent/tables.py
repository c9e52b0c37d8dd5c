"""Small typed databases: the hidden state of a task.

A world has one to four tables; a record of one may name a record of another, so that a question can take several calls.
"""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass, field
from typing import Any

from examples.tiny_agent.values import Draw

Record = dict[str, Any]
Rows = dict[str, Record]


class Kind(enum.Enum):
    """What a field holds, as JSON and as it is spoken of."""

    QUANTITY = enum.auto()
    """A whole number."""
    MEASURE = enum.auto()
    """A number with a fraction."""
    FLAG = enum.auto()
    CHOICE = enum.auto()
    """One of a few words."""
    TEXT = enum.auto()
    """A person, a place, a date or a word."""
    LABELS = enum.auto()
    """A list of words."""
    SERIES = enum.auto()
    """A list of whole numbers."""
    PART = enum.auto()
    """An object of whole numbers."""
    REFERENCE = enum.auto()
    """The key of a record in another table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """choices: of CHOICE, the values; of LABELS, the words to choose from; of PART, the names of its numbers.
    target: of REFERENCE, the noun of the other table."""

    name: str
    kind: Kind
    choices: tuple[str, ...] = ()
    target: str = ""
    flavour: str = ""
    """Of TEXT: person, place, date, word or phrase (some words)."""
    low: int = 0
    high: int = 0

    def value(self, draw: Draw) -> Any:
        """A fresh value; not for references."""
        match self.kind:
            case Kind.QUANTITY:
                return draw.integer(self.low, self.high)
            case Kind.MEASURE:
                return draw.measure(self.low, self.high)
            case Kind.FLAG:
                return draw.chance(0.5)
            case Kind.CHOICE:
                return draw.one(self.choices)
            case Kind.LABELS:
                return draw.some(self.choices, draw.between(1, min(3, len(self.choices))))
            case Kind.SERIES:
                return [draw.integer(self.low, self.high) for _ in range(draw.between(2, 4))]
            case Kind.PART:
                return {name: draw.integer(self.low, self.high) for name in self.choices}
        match self.flavour:
            case "person":
                return draw.person()
            case "place":
                return draw.place()
            case "date":
                return draw.date()
            case "phrase":
                return " ".join(draw.repeatable(draw.words.tags) for _ in range(draw.between(2, 4)))
        return draw.repeatable(draw.words.tags)


@dataclass(slots=True, kw_only=True)
class Table:
    """noun: singular; key: the name of the identifier, key_parameter: as all tools of the table call it; extra: a
    note's name, shown on demand only."""

    noun: str
    key: str
    key_parameter: str
    id_format: str
    fields: tuple[Field, ...]
    extra: str
    rows: Rows = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Key to note."""
    next_keys: list[str] = field(default_factory=list)
    """Identifiers of records to come."""

    @property
    def plural(self) -> str:
        return f"{self.noun}s"

    def of_kind(self, *kinds: Kind) -> list[Field]:
        return [field for field in self.fields if field.kind in kinds]

    def field_named(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)


def make_table(draw: Draw, *, target: Table | None = None) -> Table:
    """A table with records. target: another table, whose records those of this one name."""
    words = draw.words
    fields = [_quantity(draw)]
    makers = [_quantity, _measure, _flag, _choice, _text, _labels, _series, _part]
    for maker in draw.some(makers, draw.between(2, 4)):
        fields.append(maker(draw))
    if target is not None:
        fields.append(Field(name=target.noun, kind=Kind.REFERENCE, target=target.noun))
    draw.rng.shuffle(fields)
    noun, key = draw.word(words.nouns), draw.recurring(words.keys)
    table = Table(
        noun=noun,
        key=key,
        key_parameter=draw.one((key, f"{noun}_{key}", noun)),
        id_format=draw.id_format(),
        fields=tuple(fields),
        extra=draw.word(words.extras),
    )
    for _ in range(draw.between(3, 7) if draw.chance(0.9) else draw.between(8, 20)):
        add_record(draw, table, target)
    table.next_keys = [new_key(draw, table) for _ in range(3)]
    return table


def add_record(draw: Draw, table: Table, target: Table | None) -> str:
    """Adds one record; returns its key."""
    key = new_key(draw, table)
    references = list(target.rows) if target is not None else []
    table.rows[key] = {
        field.name: draw.one(references) if field.kind is Kind.REFERENCE else field.value(draw)
        for field in table.fields
    }
    table.notes[key] = " ".join(draw.repeatable(draw.words.tags) for _ in range(2))
    return key


def new_key(draw: Draw, table: Table) -> str:
    """An identifier that no record has or will get."""
    while True:
        key = draw.identifier(table.id_format)
        if key not in table.rows and key not in table.next_keys:
            return key


def _quantity(draw: Draw) -> Field:
    high = draw.one((40, 99, 400, 999))
    return Field(name=draw.word(draw.words.quantities), kind=Kind.QUANTITY, low=10, high=high)


def _measure(draw: Draw) -> Field:
    return Field(name=draw.word(draw.words.measures), kind=Kind.MEASURE, low=1, high=draw.one((9, 50, 200)))


def _flag(draw: Draw) -> Field:
    return Field(name=draw.word(draw.words.flags), kind=Kind.FLAG)


def _choice(draw: Draw) -> Field:
    name, values = draw.enumeration()
    return Field(name=name, kind=Kind.CHOICE, choices=values)


def _text(draw: Draw) -> Field:
    flavour = draw.one(("person", "person", "place", "date", "word", "phrase"))
    return Field(name=draw.word(draw.words.texts), kind=Kind.TEXT, flavour=flavour)


def _labels(draw: Draw) -> Field:
    choices = tuple(dict.fromkeys(draw.word(draw.words.tags) for _ in range(draw.between(3, 6))))
    return Field(name=draw.word(draw.words.labels), kind=Kind.LABELS, choices=choices)


def _series(draw: Draw) -> Field:
    return Field(name=draw.word(draw.words.series), kind=Kind.SERIES, low=1, high=draw.one((9, 60, 400)))


def _part(draw: Draw) -> Field:
    names = tuple(draw.word(draw.words.dimensions) for _ in range(2))
    return Field(name=draw.word(draw.words.parts), kind=Kind.PART, choices=names, low=1, high=draw.one((9, 60)))


@dataclass(slots=True, kw_only=True)
class Fault:
    """An answer that a tool gives in place of its own, for a given key, ``times`` times."""

    tool: str
    key: str
    message: str
    times: int = 1


@dataclass(slots=True, kw_only=True)
class World:
    """Tables by noun, faults that are to come, and what tools have handed out.

    locked: (noun, key) of records that answer only after they were released. receipts: to hand out, in order.
    """

    tables: dict[str, Table]
    faults: list[Fault] = field(default_factory=list)
    locked: set[tuple[str, str]] = field(default_factory=set)
    receipts: list[str] = field(default_factory=list)

    def state(self) -> dict[str, Rows]:
        """A copy of all records."""
        return {noun: copy.deepcopy(table.rows) for noun, table in self.tables.items()}


def make_world(draw: Draw, *, num_tables: int) -> World:
    """Tables that form a chain: each record of one names a record of the table before it."""
    tables: dict[str, Table] = {}
    target: Table | None = None
    for _ in range(num_tables):
        target = make_table(draw, target=target)
        tables[target.noun] = target
    receipts = [draw.identifier(draw.id_format()) for _ in range(8)]
    return World(tables=tables, receipts=receipts)
