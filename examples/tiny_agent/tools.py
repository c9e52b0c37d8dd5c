"""Tools over a world: their schemas, and what a call does to the hidden state.

A result is compact JSON; a call that cannot be done gives ``{"error": …}`` and changes nothing.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from examples.tiny_agent.shapes import Parameter, object_schema, signature
from examples.tiny_agent.tables import Kind, Record, Table, World

Arguments = dict[str, Any]
Result = dict[str, Any]


class ToolError(Exception):
    """A call cannot be done; the text is what the caller reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool(ABC):
    """noun: of the table that it works on; empty for a calculator. purpose: what its description begins with, no two
    tools of a toolbox alike."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    noun: str = ""
    purpose: str = ""

    def function(self) -> dict[str, Any]:
        """Name, description and JSON schema of the parameters, as the model reads them."""
        return {"name": self.name, "description": self.description, "parameters": object_schema(self.parameters)}

    def function_json(self) -> str:
        return json.dumps(self.function(), ensure_ascii=False)

    def choice(self) -> str:
        """As a thought names it: quoting what it is for leads to its name, which stands before the description."""
        return f"{self.purpose}: {self.name}" if self.purpose else self.name

    def shape(self) -> str:
        return signature(self.parameters)

    @abstractmethod
    def run(self, world: World, arguments: Arguments) -> Result:
        """Do it. ``arguments`` are valid under the schema. Raises ``ToolError``; nothing has changed then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordTool(Tool):
    """A tool that works on one record, named by its key. key: the parameter's name."""

    key: str

    def record(self, world: World, arguments: Arguments) -> tuple[str, Record]:
        """The record's key and the record itself; faults and locks come before it."""
        key = str(arguments[self.key])
        for fault in world.faults:
            if fault.times and fault.tool == self.name and fault.key == key:
                fault.times -= 1
                raise ToolError(fault.message)
        table = world.tables[self.noun]
        if key not in table.rows:
            raise ToolError(f"no {self.noun} {key}")
        if (self.noun, key) in world.locked and not isinstance(self, Release):
            raise ToolError(f"{self.noun} {key} is locked")
        return key, table.rows[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup(RecordTool):
    """One record. selection: the parameter that lists the fields wanted; extra: the one that asks for the note."""

    selection: str = ""
    extra: str = ""

    def run(self, world: World, arguments: Arguments) -> Result:
        key, record = self.record(world, arguments)
        table = world.tables[self.noun]
        names = arguments.get(self.selection) or [field.name for field in table.fields]
        result: Result = {table.key: key, **{name: record[name] for name in names}}
        if self.extra and arguments.get(self.extra):
            result[table.extra] = table.notes[key]
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One condition of a search. bound: "" for equal (or, of labels, all contained), "min" or "max"."""

    parameter: str
    field: str
    bound: str = ""

    def holds(self, record: Record, wanted: Any) -> bool:
        value = record[self.field]
        if self.bound == "min":
            return bool(value >= wanted)
        if self.bound == "max":
            return bool(value <= wanted)
        return set(wanted) <= set(value) if isinstance(value, list) else bool(value == wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search(Tool):
    """The records that fulfil all conditions. group: the object parameter that holds the conditions, or "".
    shown: the fields of a hit; limit: the parameter for the most hits, or ""."""

    filters: tuple[Filter, ...]
    shown: tuple[str, ...]
    group: str = ""
    limit: str = ""

    def run(self, world: World, arguments: Arguments) -> Result:
        for fault in world.faults:
            if fault.times and fault.tool == self.name:
                fault.times -= 1
                raise ToolError(fault.message)
        table = world.tables[self.noun]
        wanted = arguments.get(self.group, {}) if self.group else arguments
        hits = [
            {table.key: key, **{name: record[name] for name in self.shown}}
            for key, record in table.rows.items()
            if all(
                condition.holds(record, wanted[condition.parameter])
                for condition in self.filters
                if condition.parameter in wanted
            )
        ]
        limit = arguments.get(self.limit, len(hits)) if self.limit else len(hits)
        return {table.plural: hits[: max(0, limit)]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(RecordTool):
    """Changes fields of a record. group: the object parameter that holds the new values, or ""."""

    group: str = ""

    def run(self, world: World, arguments: Arguments) -> Result:
        key, record = self.record(world, arguments)
        values = arguments[self.group] if self.group else {k: v for k, v in arguments.items() if k != self.key}
        if not values:
            raise ToolError("nothing to change")
        _check_values(world.tables[self.noun], world, values)
        record.update(values)
        return {"ok": True, world.tables[self.noun].key: key}


@dataclass(frozen=True, slots=True, kw_only=True)
class Create(Tool):
    """A new record; the answer is its key. group: the object parameter that holds its values, or ""."""

    group: str = ""

    def run(self, world: World, arguments: Arguments) -> Result:
        table = world.tables[self.noun]
        values = arguments[self.group] if self.group else arguments
        _check_values(table, world, values)
        if not table.next_keys:
            raise ToolError("full")
        key = table.next_keys.pop(0)
        table.rows[key] = {field.name: values[field.name] for field in table.fields if field.name in values}
        table.notes[key] = "new"
        return {table.key: key}


@dataclass(frozen=True, slots=True, kw_only=True)
class Action(RecordTool):
    """Takes some of a record's quantity; the answer is a receipt. amount: the parameter; field: the quantity."""

    field: str
    amount: str
    receipt: str

    def run(self, world: World, arguments: Arguments) -> Result:
        _, record = self.record(world, arguments)
        amount, available = arguments[self.amount], record[self.field]
        if not 0 < amount <= available:
            raise ToolError(f"at most {available}")
        if not world.receipts:
            raise ToolError("closed")
        record[self.field] = available - amount
        return {self.receipt: world.receipts.pop(0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(RecordTool):
    """Makes a locked record answer again."""

    def run(self, world: World, arguments: Arguments) -> Result:
        key, _ = self.record(world, arguments)
        world.locked.discard((self.noun, key))
        return {"ok": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calculator(Tool):
    """Adds, subtracts, multiplies. Either ``left``, ``operator`` and ``right`` are parameters, or ``operator`` and
    ``numbers``, an array, or ``expression`` alone, a text such as "12+30+4"."""

    operator: str = ""
    left: str = ""
    right: str = ""
    numbers: str = ""
    expression: str = ""

    def run(self, world: World, arguments: Arguments) -> Result:
        if self.expression:
            operator, numbers = _parse(arguments[self.expression])
        elif self.numbers:
            operator, numbers = arguments[self.operator], arguments[self.numbers]
        else:
            operator, numbers = arguments[self.operator], [arguments[self.left], arguments[self.right]]
        return {"result": calculate(operator, numbers)}

    def arguments(self, operator: str, numbers: list[float]) -> Arguments:
        """Of a call, in the order of the parameters."""
        if self.expression:
            return {self.expression: operator.join(map(str, numbers))}
        if self.numbers:
            values: Arguments = {self.operator: operator, self.numbers: numbers}
        else:
            values = {self.operator: operator, self.left: numbers[0], self.right: numbers[1]}
        return {parameter.name: values[parameter.name] for parameter in self.parameters}

    @property
    def takes_many(self) -> bool:
        """Whether one call may have more than two numbers."""
        return bool(self.numbers or self.expression)


def calculate(operator: str, numbers: list[float]) -> float:
    """From left to right, rounded to two digits; whole where all numbers are. Raises ``ToolError``."""
    if not numbers:
        raise ToolError("no numbers")
    value = numbers[0]
    for number in numbers[1:]:
        if operator == "+":
            value += number
        elif operator == "-":
            value -= number
        elif operator == "*":
            value *= number
        else:
            raise ToolError(f"unknown operator {operator}")
    return round(value, 2)


def _parse(expression: str) -> tuple[str, list[float]]:
    """An expression with one kind of operator. Raises ``ToolError``."""
    text = expression.replace(" ", "")
    for operator in ("*", "+", "-"):
        if operator in text:
            try:
                return operator, [_number(part) for part in text.split(operator)]
            except ValueError:
                break
    raise ToolError("bad expression")


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


def _check_values(table: Table, world: World, values: Arguments) -> None:
    for name, value in values.items():
        field = table.field_named(name)
        if field.kind is Kind.REFERENCE and value not in world.tables[field.target].rows:
            raise ToolError(f"no {field.target} {value}")


def ordered(tool: Tool, values: Arguments) -> Arguments:
    """Values in the order of the tool's parameters; objects inside likewise."""
    return _ordered(tool.parameters, values)


def _ordered(parameters: tuple[Parameter, ...], values: Arguments) -> Arguments:
    return {
        parameter.name: _ordered(parameter.inner, values[parameter.name]) if parameter.inner else values[parameter.name]
        for parameter in parameters
        if parameter.name in values
    }


def result_json(result: Result) -> str:
    """As a tool message carries it."""
    return json.dumps(result, ensure_ascii=False, separators=(",", ":"))


def execute(tool: Tool, world: World, arguments: Arguments) -> Result:
    """Run a call; an error becomes a result."""
    try:
        return tool.run(world, arguments)
    except ToolError as error:
        return {"error": str(error)}
