"""Makes the tools of a world: random names, parameters, order, grouping; shapes of the right split only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypedDict, TypeVar

from examples.tiny_agent.shapes import NoVariant, Parameter, ParameterType, signature, split_of
from examples.tiny_agent.tables import Field, Kind, Table, World
from examples.tiny_agent.tools import Action, Calculator, Create, Filter, Lookup, Release, Search, Tool, Update
from examples.tiny_agent.values import Draw

OPERATORS = ("+", "-", "*")
_TYPE_OF_KIND = {
    Kind.QUANTITY: ParameterType.INTEGER,
    Kind.MEASURE: ParameterType.NUMBER,
    Kind.FLAG: ParameterType.BOOLEAN,
    Kind.CHOICE: ParameterType.ENUM,
    Kind.TEXT: ParameterType.STRING,
    Kind.REFERENCE: ParameterType.STRING,
    Kind.SERIES: ParameterType.NUMBERS,
    Kind.PART: ParameterType.OBJECT,
}
_Parameters = tuple[Parameter, ...]
T = TypeVar("T", bound=Tool)


@dataclass(slots=True, kw_only=True)
class Toolbox:
    """Tools by what they do; ``tools`` is the order in which the model sees them."""

    tools: list[Tool] = field(default_factory=list)

    def named(self, name: str) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == name), None)

    def find(self, kind: type[T], noun: str = "") -> T | None:
        return next(self.all(kind, noun), None)

    def all(self, kind: type[T], noun: str = "") -> Iterator[T]:
        return (tool for tool in self.tools if isinstance(tool, kind) and noun in ("", tool.noun))


def make_toolbox(draw: Draw, world: World, *, max_tools: int, full: bool = False) -> Toolbox:
    """A look-up for every table, a calculator mostly, and a random choice of the others, ``max_tools`` together.

    full: a calculator and an update of every table for certain, so that long chains of calls are possible. Of two tools
    with one name the first is kept. Raises ``NoVariant`` where that leaves a table without its look-up.
    """
    makers: list[Callable[[], Tool | None]] = []
    for table in world.tables.values():
        makers += [
            lambda table=table: make_search(draw, table),  # type: ignore[misc]
            lambda table=table: make_create(draw, table),  # type: ignore[misc]
            lambda table=table: make_action(draw, table),  # type: ignore[misc]
            lambda table=table: make_release(draw, table),  # type: ignore[misc]
        ]
    tools: list[Tool | None] = [make_lookup(draw, table) for table in world.tables.values()]
    if full:
        tools += [make_calculator(draw), *(make_update(draw, table) for table in world.tables.values())]
    else:
        makers += [lambda table=table: make_update(draw, table) for table in world.tables.values()]  # type: ignore[misc]
        makers += [lambda: make_calculator(draw)] if draw.chance(0.7) else []
    for maker in draw.some(makers, max(0, min(len(makers), max_tools - len(tools)))):
        tools.append(maker())
    made: dict[str, Tool] = {}
    for tool in tools:
        if tool is not None:
            made.setdefault(tool.name, tool)
    if sum(isinstance(tool, Lookup) for tool in made.values()) < len(world.tables):
        raise NoVariant("two look-ups have one name")
    shuffled = list(made.values())
    draw.rng.shuffle(shuffled)
    return Toolbox(tools=shuffled)


# --- one tool of each kind


def make_lookup(draw: Draw, table: Table) -> Lookup:
    key_name = table.key_parameter
    selection = draw.word(draw.words.changes)

    def build() -> _Parameters:
        parameters = [_key(draw, table, key_name)]
        if draw.chance(0.5):
            names = tuple(field.name for field in table.fields)
            parameters.append(
                Parameter(
                    name=selection,
                    type=ParameterType.CHOICES,
                    choices=names,
                    required=draw.chance(0.5),
                    about=_maybe(draw, "which fields"),
                )
            )
        if draw.chance(0.6):
            parameters.append(
                Parameter(
                    name=table.extra,
                    type=ParameterType.BOOLEAN,
                    required=draw.chance(0.6),
                    about=_maybe(draw, f"with {table.extra} or without"),
                )
            )
        return tuple(parameters)

    parameters = _of_split(draw, build)
    names = {parameter.name for parameter in parameters}
    purpose, rest = draw.one((("Returns one", ""), ("Details of one", f" by {table.key}")))
    return Lookup(
        name=_tool_name(draw, draw.words.lookup_verbs, table.noun),
        **_described(f"{purpose} {table.noun}", rest),
        parameters=parameters,
        noun=table.noun,
        key=key_name,
        selection=selection if selection in names else "",
        extra=table.extra if table.extra in names else "",
    )


def make_search(draw: Draw, table: Table) -> Search:
    group, limit = draw.word(draw.words.changes), draw.word(draw.words.limits)
    fields = [field for field in table.fields if field.kind not in (Kind.SERIES, Kind.PART, Kind.REFERENCE)]
    conditions = [_condition(draw, field) for field in draw.some(fields, min(len(fields), draw.between(1, 3)))]

    def build() -> _Parameters:
        grouped = draw.chance(0.25)
        inner = [
            parameter(draw, field, name=condition.parameter, required=False, about=_bound_text(condition))
            for condition, field in conditions
        ]
        draw.rng.shuffle(inner)
        parameters = (
            [Parameter(name=group, type=ParameterType.OBJECT, inner=tuple(inner), required=True)] if grouped else inner
        )
        if draw.chance(0.7):
            about = _maybe(draw, "at most so many")
            parameters.append(Parameter(name=limit, type=ParameterType.INTEGER, required=draw.chance(0.6), about=about))
        return tuple(parameters)

    parameters = _of_split(draw, build)
    names = {parameter.name for parameter in parameters}
    numbers = [field.name for field in table.of_kind(Kind.QUANTITY, Kind.MEASURE)]
    shown = draw.some(numbers, min(len(numbers), draw.between(1, 2)))
    purpose, rest = draw.one((("Lists the", " that match"), ("All", " with given values")))
    return Search(
        name=_tool_name(draw, draw.words.search_verbs, table.plural),
        **_described(f"{purpose} {table.plural}", rest),
        parameters=parameters,
        noun=table.noun,
        filters=tuple(condition for condition, _ in conditions),
        shown=tuple(shown),
        group=group if group in names else "",
        limit=limit if limit in names else "",
    )


def make_update(draw: Draw, table: Table) -> Update:
    key_name, group = table.key_parameter, draw.word(draw.words.changes)
    fields: list[Field] = []

    def build() -> _Parameters:
        fields[:] = draw.some(table.fields, draw.between(1, min(3, len(table.fields))))
        grouped = draw.chance(0.4)
        optional = grouped or len(fields) > 1
        values = [
            parameter(draw, field, required=not optional, about=_maybe(draw, f"new {field.name}")) for field in fields
        ]
        draw.rng.shuffle(values)
        new = [Parameter(name=group, type=ParameterType.OBJECT, inner=tuple(values))] if grouped else values
        new.insert(draw.between(0, len(new)), _key(draw, table, key_name))
        return tuple(new)

    parameters = _of_split(draw, build)
    grouped = any(parameter.name == group for parameter in parameters)
    suffix = f"_{fields[0].name}" if len(fields) == 1 and draw.chance(0.7) else ""
    what = " or ".join(field.name for field in fields)
    purpose, rest = draw.one((("Changes one", f": {what}"), ("Gives one", f" a new {what}")))
    return Update(
        name=_tool_name(draw, draw.words.update_verbs, table.noun + suffix),
        **_described(f"{purpose} {table.noun}", rest),
        parameters=parameters,
        noun=table.noun,
        key=key_name,
        group=group if grouped else "",
    )


def make_create(draw: Draw, table: Table) -> Create:
    group = draw.word(draw.words.changes)

    def build() -> _Parameters:
        values = [parameter(draw, field, about=_maybe(draw, f"its {field.name}")) for field in table.fields]
        draw.rng.shuffle(values)
        if draw.chance(0.3):
            return (Parameter(name=group, type=ParameterType.OBJECT, inner=tuple(values)),)
        return tuple(values)

    parameters = _of_split(draw, build)
    purpose, rest = draw.one((("Adds a new", ""), ("Makes a new", f" and returns its {table.key}")))
    return Create(
        name=_tool_name(draw, draw.words.create_verbs, table.noun),
        **_described(f"{purpose} {table.noun}", rest),
        parameters=parameters,
        noun=table.noun,
        group=group if parameters[0].name == group else "",
    )


def make_action(draw: Draw, table: Table) -> Action:
    quantity = draw.one(table.of_kind(Kind.QUANTITY))
    key_name, flag = table.key_parameter, draw.word(draw.words.flags)
    verb, receipt = draw.recurring(draw.words.action_verbs), draw.word(draw.words.receipts)

    def build() -> _Parameters:
        parameters = [
            _key(draw, table, key_name),
            Parameter(name=quantity.name, type=ParameterType.INTEGER, about=_maybe(draw, "how many")),
        ]
        if draw.chance(0.5):
            about = _maybe(draw, f"{flag} or not")
            parameters.append(Parameter(name=flag, type=ParameterType.BOOLEAN, about=about))
        draw.rng.shuffle(parameters)
        return tuple(parameters)

    return Action(
        name=_tool_name(draw, (verb,), table.noun),
        **_described(f"To {verb} {quantity.name} of one {table.noun}", f"; gives a {receipt}"),
        parameters=_of_split(draw, build),
        noun=table.noun,
        key=key_name,
        field=quantity.name,
        amount=quantity.name,
        receipt=receipt,
    )


def make_release(draw: Draw, table: Table) -> Release:
    key_name, flag = table.key_parameter, draw.word(draw.words.flags)
    verb = draw.recurring(draw.words.release_verbs)

    def build() -> _Parameters:
        parameters = [_key(draw, table, key_name)]
        if draw.chance(0.5):
            about = _maybe(draw, f"{flag} or not")
            parameters.append(Parameter(name=flag, type=ParameterType.BOOLEAN, required=draw.chance(0.5), about=about))
        draw.rng.shuffle(parameters)
        return tuple(parameters)

    return Release(
        name=_tool_name(draw, (verb,), table.noun),
        **_described(f"To {verb} one {table.noun}", " that is locked"),
        parameters=_of_split(draw, build),
        noun=table.noun,
        key=key_name,
    )


def make_calculator(draw: Draw) -> Calculator:
    """Of two numbers' parameters the first in order is the left one: their names are any words."""
    words = draw.words
    name = draw.repeatable(words.calculator_nouns)
    operator, left, right = (draw.word(words.operators), *(draw.word(words.calculator_operands) for _ in range(2)))
    form = draw.one(("pair", "list", "list", "text"))

    def build() -> _Parameters:
        about = _maybe(draw, "what to do")
        sign = Parameter(name=operator, type=ParameterType.ENUM, choices=OPERATORS, about=about)
        match form:
            case "pair":
                parameters = [_number(draw, operand) for operand in (left, right)]
                parameters.insert(draw.between(0, 2), sign)
            case "list":
                about = _maybe(draw, "the numbers")
                parameters = [sign, Parameter(name=left, type=ParameterType.NUMBERS, about=about)]
                draw.rng.shuffle(parameters)
            case _:
                about = _maybe(draw, "such as 2+3 or 4*5")
                parameters = [Parameter(name=left, type=ParameterType.STRING, about=about)]
                if draw.chance(0.5):
                    spare = Parameter(name=operator, type=ParameterType.INTEGER, required=False)
                    parameters.insert(draw.between(0, 1), spare)
        return tuple(parameters)

    parameters = _of_split(draw, build)
    return Calculator(
        name=name,
        description=draw.one(("Adds, subtracts or multiplies numbers.", "Works out a sum, difference or product.")),
        parameters=parameters,
        operator="" if form == "text" else operator,
        left=left if form == "pair" else "",
        right=right if form == "pair" else "",
        numbers=left if form == "list" else "",
        expression=left if form == "text" else "",
    )


# --- parameters


def parameter(draw: Draw, field: Field, *, name: str = "", required: bool = True, about: str = "") -> Parameter:
    """One that takes a field's values."""
    name = name or field.name
    if field.kind is Kind.LABELS:
        closed = draw.chance(0.5)
        kind = ParameterType.CHOICES if closed else ParameterType.STRINGS
        return Parameter(name=name, type=kind, choices=field.choices if closed else (), required=required, about=about)
    inner: _Parameters = ()
    if field.kind is Kind.PART:
        inner = tuple(Parameter(name=part, type=ParameterType.INTEGER) for part in field.choices)
    choices = field.choices if field.kind is Kind.CHOICE else ()
    return Parameter(
        name=name, type=_TYPE_OF_KIND[field.kind], choices=choices, inner=inner, required=required, about=about
    )


def _condition(draw: Draw, field: Field) -> tuple[Filter, Field]:
    if field.kind in (Kind.QUANTITY, Kind.MEASURE):
        bound = draw.one(("min", "max"))
        return Filter(parameter=f"{bound}_{field.name}", field=field.name, bound=bound), field
    return Filter(parameter=field.name, field=field.name), field


def _bound_text(condition: Filter) -> str:
    return {"min": f"{condition.field} at least", "max": f"{condition.field} at most"}.get(condition.bound, "")


def _key(draw: Draw, table: Table, name: str) -> Parameter:
    return Parameter(name=name, type=ParameterType.STRING, about=_maybe(draw, f"{table.key} of the {table.noun}"))


def _number(draw: Draw, name: str) -> Parameter:
    return Parameter(name=name, type=ParameterType.NUMBER, about=_maybe(draw, "a number"))


class _Description(TypedDict):
    purpose: str
    description: str


def _described(purpose: str, rest: str) -> _Description:
    return {"purpose": purpose, "description": f"{purpose}{rest}."}


def _maybe(draw: Draw, text: str) -> str:
    return text if draw.chance(0.5) else ""


def _tool_name(draw: Draw, verbs: tuple[str, ...], subject: str) -> str:
    verb = draw.recurring(verbs) if len(verbs) > 1 else verbs[0]
    match draw.between(0, 5):
        case 0:
            return f"{subject}_{verb}"
        case 1:
            return f"{subject}.{verb}"
        case 2:
            return verb + "".join(part.capitalize() for part in subject.split("_"))
    return f"{verb}_{subject}"


def _of_split(draw: Draw, build: Callable[[], _Parameters]) -> _Parameters:
    """The first of many random variants whose shape belongs to this split. Raises ``NoVariant``."""
    for _ in range(200):
        parameters = build()
        if split_of(signature(parameters)) is draw.split:
            return parameters
    raise NoVariant(f"no variant of this tool belongs to {draw.split.value}")
