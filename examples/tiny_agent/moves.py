"""Calls that a question may take, each with its arguments, its thought and what a checker can ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.tiny_agent import phrases
from examples.tiny_agent.shapes import Parameter, ParameterType
from examples.tiny_agent.tables import Field, Kind, Record, Table
from examples.tiny_agent.tools import Action, Arguments, Calculator, Create, Lookup, Search, Update
from examples.tiny_agent.turns import Evidence, Scene, Script
from examples.tiny_agent.values import Draw

Asked = dict[str, Any]


def readable_fields(table: Table) -> list[Field]:
    """Fields whose values are worth asking for."""
    return [field for field in table.fields if field.kind is not Kind.REFERENCE]


def lookup_arguments(lookup: Lookup, key: str, fields: Sequence[Field], *, extra: bool = False) -> Arguments:
    """Selects the fields where the tool has a selection; asks for the note only where it is wanted or must be said."""
    arguments: Arguments = {lookup.key: key}
    for parameter in lookup.parameters:
        if parameter.name == lookup.selection:
            arguments[lookup.selection] = [field.name for field in fields]
        elif parameter.name == lookup.extra and (extra or parameter.required):
            arguments[lookup.extra] = extra
    return arguments


def look_up(script: Script, table: Table, key: str, fields: Sequence[Field]) -> Record:
    """Look a record up; the thought says which tool."""
    lookup = script.scene.lookup(table)
    names = phrases.listed([field.name for field in fields])
    script.think(f"I need the {names} of {phrases.record(table, key)}. {lookup.choice()}.")
    result = script.call(lookup, lookup_arguments(lookup, key, fields))
    script.scene.known.shown += [(table.noun, key, name) for name in result if name in _names(table)]
    return dict(result)


def evidence(table: Table, key: str, fields: Sequence[Field]) -> tuple[Evidence, ...]:
    """That results showed these fields of a record, as they are now."""
    record = table.rows[key]
    return tuple(Evidence(key_name=table.key, key=key, field=field.name, value=record[field.name]) for field in fields)


def answer_values(field: Field, value: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """What an answer must hold for a field: (values, one of these phrases)."""
    if field.kind is Kind.FLAG:
        return ((), ("yes",)) if value else ((), ("no", f"not {field.name}"))
    if isinstance(value, list):
        return tuple(value), ()
    if isinstance(value, dict):
        return tuple(value.values()), ()
    return (value,), ()


def rival_values(table: Table, key: str, field: Field) -> tuple[Any, ...]:
    """Values of the same field in other records, which a guess might name."""
    own = table.rows[key].get(field.name)
    if field.kind not in (Kind.QUANTITY, Kind.MEASURE, Kind.TEXT, Kind.CHOICE):
        return ()
    others = [record.get(field.name) for other, record in table.rows.items() if other != key]
    return tuple(value for value in others if value is not None and value != own)


# --- searching


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A search that was drawn: the conditions as they are said, the arguments, and the limit ("" where none)."""

    tool: Search
    said: str
    arguments: Arguments
    limit: int = 0


def draw_query(scene: Scene, tool: Search, *, limited: bool = True) -> Query:
    """Conditions that one record at least fulfils."""
    draw, table = scene.draw, scene.world.tables[tool.noun]
    record = table.rows[draw.one(list(table.rows))]
    chosen = draw.some(tool.filters, draw.between(1, min(2, len(tool.filters))))
    said, wanted = [], {}
    for condition in chosen:
        field = table.field_named(condition.field)
        value = record[field.name]
        if condition.bound:
            value = _bound(draw, value, condition.bound)
        elif isinstance(value, list):
            value = draw.some(value, draw.between(1, len(value)))
        wanted[condition.parameter] = value
        said.append(phrases.condition(field, condition.bound, value))
    arguments: Arguments = {tool.group: wanted} if tool.group else wanted
    limit = 0
    if tool.limit:
        required = next(parameter.required for parameter in tool.parameters if parameter.name == tool.limit)
        if required or (limited and draw.chance(0.5)):
            limit = draw.between(1, 9)
            arguments = {**arguments, tool.limit: limit}
    return Query(tool=tool, said=phrases.listed(said), arguments=arguments, limit=limit)


def _bound(draw: Draw, value: float, bound: str) -> float:
    """A number of the split, a little below or above a value."""
    if isinstance(value, int):
        return draw.integer(max(0, value - 12), value) if bound == "min" else draw.integer(value, value + 12)
    whole = int(value)
    return draw.measure(max(0, whole - 4), max(1, whole)) if bound == "min" else draw.measure(whole + 1, whole + 5)


# --- changing


def updatable(scene: Scene, tool: Update) -> list[Field]:
    """Fields that a tool changes."""
    table = scene.world.tables[tool.noun]
    inner = value_parameters(tool)
    return [table.field_named(parameter.name) for parameter in inner]


def value_parameters(tool: Update | Create) -> tuple[Parameter, ...]:
    """The parameters that hold fields' values."""
    for parameter in tool.parameters:
        if tool.group and parameter.name == tool.group:
            return parameter.inner
    key = tool.key if isinstance(tool, Update) else ""
    return tuple(parameter for parameter in tool.parameters if parameter.name != key)


def new_value(scene: Scene, field: Field, old: Any = None) -> Any:
    """A value other than the old one; of a reference, a record that exists."""
    for _ in range(30):
        if field.kind is Kind.REFERENCE:
            value: Any = scene.draw.one(list(scene.world.tables[field.target].rows))
        else:
            value = field.value(scene.draw)
        if value != old:
            break
    return value


def update_arguments(tool: Update, key: str, values: Asked) -> Arguments:
    return {tool.key: key, tool.group: values} if tool.group else {tool.key: key, **values}


def create_arguments(tool: Create, values: Asked) -> Arguments:
    return {tool.group: values} if tool.group else dict(values)


def action_arguments(scene: Scene, tool: Action, key: str, amount: int) -> tuple[Arguments, str]:
    """Arguments, and what has to be said for those that are neither key nor amount."""
    arguments: Arguments = {tool.key: key, tool.amount: amount}
    said = ""
    for parameter in tool.parameters:
        if parameter.type is ParameterType.BOOLEAN:
            flag = scene.draw.chance(0.5)
            arguments[parameter.name] = flag
            said = f", {parameter.name}" if flag else f", not {parameter.name}"
    return arguments, said


def verb_of(tool_description: str) -> str:
    """The verb of a tool that is described as ``To VERB …``."""
    return tool_description.split()[1]


# --- calculating


def calculate(script: Script, calculator: Calculator, operator: str, numbers: Sequence[float]) -> float:
    """One call, or for a calculator of two numbers as many as it takes."""
    written = f" {operator} ".join(map(str, numbers))
    script.think(f"{written}: {calculator.name}.")
    if calculator.takes_many or len(numbers) == 2:
        return float_or_int(script.call(calculator, calculator.arguments(operator, list(numbers)))["result"])
    value: float = numbers[0]
    for i, number in enumerate(numbers[1:]):
        if i:
            script.think(f"So far {value}. {value} {operator} {number}: {calculator.name}.")
        value = script.call(calculator, calculator.arguments(operator, [value, number]))["result"]
    return value


def float_or_int(value: Any) -> float:
    assert isinstance(value, int | float), "a calculator gives a number"
    return value


def _names(table: Table) -> set[str]:
    return {field.name for field in table.fields}
