"""Questions that mean something only after what was said before."""

from __future__ import annotations

from examples.tiny_agent import moves, phrases
from examples.tiny_agent.tables import Kind
from examples.tiny_agent.tools import Action, Calculator, Update
from examples.tiny_agent.turns import Check, Scene, Script, TaskKind, Turn
from examples.tiny_agent.turns_single import assignments, read_check, shown_values

_KIND = TaskKind.FOLLOW_UP
_NUMBERS = (Kind.QUANTITY, Kind.MEASURE)


def follow_up(scene: Scene) -> Turn | None:
    """About the record, or the field, of the turn before; None where there is none."""
    known = scene.known
    if known.table is None or known.key not in known.table.rows or known.field is None:
        return None
    if any(field.name not in known.table.rows[known.key] for field in known.table.fields):
        return None
    match scene.draw.between(0, 5):
        case 0:
            return _another_record(scene)
        case 1:
            return _set_it(scene)
        case 2:
            return _act_on_it(scene)
        case 3:
            return _calculate_with_it(scene)
    return _another_field(scene)


def _another_field(scene: Scene) -> Turn | None:
    """``And its price?``"""
    table, key, last = scene.known.table, scene.known.key, scene.known.field
    assert table is not None
    assert last is not None
    fields = [field for field in moves.readable_fields(table) if field.name != last.name]
    if not fields:
        return None
    field, script = scene.draw.one(fields), Script(scene)
    if field.kind is Kind.FLAG:
        question = scene.draw.one((f"And is it {field.name}?", f"Is that {table.noun} {field.name}?"))
    else:
        question = scene.draw.one(
            (f"And its {field.name}?", f"What about its {field.name}?", f"And the {field.name} of that {table.noun}?")
        )
    proof = moves.evidence(table, key, [field])
    script.think(f"It is {phrases.record(table, key)}.")
    values = moves.look_up(script, table, key, [field])
    script.think(phrases.finding([field], values))
    scene.known.field = field
    answer = phrases.statement(field, phrases.record(table, key), values[field.name])
    return script.finish(_KIND, question, answer, read_check(table, key, [field], proof))


def _another_record(scene: Scene) -> Turn | None:
    """``And of flight QX71?``"""
    table, last, field = scene.known.table, scene.known.key, scene.known.field
    assert table is not None
    assert field is not None
    if field.kind is Kind.REFERENCE:
        return None
    keys = [key for key in table.rows if key != last and field.name in table.rows[key]]
    if not keys:
        return None
    key, script = scene.draw.one(keys), Script(scene)
    subject = phrases.record(table, key)
    if field.kind is Kind.FLAG:
        question = f"And is {subject} {field.name}?"
    else:
        question = scene.draw.one((f"And the {field.name} of {subject}?", f"The same for {subject}: its {field.name}?"))
    proof = moves.evidence(table, key, [field])
    values = moves.look_up(script, table, key, [field])
    script.think(phrases.finding([field], values))
    scene.known.key = key
    answer = phrases.statement(field, subject, values[field.name])
    return script.finish(_KIND, question, answer, read_check(table, key, [field], proof))


def _set_it(scene: Scene) -> Turn | None:
    """``Now set its price to 30.``"""
    table, key, draw = scene.known.table, scene.known.key, scene.draw
    assert table is not None
    tool = scene.tools.find(Update, table.noun)
    if tool is None:
        return None
    inner, fields = moves.value_parameters(tool), moves.updatable(scene, tool)
    if not all(parameter.required for parameter in inner):
        fields = [draw.one(fields)]
    values = {field.name: moves.new_value(scene, field, table.rows[key].get(field.name)) for field in fields}
    said, script = assignments(fields, values), Script(scene)
    question = draw.one((f"Now give it {said}.", f"Please change that {table.noun}: {said}."))
    script.think(f"It is {phrases.record(table, key)}. I change it. {tool.choice()}.")
    script.call(tool, moves.update_arguments(tool, key, values))
    script.think("It is done.")
    scene.known.field = fields[0]
    check = Check(values=(key, *shown_values(fields, values)), state=scene.expected_state())
    return script.finish(_KIND, question, f"Done: {phrases.record(table, key)} now has {said}.", check)


def _act_on_it(scene: Scene) -> Turn | None:
    """``Now reserve 3 seats of it.``"""
    table, key, script = scene.known.table, scene.known.key, Script(scene)
    assert table is not None
    tool = scene.tools.find(Action, table.noun)
    available = table.rows[key].get(tool.field, 0) if tool is not None else 0
    if tool is None or available < 2 or not scene.world.receipts:
        return None
    amount, verb = scene.draw.integer(1, available), moves.verb_of(tool.description)
    arguments, said = moves.action_arguments(scene, tool, key, amount)
    script.think(f"It is {phrases.record(table, key)}. {tool.choice()}.")
    receipt = script.call(tool, arguments)[tool.receipt]
    script.think(f"The {tool.receipt} is {receipt}.")
    question = f"Now {verb} {amount} {tool.field} of it{said}."
    scene.known.field = table.field_named(tool.field)
    check = Check(values=(receipt,), state=scene.expected_state(), required_calls=((tool.name, arguments),))
    return script.finish(_KIND, question, f"Done. The {tool.receipt} is {receipt}.", check)


def _calculate_with_it(scene: Scene) -> Turn | None:
    """``Times 4?``, of a number that was shown."""
    table, key, field, script = scene.known.table, scene.known.key, scene.known.field, Script(scene)
    assert table is not None
    assert field is not None
    calculator = scene.tools.find(Calculator)
    if calculator is None or field.kind not in _NUMBERS or (table.noun, key, field.name) not in scene.known.shown[-2:]:
        return None
    number, operator = table.rows[key][field.name], scene.draw.one(("+", "-", "*"))
    operand = scene.draw.between(2, 9) if operator == "*" else scene.draw.integer(2, 99)
    word = phrases.SIGN_WORDS[operator]
    script.think(f"The {field.name} is {number}.")
    value = moves.calculate(script, calculator, operator, [number, operand])
    script.think(f"The result is {value}.")
    check = Check(values=(value,), results=(value,))
    question = scene.draw.one((f"What is that {word} {operand}?", f"And that {field.name} {word} {operand}?"))
    return script.finish(_KIND, question, f"{number} {word} {operand} is {value}.", check)
