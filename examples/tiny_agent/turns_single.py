"""Questions that take one call."""

from __future__ import annotations

from examples.tiny_agent import moves, phrases
from examples.tiny_agent.tables import Field, Kind, Table
from examples.tiny_agent.tools import Action, Calculator, Create, Release, Search, Update
from examples.tiny_agent.turns import Check, Evidence, Scene, Script, TaskKind, Turn

_KIND = TaskKind.SINGLE


def single(scene: Scene) -> Turn | None:
    """A question for one of the scene's tools."""
    tool = scene.draw.one(scene.tools.tools)
    match tool:
        case Search():
            return search(scene, tool)
        case Update():
            return update(scene, tool)
        case Create():
            return create(scene, tool)
        case Action():
            return action(scene, tool)
        case Release():
            return release(scene, tool)
        case Calculator():
            return calculation(scene, tool)
    return read(scene, scene.world.tables[tool.noun])


def read(scene: Scene, table: Table, *, key: str = "", kind: TaskKind = _KIND) -> Turn:
    """One or two fields of a record, or its note."""
    draw, script, lookup = scene.draw, Script(scene), scene.lookup(table)
    key = key or draw.one(list(table.rows))
    if lookup.extra and draw.chance(0.25):
        return _read_note(scene, table, key)
    fields = draw.some(moves.readable_fields(table), 2 if draw.chance(0.25) else 1)
    subject = phrases.record(table, key)
    question = phrases.question(draw, fields, subject)
    if lookup.extra and draw.chance(0.4):
        question += f" Without {table.extra}."
    proof = moves.evidence(table, key, fields)
    values = moves.look_up(script, table, key, fields)
    script.think(phrases.finding(fields, values))
    scene.known.about(table, key, fields[0])
    check = read_check(table, key, fields, proof)
    return script.finish(kind, question, phrases.statements(fields, subject, values), check)


def read_check(table: Table, key: str, fields: list[Field], proof: tuple[Evidence, ...]) -> Check:
    """The answer names the fields' values, and results had shown them."""
    values: list[object] = []
    any_of: tuple[str, ...] = ()
    forbidden: list[object] = []
    for field in fields:
        needed, phrases_for_flag = moves.answer_values(field, table.rows[key][field.name])
        values += needed
        if phrases_for_flag and len(fields) == 1:
            any_of = phrases_for_flag
        elif phrases_for_flag:
            values.append(phrases.assignment(field, table.rows[key][field.name]))
    for field in fields:
        forbidden += [value for value in moves.rival_values(table, key, field) if value not in values]
    return Check(values=tuple(values), any_of=any_of, forbidden=tuple(forbidden), evidence=proof)


def _read_note(scene: Scene, table: Table, key: str) -> Turn:
    script, lookup = Script(scene), scene.lookup(table)
    subject, note = phrases.record(table, key), table.notes[key]
    question = scene.draw.one(
        (f"Show {subject} with its {table.extra}.", f"What does the {table.extra} of {subject} say?")
    )
    script.think(f"I need the {table.extra} of {subject}, {lookup.extra} true. {lookup.choice()}.")
    selected = scene.draw.one(moves.readable_fields(table))
    if lookup.selection:
        question += f" I also need its {selected.name}."
    result = script.call(lookup, moves.lookup_arguments(lookup, key, [selected], extra=True))
    script.think(f"It says {result[table.extra]}.")
    answer = f"The {table.extra} of {subject}: {note}."
    values: tuple[object, ...] = (note,)
    if lookup.selection:
        answer += f" It has {phrases.assignment(selected, result[selected.name])}."
        values += moves.answer_values(selected, result[selected.name])[0]
    proof = Evidence(key_name=table.key, key=key, field=table.extra, value=note)
    return script.finish(_KIND, question, answer, Check(values=values, evidence=(proof,)))


def search(scene: Scene, tool: Search) -> Turn:
    """The records that fulfil one or two conditions."""
    draw, script, table = scene.draw, Script(scene), scene.world.tables[tool.noun]
    query = moves.draw_query(scene, tool)
    most = f" Show at most {query.limit}." if query.limit else ""
    question = draw.one((f"Which {table.plural} have {query.said}?", f"List the {table.plural} with {query.said}."))
    script.think(f"I look for {table.plural} with {query.said}. {tool.choice()}.")
    hits = [str(hit[table.key]) for hit in script.call(tool, query.arguments)[table.plural]]
    script.think(f"It lists {phrases.listed(hits)}.")
    check = Check(
        values=tuple(hits),
        forbidden=tuple(key for key in table.rows if key not in hits),
        evidence=tuple(Evidence(key_name=table.key, key=key, field=table.key, value=key) for key in hits),
    )
    answer = f"{table.plural}: {phrases.listed(hits)}."
    return script.finish(_KIND, question + most, answer, check)


def update(scene: Scene, tool: Update, *, key: str = "") -> Turn:
    """New values for one or two fields of a record."""
    draw, script, table = scene.draw, Script(scene), scene.world.tables[tool.noun]
    key = key or draw.one(list(table.rows))
    fields = moves.updatable(scene, tool)
    if all(parameter.required for parameter in moves.value_parameters(tool)):
        chosen = fields
    else:
        chosen = draw.some(fields, draw.between(1, min(2, len(fields))))
    values = {field.name: moves.new_value(scene, field, table.rows[key].get(field.name)) for field in chosen}
    subject, said = phrases.record(table, key), assignments(chosen, values)
    question = update_question(scene, chosen, subject, values)
    script.think(f"I change {subject}. {tool.choice()}.")
    script.call(tool, moves.update_arguments(tool, key, values))
    script.think("It is done.")
    scene.known.about(table, key, chosen[0])
    check = Check(values=tuple(shown_values(chosen, values)), state=scene.expected_state())
    return script.finish(_KIND, question, f"Done: {subject} now has {said}.", check)


def update_question(scene: Scene, fields: list[Field], subject: str, values: dict[str, object]) -> str:
    """Asks for new values."""
    said = assignments(fields, values)
    if len(fields) == 1 and fields[0].kind not in (Kind.FLAG, Kind.PART):
        name = fields[0].name
        spoken = phrases.spoken(values[name])
        return scene.draw.one(
            (f"Set the {name} of {subject} to {spoken}.", f"The {name} of {subject} must be {spoken}.")
        )
    return scene.draw.one((f"Change {subject}: {said}.", f"Please give {subject} these values: {said}."))


def assignments(fields: list[Field], values: dict[str, object]) -> str:
    return phrases.listed([phrases.assignment(field, values[field.name]) for field in fields])


def shown_values(fields: list[Field], values: dict[str, object]) -> list[object]:
    """What a confirmation names."""
    shown: list[object] = []
    for field in fields:
        if field.kind is Kind.FLAG:
            shown.append(phrases.assignment(field, values[field.name]))
        else:
            shown += moves.answer_values(field, values[field.name])[0]
    return shown


def create(scene: Scene, tool: Create) -> Turn | None:
    """A new record."""
    script, table = Script(scene), scene.world.tables[tool.noun]
    if not table.next_keys:
        return None
    values = {field.name: moves.new_value(scene, field) for field in table.fields}
    said = assignments(list(table.fields), values)
    question = scene.draw.one((f"Add a {table.noun} with {said}.", f"I want a new {table.noun}: {said}."))
    script.think(f"{tool.choice()}.")
    key = str(script.call(tool, moves.create_arguments(tool, values))[table.key])
    script.think(f"Its {table.key} is {key}.")
    scene.known.about(table, key, table.fields[0])
    check = Check(values=(key,), state=scene.expected_state())
    return script.finish(_KIND, question, f"Added {phrases.record(table, key)}.", check)


def action(scene: Scene, tool: Action, *, key: str = "") -> Turn | None:
    """Take some of a quantity."""
    draw, script, table = scene.draw, Script(scene), scene.world.tables[tool.noun]
    key = key or draw.one(list(table.rows))
    available = table.rows[key].get(tool.field, 0)
    if available < 2 or not scene.world.receipts:
        return None
    amount = draw.integer(1, available)
    arguments, said = moves.action_arguments(scene, tool, key, amount)
    subject, verb = phrases.record(table, key), moves.verb_of(tool.description)
    question = draw.one(
        (
            f"Please {verb} {amount} {tool.field} of {subject}{said}.",
            f"I want to {verb} {amount} {tool.field} of {subject}{said}.",
        )
    )
    script.think(f"{tool.choice()}.")
    receipt = script.call(tool, arguments)[tool.receipt]
    script.think(f"The {tool.receipt} is {receipt}.")
    scene.known.about(table, key, table.field_named(tool.field))
    check = Check(values=(receipt,), state=scene.expected_state(), required_calls=((tool.name, arguments),))
    return script.finish(_KIND, question, f"Done. The {tool.receipt} is {receipt}.", check)


def release(scene: Scene, tool: Release) -> Turn:
    """Unlock a record."""
    draw, script, table = scene.draw, Script(scene), scene.world.tables[tool.noun]
    key = draw.one(list(table.rows))
    subject, verb = phrases.record(table, key), moves.verb_of(tool.description)
    arguments, said = release_arguments(scene, tool, key)
    script.think(f"{tool.choice()}.")
    script.call(tool, arguments)
    script.think("It is done.")
    check = Check(values=(key,), required_calls=((tool.name, arguments),))
    return script.finish(_KIND, f"Please {verb} {subject}{said}.", f"Done: {verb} {subject}.", check)


def release_arguments(scene: Scene, tool: Release, key: str) -> tuple[dict[str, object], str]:
    """Arguments, and what has to be said of the flag, if there is one."""
    arguments: dict[str, object] = {tool.key: key}
    said = ""
    for parameter in tool.parameters:
        if parameter.name != tool.key and (parameter.required or scene.draw.chance(0.5)):
            flag = scene.draw.chance(0.5)
            arguments[parameter.name] = flag
            said = f", {parameter.name}" if flag else f", not {parameter.name}"
    return arguments, said


def calculation(scene: Scene, tool: Calculator) -> Turn:
    """A sum, a difference or a product of given numbers."""
    draw, script = scene.draw, Script(scene)
    operator = draw.one(("+", "-", "*"))
    count = draw.between(2, 4) if operator == "+" and tool.takes_many else 2
    numbers = [random_number(scene) for _ in range(count)]
    written = f" {phrases.SIGN_WORDS[operator]} ".join(map(str, numbers))
    question = draw.one((f"What is {written}?", f"Work out {written}.", f"{written} makes?"))
    value = moves.calculate(script, tool, operator, numbers)
    script.think(f"The result is {value}.")
    check = Check(values=(value,), results=(value,))
    return script.finish(_KIND, question, f"{written} is {value}.", check)


def random_number(scene: Scene) -> float:
    """A whole number mostly."""
    draw = scene.draw
    return draw.measure(1, 50) if draw.chance(0.2) else draw.integer(2, draw.one((99, 999)))
