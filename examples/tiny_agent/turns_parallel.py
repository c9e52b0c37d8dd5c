"""Questions whose calls stand in one block."""

from __future__ import annotations

from examples.tiny_agent import moves, phrases
from examples.tiny_agent.tables import Kind, Table
from examples.tiny_agent.tools import Arguments, Calculator, Tool, Update
from examples.tiny_agent.turns import Check, Evidence, Scene, Script, TaskKind, Turn
from examples.tiny_agent.turns_single import random_number

_KIND = TaskKind.PARALLEL
_NUMBERS = (Kind.QUANTITY, Kind.MEASURE)


def parallel(scene: Scene) -> Turn | None:
    """Two to four independent calls."""
    match scene.draw.between(0, 4):
        case 0:
            return _compare(scene)
        case 1:
            return _update_several(scene)
        case 2:
            return _calculations(scene)
        case 3:
            return _two_tables(scene)
    return _read_several(scene)


def _keys(scene: Scene, table: Table, most: int) -> list[str]:
    return scene.draw.some(list(table.rows), scene.draw.between(2, min(most, len(table.rows))))


def _read_several(scene: Scene) -> Turn | None:
    draw, script = scene.draw, Script(scene)
    table = draw.one(scene.tables)
    keys, lookup = _keys(scene, table, 4), scene.lookup(table)
    field = draw.one(moves.readable_fields(table))
    names = phrases.listed(keys)
    question = draw.one(
        (f"What is the {field.name} of {table.plural} {names}?", f"Tell me the {field.name} of {table.plural} {names}.")
    )
    proof = tuple(item for key in keys for item in moves.evidence(table, key, [field]))
    script.think(f"I need the {field.name} of {names}. {lookup.choice()} for each.")
    found = script.calls([(lookup, moves.lookup_arguments(lookup, key, [field])) for key in keys])
    said = [f"{key}: {phrases.spoken(result[field.name])}" for key, result in zip(keys, found, strict=True)]
    script.think("All are there.")
    pairs = [item for key in keys for item in (key, *_shown(table.rows[key][field.name]))]
    check = Check(values=tuple(pairs), ordered=True, evidence=proof, parallel=len(keys))
    scene.known.about(table, keys[-1], field)
    return script.finish(_KIND, question, f"{field.name} of {'; '.join(said)}.", check)


def _shown(value: object) -> tuple[object, ...]:
    if isinstance(value, bool):
        return ("yes" if value else "no",)
    if isinstance(value, list):
        return tuple(value)
    return tuple(value.values()) if isinstance(value, dict) else (value,)


def _compare(scene: Scene) -> Turn | None:
    draw, script = scene.draw, Script(scene)
    table = draw.one(scene.tables)
    keys, lookup = _keys(scene, table, 3), scene.lookup(table)
    field, highest = draw.one(table.of_kind(*_NUMBERS)), draw.chance(0.5)
    numbers = [table.rows[key][field.name] for key in keys]
    best = (max if highest else min)(numbers)
    if numbers.count(best) > 1:
        return None
    word, winner = "highest" if highest else "lowest", keys[numbers.index(best)]
    proof = tuple(item for key in keys for item in moves.evidence(table, key, [field]))
    script.think(f"I need the {field.name} of {phrases.listed(keys)}. {lookup.choice()} for each.")
    script.calls([(lookup, moves.lookup_arguments(lookup, key, [field])) for key in keys])
    shown = phrases.compared(field.name, list(zip(keys, numbers, strict=True)))
    script.think(f"{shown} The {word} is {best} ({winner}).")
    question = f"Which {table.noun} has the {word} {field.name}: {phrases.listed(keys, 'or')}?"
    check = Check(
        values=(winner, best),
        first=winner,
        rivals=tuple(key for key in keys if key != winner),
        evidence=proof,
        parallel=len(keys),
    )
    scene.known.about(table, winner, field)
    answer = f"{phrases.record(table, winner)} has the {word} {field.name}: {best}."
    return script.finish(_KIND, question, answer, check)


def _update_several(scene: Scene) -> Turn | None:
    draw, script = scene.draw, Script(scene)
    tool = scene.tools.find(Update, draw.one(scene.tables).noun)
    if tool is None:
        return None
    table, inner = scene.world.tables[tool.noun], moves.value_parameters(tool)
    fields = moves.updatable(scene, tool)
    if len(inner) > 1 and any(parameter.required for parameter in inner):
        return None
    field, keys = draw.one(fields), _keys(scene, table, 3)
    values = {key: moves.new_value(scene, field, table.rows[key].get(field.name)) for key in keys}
    said = phrases.listed([f"{key} {phrases.assignment(field, value)}" for key, value in values.items()])
    script.think(f"I change {phrases.listed(keys)}. {tool.choice()} for each.")
    script.calls([(tool, moves.update_arguments(tool, key, {field.name: values[key]})) for key in keys])
    script.think("All are done.")
    question = draw.one((f"Change these {table.plural}: {said}.", f"Please update {table.plural}: {said}."))
    check = Check(values=tuple(keys), state=scene.expected_state(), parallel=len(keys))
    scene.known.about(table, keys[-1], field)
    return script.finish(_KIND, question, f"Done: {said}.", check)


def _calculations(scene: Scene) -> Turn | None:
    draw, script = scene.draw, Script(scene)
    tool = scene.tools.find(Calculator)
    if tool is None:
        return None
    calls: list[tuple[Tool, Arguments]] = []
    written: list[str] = []
    for _ in range(draw.between(2, 3)):
        operator, numbers = draw.one(("+", "-", "*")), [random_number(scene), random_number(scene)]
        calls.append((tool, tool.arguments(operator, numbers)))
        written.append(f"{numbers[0]} {phrases.SIGN_WORDS[operator]} {numbers[1]}")
    script.think(f"{len(calls)} results are needed: {tool.name} for each.")
    values = [moves.float_or_int(result["result"]) for result in script.calls(calls)]
    script.think("All are there.")
    said = phrases.listed([f"{text} is {value}" for text, value in zip(written, values, strict=True)])
    check = Check(values=tuple(values), results=tuple(values), parallel=len(calls))
    return script.finish(_KIND, f"What are {phrases.listed(written)}?", f"{said}.", check)


def _two_tables(scene: Scene) -> Turn | None:
    """One field of a record each from two tables: different tools in one block."""
    draw, script = scene.draw, Script(scene)
    if len(scene.tables) < 2:
        return None
    parts: list[str] = []
    calls: list[tuple[Tool, Arguments]] = []
    said: list[str] = []
    values: list[object] = []
    proof: tuple[Evidence, ...] = ()
    for table in draw.some(scene.tables, 2):
        key, lookup = draw.one(list(table.rows)), scene.lookup(table)
        field = draw.one(table.of_kind(*_NUMBERS))
        parts.append(f"the {field.name} of {phrases.record(table, key)}")
        calls.append((lookup, moves.lookup_arguments(lookup, key, [field])))
        value = table.rows[key][field.name]
        said.append(phrases.statement(field, phrases.record(table, key), value))
        values.append(value)
        proof += moves.evidence(table, key, [field])
    script.think(f"I need {phrases.listed(parts)}. {' and '.join(tool.choice() for tool, _ in calls)}.")
    script.calls(calls)
    script.think("Both are there.")
    check = Check(values=tuple(values), evidence=proof, parallel=2)
    return script.finish(_KIND, f"What are {phrases.listed(parts)}?", " ".join(said), check)
