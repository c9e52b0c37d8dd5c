"""Questions that take two to five calls, each of which needs what one before it gave."""

from __future__ import annotations

from dataclasses import dataclass

from examples.tiny_agent import moves, phrases
from examples.tiny_agent.tables import Field, Kind, Table
from examples.tiny_agent.tools import Action, Calculator, Create, Filter, Search, Update
from examples.tiny_agent.turns import Check, Evidence, Scene, Script, TaskKind, Turn
from examples.tiny_agent.turns_single import assignments, shown_values, update_question

_KIND = TaskKind.MULTI
_NUMBERS = (Kind.QUANTITY, Kind.MEASURE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A record that calls have found. said: how the question names it; thought: the last finding, not yet said."""

    table: Table
    key: str
    said: str
    evidence: tuple[Evidence, ...] = ()


def multi(scene: Scene) -> Turn | None:
    """Find a record, then do something with it; None where this scene's tools do not allow what was drawn."""
    draw = scene.draw
    if draw.chance(0.12):
        return combined(scene)
    if draw.chance(0.15):
        return created(scene)
    script = Script(scene)
    located = draw.one(_LOCATORS)(scene, script)
    if located is None:
        return None
    for goal in draw.some((_raise, _raise, _multiplied, _update, _act, _read), 6):
        turn = goal(scene, script, located)
        if turn is not None:
            scene.known.table, scene.known.key = located.table, located.key
            return turn if 2 <= turn.num_calls <= 5 else None
    return None


# --- ways to find a record


def _direct(scene: Scene, script: Script) -> Located | None:
    table = scene.draw.one(scene.tables)
    key = scene.draw.one(list(table.rows))
    return Located(table=table, key=key, said=phrases.record(table, key))


def _by_reference(scene: Scene, script: Script) -> Located | None:
    """The record that another one names, over one or two steps."""
    draw = scene.draw
    referring = [table for table in scene.tables if table.of_kind(Kind.REFERENCE)]
    if not referring:
        return None
    first = draw.one(referring)
    table, key = first, draw.one(list(first.rows))
    said = phrases.record(table, key)
    proof: tuple[Evidence, ...] = ()
    for _ in range(2 if draw.chance(0.6) else 1):
        references = table.of_kind(Kind.REFERENCE)
        if not references or references[0].name not in table.rows[key]:
            break
        proof += moves.evidence(table, key, references)
        found = str(moves.look_up(script, table, key, references)[references[0].name])
        script.think(f"Its {references[0].name} is {found}.")
        said = f"the {references[0].name} of {said}"
        table, key = scene.world.tables[references[0].target], found
    return Located(table=table, key=key, said=said, evidence=proof) if proof else None


def _by_extreme(scene: Scene, script: Script) -> Located | None:
    """The record with the highest or lowest number among the hits of a search."""
    draw = scene.draw
    tool = scene.tools.find(Search, draw.one(scene.tables).noun)
    if tool is None:
        return None
    table = scene.world.tables[tool.noun]
    query = moves.draw_query(scene, tool, limited=False)
    name, highest = draw.one(tool.shown), draw.chance(0.5)
    hits = [
        (key, record[name])
        for key, record in table.rows.items()
        if all(condition.holds(record, wanted) for condition, wanted in _wanted(tool, query))
    ]
    numbers = [number for _, number in hits]
    if len(hits) < 2 or (query.limit and query.limit < len(hits)):
        return None
    best = (max if highest else min)(numbers)
    if numbers.count(best) > 1:
        return None
    most = f" (at most {query.limit})" if query.limit else ""
    word = "highest" if highest else "lowest"
    script.think(f"I look for {table.plural} with {query.said}. {tool.choice()}.")
    script.call(tool, query.arguments)
    key = next(key for key, number in hits if number == best)
    script.think(f"{phrases.compared(name, hits)} The {word} is {best} ({key}).")
    said = f"the {table.noun} with the {word} {name} among those with {query.said}{most}"
    proof = (Evidence(key_name=table.key, key=key, field=name, value=best),)
    return Located(table=table, key=key, said=said, evidence=proof)


def _wanted(tool: Search, query: moves.Query) -> list[tuple[Filter, object]]:
    arguments = query.arguments[tool.group] if tool.group else query.arguments
    return [(f, arguments[f.parameter]) for f in tool.filters if f.parameter in arguments]


_LOCATORS = (_direct, _by_reference, _by_reference, _by_reference, _by_reference, _by_extreme, _by_extreme)


# --- what to do with it


def _read(scene: Scene, script: Script, located: Located) -> Turn | None:
    table, key = located.table, located.key
    field = scene.draw.one(moves.readable_fields(table))
    question = phrases.question(scene.draw, [field], located.said)
    proof = located.evidence + moves.evidence(table, key, [field])
    values = moves.look_up(script, table, key, [field])
    script.think(phrases.finding([field], values))
    needed, any_of = moves.answer_values(field, values[field.name])
    forbidden = tuple(value for value in moves.rival_values(table, key, field) if value not in needed)
    scene.known.field = field
    answer = phrases.statement(field, phrases.record(table, key), values[field.name])
    check = Check(values=needed, any_of=any_of, forbidden=forbidden, evidence=proof)
    return script.finish(_KIND, question, answer, check)


def _number(scene: Scene, table: Table) -> Field:
    return scene.draw.one(table.of_kind(*_NUMBERS))


def _multiplied(scene: Scene, script: Script, located: Located) -> Turn | None:
    calculator = scene.tools.find(Calculator)
    if calculator is None:
        return None
    table, key = located.table, located.key
    field = _number(scene, table)
    operator = scene.draw.one(("*", "*", "+", "-"))
    operand = scene.draw.between(2, 9) if operator == "*" else scene.draw.integer(2, 99)
    said = f"the {field.name} of {located.said} {phrases.SIGN_WORDS[operator]} {operand}"
    proof = located.evidence + moves.evidence(table, key, [field])
    number = moves.look_up(script, table, key, [field])[field.name]
    value = moves.calculate(script, calculator, operator, [number, operand])
    script.think(f"The result is {value}.")
    check = Check(values=(value,), results=(value,), evidence=proof)
    return script.finish(
        _KIND, f"What is {said}?", f"{number} {phrases.SIGN_WORDS[operator]} {operand} is {value}.", check
    )


def _update(scene: Scene, script: Script, located: Located) -> Turn | None:
    tool = scene.tools.find(Update, located.table.noun)
    if tool is None:
        return None
    table, key = located.table, located.key
    fields = moves.updatable(scene, tool)
    if not all(parameter.required for parameter in moves.value_parameters(tool)):
        fields = [scene.draw.one(fields)]
    values = {field.name: moves.new_value(scene, field, table.rows[key].get(field.name)) for field in fields}
    question = update_question(scene, fields, located.said, values)
    script.think(f"I change {phrases.record(table, key)}. {tool.choice()}.")
    script.call(tool, moves.update_arguments(tool, key, values))
    script.think("It is done.")
    answer = f"Done: {phrases.record(table, key)} now has {assignments(fields, values)}."
    scene.known.field = fields[0]
    check = Check(values=(key, *shown_values(fields, values)), state=scene.expected_state(), evidence=located.evidence)
    return script.finish(_KIND, question, answer, check)


def _raise(scene: Scene, script: Script, located: Located) -> Turn | None:
    """Read a number, add to it, write it back."""
    calculator, tool = scene.tools.find(Calculator), scene.tools.find(Update, located.table.noun)
    if calculator is None or tool is None:
        return None
    table, key = located.table, located.key
    inner = moves.value_parameters(tool)
    fields = [field for field in moves.updatable(scene, tool) if field.kind in _NUMBERS]
    if not fields or (len(inner) > 1 and any(parameter.required for parameter in inner)):
        return None
    field = scene.draw.one(fields)
    amount, operator = scene.draw.integer(2, 60), scene.draw.one(("+", "+", "-"))
    if operator == "-" and table.rows[key][field.name] <= amount:
        operator = "+"
    word = "Raise" if operator == "+" else "Lower"
    number = moves.look_up(script, table, key, [field])[field.name]
    script.think(f"The {field.name} is {number}.")
    value = moves.calculate(script, calculator, operator, [number, amount])
    script.think(f"The new {field.name} is {value}. {tool.choice()}.")
    script.call(tool, moves.update_arguments(tool, key, {field.name: value}))
    script.think("It is done.")
    answer = f"Done: {phrases.record(table, key)} now has {field.name} {value}."
    scene.known.field = field
    check = Check(values=(value,), state=scene.expected_state(), evidence=located.evidence)
    return script.finish(_KIND, f"{word} the {field.name} of {located.said} by {amount}.", answer, check)


def _act(scene: Scene, script: Script, located: Located) -> Turn | None:
    tool = scene.tools.find(Action, located.table.noun)
    if tool is None:
        return None
    table, key = located.table, located.key
    available = table.rows[key].get(tool.field, 0)
    if available < 2 or not scene.world.receipts:
        return None
    amount = scene.draw.integer(1, available)
    arguments, said = moves.action_arguments(scene, tool, key, amount)
    verb = moves.verb_of(tool.description)
    script.think(f"{tool.choice()}.")
    receipt = script.call(tool, arguments)[tool.receipt]
    script.think(f"The {tool.receipt} is {receipt}.")
    check = Check(
        values=(receipt,),
        state=scene.expected_state(),
        required_calls=((tool.name, arguments),),
        evidence=located.evidence,
    )
    question = f"Please {verb} {amount} {tool.field} of {located.said}{said}."
    scene.known.field = table.field_named(tool.field)
    return script.finish(_KIND, question, f"Done. The {tool.receipt} is {receipt}.", check)


# --- others


def combined(scene: Scene) -> Turn | None:
    """A number of each of two records, one after the other, then a calculation."""
    draw, script, calculator = scene.draw, Script(scene), scene.tools.find(Calculator)
    table = draw.one(scene.tables)
    if calculator is None or len(table.rows) < 2:
        return None
    field, operator = _number(scene, table), draw.one(("+", "-"))
    keys = draw.some(list(table.rows), 2)
    subjects = [phrases.record(table, key) for key in keys]
    word = "sum" if operator == "+" else "difference"
    question = f"What is the {word} of the {field.name} of {subjects[0]} and of {subjects[1]}?"
    proof = tuple(item for key in keys for item in moves.evidence(table, key, [field]))
    lookup = scene.lookup(table)
    script.think(f"I need the {field.name} of both. {lookup.choice()}.")
    found = script.calls([(lookup, moves.lookup_arguments(lookup, key, [field])) for key in keys])
    value = moves.calculate(script, calculator, operator, [result[field.name] for result in found])
    script.think(f"The result is {value}.")
    check = Check(values=(value,), results=(value,), evidence=proof)
    return script.finish(_KIND, question, f"The {word} is {value}.", check)


def created(scene: Scene) -> Turn | None:
    """A new record, and then something with it."""
    draw = scene.draw
    tool = scene.tools.find(Create, draw.one(scene.tables).noun)
    if tool is None:
        return None
    table = scene.world.tables[tool.noun]
    action = scene.tools.find(Action, tool.noun)
    if action is None or not table.next_keys or not scene.world.receipts:
        return None
    script = Script(scene)
    values = {field.name: moves.new_value(scene, field) for field in table.fields}
    script.think(f"{tool.choice()}.")
    key = str(script.call(tool, moves.create_arguments(tool, values))[table.key])
    script.think(f"Its {table.key} is {key}.")
    amount = draw.integer(1, values[action.field])
    arguments, said = moves.action_arguments(scene, action, key, amount)
    verb = moves.verb_of(action.description)
    script.think(f"{action.choice()}.")
    receipt = script.call(action, arguments)[action.receipt]
    script.think(f"The {action.receipt} is {receipt}.")
    question = (
        f"Add a {table.noun} with {assignments(list(table.fields), values)}. "
        f"Then {verb} {amount} {action.field} of it{said}."
    )
    scene.known.about(table, key, table.field_named(action.field))
    check = Check(values=(key, receipt), state=scene.expected_state(), required_calls=((action.name, arguments),))
    answer = f"Added {phrases.record(table, key)}. The {action.receipt} is {receipt}."
    return script.finish(_KIND, question, answer, check)
