"""Tasks whose last step needs what only the first reasoning says: a choice that is made there and told at the end.

The choice is free, so nothing else in the context gives it away: who has lost the reasoning can but guess.
"""

from __future__ import annotations

from examples.tiny_agent import moves, phrases
from examples.tiny_agent.mentions import mentions
from examples.tiny_agent.tables import Kind, Table
from examples.tiny_agent.turns import Check, Scene, Script, TaskKind, Turn

_KIND = TaskKind.PLAN


def plan(scene: Scene) -> Turn | None:
    """Choose, call one to three times, tell."""
    draw, script = scene.draw, Script(scene)
    options: tuple[str, ...] = ()
    number_range: tuple[int, int] | None = None
    if draw.chance(0.65):
        options = _options(scene)
        chosen = draw.one(options)
        ask = f"Choose one of {phrases.listed(options, 'or')}, but do not say it yet."
    else:
        number_range = draw.one(((10, 99), (100, 999), (1000, 9999)))
        chosen = str(draw.between(*number_range))
        ask = f"Think of a number from {number_range[0]} to {number_range[1]}, but do not say it yet."
    script.think(f"My choice: {chosen}.")
    table = draw.one(scene.tables)
    key = draw.one(list(table.rows))
    said = phrases.record(table, key)
    if table.of_kind(Kind.REFERENCE) and table.of_kind(Kind.REFERENCE)[0].name in table.rows[key] and draw.chance(0.5):
        table, key, said = _follow(scene, script, table, key, said)
    field = draw.one([field for field in moves.readable_fields(table) if field.kind is not Kind.FLAG])
    proof = moves.evidence(table, key, [field])
    values = moves.look_up(script, table, key, [field])
    script.think(f"{phrases.finding([field], values)} My choice was {chosen}.")
    answer = f"{phrases.statement(field, phrases.record(table, key), values[field.name])} My choice is {chosen}."
    question = f"{ask} Look up the {field.name} of {said}. Then tell me both."
    others = [option for option in options if option != chosen]
    if any(mentions(answer, option) or mentions(script.steps[0].reasoning, option) for option in others):
        return None
    check = Check(
        values=moves.answer_values(field, values[field.name])[0],
        evidence=proof,
        options=options,
        number_range=number_range,
    )
    return script.finish(_KIND, question, answer, check, chat=False)


def _options(scene: Scene) -> tuple[str, ...]:
    """No two begin alike, so that a choice once begun has one way to go on."""
    draw = scene.draw
    count, form = draw.between(3, 6), draw.between(0, 2)
    made: dict[str, str] = {}
    for _ in range(8 * count):
        match form:
            case 0:
                option = draw.repeatable(draw.words.tags)
            case 1:
                option = draw.identifier(draw.id_format())
            case _:
                option = str(draw.integer(100, 9999))
        made.setdefault(option[0].lower(), option)
        if len(made) == count:
            break
    return tuple(made.values())


def _follow(scene: Scene, script: Script, table: Table, key: str, said: str) -> tuple[Table, str, str]:
    reference = table.of_kind(Kind.REFERENCE)[0]
    found = str(moves.look_up(script, table, key, [reference])[reference.name])
    script.think(f"Its {reference.name} is {found}.")
    return scene.world.tables[reference.target], found, f"the {reference.name} of {said}"
