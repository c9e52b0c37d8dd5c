"""Questions that no tool answers: small talk, text to repeat, what the question says itself, what no tool is for."""

from __future__ import annotations

from examples.tiny_agent import moves
from examples.tiny_agent.turns import Check, Scene, Script, TaskKind, Turn
from examples.tiny_agent.values import Draw, Split

NAME = "tiny-agent"
_KIND = TaskKind.NO_TOOL
_GREETINGS = ("Hello!", "Hi there.", "Good morning.", "Hello, can you help me?")
_THANKS = ("Thank you!", "Thanks, that helps.", "Great, thanks.", "Thank you very much.")
_WHO = ("Who are you?", "What are you?", "What is your name?", "What can you do?")
_SYMBOLS = "!?#$%&*+/:;=@_~^()[]{}|,.'"
_LETTERS = "äöüßéèñçøåłžαβγδжшщ日本語中文字한국어😀🚀→≤∞"


def no_tool(scene: Scene) -> Turn:
    """A turn without calls."""
    match scene.draw.between(0, 9):
        case 0:
            return _say(scene, scene.draw.one(_GREETINGS), "Hello! How can I help you?", ("help",))
        case 1:
            return _say(scene, scene.draw.one(_THANKS), "You are welcome!", ("welcome",))
        case 2:
            return _say(scene, scene.draw.one(_WHO), f"I am {NAME}, a small model that calls tools.", (NAME,))
        case 3:
            return _without_tool(scene)
        case 4:
            return _which(scene)
        case 5:
            return _larger(scene)
        case 6 | 7:
            return _today(scene) if scene.today and scene.draw.chance(0.5) else _told(scene)
    return _repeat(scene)


def _say(scene: Scene, question: str, answer: str, any_of: tuple[str, ...]) -> Turn:
    script = Script(scene)
    script.think("No tool is needed.")
    return script.finish(_KIND, question, answer, Check(any_of=any_of, max_calls=0))


def _without_tool(scene: Scene) -> Turn:
    """Nothing here knows about such things."""
    draw, script = scene.draw, Script(scene)
    noun, field = draw.word(draw.words.nouns), draw.word(draw.words.quantities)
    question = draw.one((f"What is the {field} of {noun} ", f"Tell me the {field} of {noun} ", f"Please sell {noun} "))
    script.think(f"No tool is for {noun}s.")
    check = Check(any_of=("no tool",), max_calls=0)
    question += draw.identifier(draw.id_format()) + ("?" if question.startswith("What") else ".")
    return script.finish(_KIND, question, f"I have no tool for {noun}s.", check)


def _which(scene: Scene) -> Turn:
    """The question does not say which record."""
    draw, script = scene.draw, Script(scene)
    table = draw.one(scene.tables)
    field = draw.one(moves.readable_fields(table))
    question = draw.one((f"What is the {field.name} of a {table.noun}?", f"Look up a {table.noun} for me."))
    script.think(f"The question does not say which {table.noun}.")
    check = Check(any_of=("which",), max_calls=0)
    return script.finish(_KIND, question, f"Which {table.noun}? Please give me its {table.key}.", check)


def _larger(scene: Scene) -> Turn:
    draw, script = scene.draw, Script(scene)
    high = draw.one((99, 999))
    first, second = draw.integer(10, high), draw.integer(10, high)
    while first == second:
        second = draw.integer(10, high)
    largest = draw.chance(0.5)
    word, best = ("larger", max(first, second)) if largest else ("smaller", min(first, second))
    other = first + second - best
    script.think(f"{first} and {second}: {best} is {word}. No tool is needed.")
    check = Check(values=(best,), first=str(best), rivals=(str(other),), max_calls=0)
    return script.finish(_KIND, f"Which number is {word}, {first} or {second}?", f"{best} is {word}.", check)


def _today(scene: Scene) -> Turn:
    """The system message says it."""
    script = Script(scene)
    script.think("The system says it. No tool is needed.")
    question = scene.draw.one(("What is the date?", "What day is it today?", "Which date is today?"))
    return script.finish(_KIND, question, f"Today is {scene.today}.", Check(values=(scene.today,), max_calls=0))


def _told(scene: Scene) -> Turn:
    """The answer stands in the question."""
    draw, script = scene.draw, Script(scene)
    names = [draw.word(draw.words.texts) for _ in range(draw.between(2, 4))]
    values = [_some_text(draw) for _ in names]
    told = ". ".join(f"My {name} is {value}" for name, value in zip(names, values, strict=True))
    chosen = draw.between(0, len(names) - 1)
    script.think("The question says it. No tool is needed.")
    others = tuple(value for value in values if value != values[chosen])
    check = Check(values=(values[chosen],), forbidden=others, max_calls=0)
    question = f"{told}. What is my {names[chosen]}?"
    return script.finish(_KIND, question, f"Your {names[chosen]} is {values[chosen]}.", check)


def _some_text(draw: Draw) -> str:
    match draw.between(0, 3):
        case 0:
            return draw.person()
        case 1:
            return draw.place()
        case 2:
            return draw.date()
    return draw.identifier(draw.id_format())


def _repeat(scene: Scene) -> Turn:
    """Any text, letter by letter."""
    draw, script = scene.draw, Script(scene)
    text = " ".join(_piece(draw) for _ in range(draw.between(1, 6)))
    script.think("No tool is needed.")
    question = draw.one((f"Repeat this: {text}", f"Say exactly: {text}", f"Copy: {text}"))
    return script.finish(_KIND, question, text, Check(exact=text, max_calls=0))


def _piece(draw: Draw) -> str:
    match draw.between(0, 6):
        case 0:
            return draw.identifier(draw.id_format())
        case 1:
            return str(draw.integer(10, 99999))
        case 2:
            return draw.person()
        case 3:
            alphabet = _LETTERS if draw.split is Split.TRAINING else _LETTERS[1::2]
            return "".join(draw.one(alphabet) for _ in range(draw.between(1, 6)))
        case 4:
            return "".join(draw.one(_SYMBOLS) for _ in range(draw.between(1, 4)))
    return draw.repeatable(draw.words.tags)
