"""Calls that fail, and what to do: try again, use another key, unlock first, take less, or say that it is missing."""

from __future__ import annotations

from examples.tiny_agent import moves, phrases
from examples.tiny_agent.tables import Fault, Table, new_key
from examples.tiny_agent.tools import Action, Release
from examples.tiny_agent.turns import Check, Scene, Script, TaskKind, Turn
from examples.tiny_agent.turns_single import read_check, release_arguments

_KIND = TaskKind.ERRORS
_BUSY = ("busy, try again", "timeout, try again", "not ready, try again")


def errors(scene: Scene) -> Turn | None:
    """A question whose first call fails."""
    match scene.draw.between(0, 4):
        case 0:
            return _busy(scene)
        case 1:
            return _renamed(scene)
        case 2:
            return _locked(scene)
        case 3:
            return _too_much(scene)
    return _missing(scene)


def _failing_read(scene: Scene, table: Table, key: str, actual: str, fault: Fault, remedy: str) -> Turn:
    """A look-up of ``key`` fails; one of ``actual`` works."""
    script, lookup = Script(scene), scene.lookup(table)
    field = scene.draw.one(moves.readable_fields(table))
    question = phrases.question(scene.draw, [field], phrases.record(table, key))
    script.fail(fault)
    proof = moves.evidence(table, actual, [field])
    moves.look_up(script, table, key, [field])
    script.think(remedy)
    values = dict(script.call(lookup, moves.lookup_arguments(lookup, actual, [field])))
    script.think(phrases.finding([field], values))
    scene.known.about(table, actual, field)
    answer = phrases.statement(field, phrases.record(table, actual), values[field.name])
    return script.finish(_KIND, question, answer, read_check(table, actual, [field], proof))


def _busy(scene: Scene) -> Turn:
    table = scene.draw.one(scene.tables)
    key, lookup = scene.draw.one(list(table.rows)), scene.lookup(table)
    fault = Fault(tool=lookup.name, key=key, message=scene.draw.one(_BUSY))
    return _failing_read(scene, table, key, key, fault, "It failed. I try again.")


def _renamed(scene: Scene) -> Turn:
    table = scene.draw.one(scene.tables)
    old, actual = new_key(scene.draw, table), scene.draw.one(list(table.rows))
    fault = Fault(tool=scene.lookup(table).name, key=old, message=f"{old} is now {actual}", times=9)
    return _failing_read(scene, table, old, actual, fault, f"{old} is now {actual}. I use {actual}.")


def _locked(scene: Scene) -> Turn | None:
    """The record must be released first."""
    draw, script = scene.draw, Script(scene)
    tool = scene.tools.find(Release, draw.one(scene.tables).noun)
    if tool is None:
        return None
    table = scene.world.tables[tool.noun]
    key, lookup = draw.one(list(table.rows)), scene.lookup(table)
    script.lock(table.noun, key)
    field = draw.one(moves.readable_fields(table))
    arguments, said = release_arguments(scene, tool, key)
    question = phrases.question(draw, [field], phrases.record(table, key))
    verb = moves.verb_of(tool.description)
    question += f" If it is locked, {verb} it{said}."
    proof = moves.evidence(table, key, [field])
    moves.look_up(script, table, key, [field])
    script.think(f"It is locked. {tool.choice()}.")
    script.call(tool, arguments)
    script.think(f"Now {lookup.name} again.")
    values = dict(script.call(lookup, moves.lookup_arguments(lookup, key, [field])))
    script.think(phrases.finding([field], values))
    scene.known.about(table, key, field)
    answer = phrases.statement(field, phrases.record(table, key), values[field.name])
    return script.finish(_KIND, question, answer, read_check(table, key, [field], proof))


def _too_much(scene: Scene) -> Turn | None:
    """More is wanted than there is: the error says how much there is."""
    draw, script = scene.draw, Script(scene)
    tool = scene.tools.find(Action, draw.one(scene.tables).noun)
    if tool is None or not scene.world.receipts:
        return None
    table = scene.world.tables[tool.noun]
    key = draw.one(list(table.rows))
    available = table.rows[key].get(tool.field, 0)
    if available < 1:
        return None
    amount = draw.integer(available + 1, available + 90)
    arguments, said = moves.action_arguments(scene, tool, key, amount)
    verb, subject = moves.verb_of(tool.description), phrases.record(table, key)
    script.think(f"{tool.choice()}.")
    script.call(tool, arguments)
    script.think(f"At most {available}. I take {available}.")
    arguments = {**arguments, tool.amount: available}
    receipt = script.call(tool, arguments)[tool.receipt]
    script.think(f"The {tool.receipt} is {receipt}.")
    question = f"Please {verb} {amount} {tool.field} of {subject}{said}; if there are fewer, all there are."
    check = Check(values=(available, receipt), state=scene.expected_state(), required_calls=((tool.name, arguments),))
    scene.known.about(table, key, table.field_named(tool.field))
    return script.finish(_KIND, question, f"There were only {available}. The {tool.receipt} is {receipt}.", check)


def _missing(scene: Scene) -> Turn:
    """There is no such record: that is the answer."""
    draw, script = scene.draw, Script(scene)
    table = draw.one(scene.tables)
    key, lookup = new_key(draw, table), scene.lookup(table)
    field = draw.one(moves.readable_fields(table))
    subject = phrases.record(table, key)
    moves.look_up(script, table, key, [field])
    script.think(f"There is no {subject}.")
    question = phrases.question(draw, [field], subject)
    others = tuple(record[field.name] for record in table.rows.values() if not isinstance(record[field.name], bool))
    forbidden = tuple(value for value in others if isinstance(value, int | float | str))
    check = Check(values=(key,), any_of=_not_there(table), forbidden=forbidden, failed_calls=((lookup.name, key),))
    return script.finish(_KIND, question, f"There is no {subject}.", check)


def _not_there(table: Table) -> tuple[str, ...]:
    return (f"no {table.noun}", "does not exist", "not found", "no such", "cannot be found")
