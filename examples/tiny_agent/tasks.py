"""Tasks: a conversation with gold turns, deterministic from (kind, split, seed, index), and the world to try it in."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from examples.tiny_agent.conversation import Conversation
from examples.tiny_agent.long_documents import CountTokens, make_long_document, needle_turn
from examples.tiny_agent.shapes import NoVariant
from examples.tiny_agent.tables import World
from examples.tiny_agent.turns import Known, Scene, TaskKind, Turn
from examples.tiny_agent.turns_errors import errors
from examples.tiny_agent.turns_follow_up import follow_up
from examples.tiny_agent.turns_multi import multi
from examples.tiny_agent.turns_no_tool import NAME, no_tool
from examples.tiny_agent.turns_parallel import parallel
from examples.tiny_agent.turns_plan import plan
from examples.tiny_agent.turns_single import single
from examples.tiny_agent.values import Draw, Split

_SYSTEMS = (
    f"You are {NAME}.",
    f"You are {NAME}, a helpful assistant.",
    "You are a helpful assistant.",
    "Answer the questions. Call a tool where one helps.",
    "",
)
MAKERS: dict[TaskKind, Callable[[Scene], Turn | None]] = {
    TaskKind.SINGLE: single,
    TaskKind.MULTI: multi,
    TaskKind.PARALLEL: parallel,
    TaskKind.ERRORS: errors,
    TaskKind.FOLLOW_UP: follow_up,
    TaskKind.NO_TOOL: no_tool,
    TaskKind.PLAN: plan,
}
_FOLLOWED = (TaskKind.SINGLE, TaskKind.SINGLE, TaskKind.PARALLEL, TaskKind.MULTI)
_MAX_ATTEMPTS = 200


def make_turn(kind: TaskKind, scene: Scene) -> Turn | None:
    """A turn of any kind but NEEDLE, None where this scene does not allow what was drawn. What "it" means to a
    follow-up is what the turn before it spoke of, nothing older."""
    if kind is TaskKind.FOLLOW_UP:
        return follow_up(scene)
    before, scene.known = scene.known, Known()
    turn = MAKERS[kind](scene)
    if turn is None:
        scene.known = before
    return turn


def system_text(scene: Scene) -> str:
    """The system message's text, in front of the tools."""
    text = scene.draw.one(_SYSTEMS)
    return f"{text} Today is {scene.today}.".strip() if scene.today else text


class SceneSizes(TypedDict):
    num_tables: int
    max_tools: int
    full: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The last turn is of ``kind`` and decides; those before it prepare it. world: before the first turn.

    length, depth: of a needle's document, in tokens and from 0 to 1; 0 otherwise.
    """

    kind: TaskKind
    split: Split
    seed: int
    index: int
    conversation: Conversation
    world: World
    length: int = 0
    depth: float = 0.0


def make_task(kind: TaskKind, *, split: Split, seed: int, index: int) -> Task:
    """A task of any kind but NEEDLE."""
    for attempt in range(_MAX_ATTEMPTS):
        draw = Draw(split, _rng(kind, split, seed, index, attempt))
        try:
            scene = Scene(draw, **_sizes(draw, kind))
        except NoVariant:
            continue
        turns = _turns(scene, kind)
        if turns is not None and scene.initial_world is not None:
            conversation = Conversation(system=system_text(scene), tools=tuple(scene.tools.tools), turns=turns)
            return Task(
                kind=kind, split=split, seed=seed, index=index, conversation=conversation, world=scene.initial_world
            )
    raise AssertionError(f"no {kind.value} task was found in {_MAX_ATTEMPTS} attempts")


def _sizes(draw: Draw, kind: TaskKind) -> SceneSizes:
    if kind is TaskKind.MULTI:
        return {"num_tables": draw.between(2, 3), "max_tools": draw.between(6, 9), "full": True}
    return {"num_tables": draw.between(1, 3), "max_tools": draw.between(3, 8), "full": False}


def _turns(scene: Scene, kind: TaskKind) -> tuple[Turn, ...] | None:
    """The turn that decides, behind another one where it needs one."""
    before: tuple[Turn, ...] = ()
    if kind is TaskKind.FOLLOW_UP:
        first = make_turn(scene.draw.one(_FOLLOWED), scene)
        if first is None:
            return None
        before = (first,)
    turn = make_turn(kind, scene)
    return None if turn is None else (*before, turn)


def make_needle(
    count_tokens: CountTokens, *, split: Split, seed: int, index: int, length: int, depth: float | None
) -> Task:
    """A question about a document of ``length`` tokens, its answer at ``depth`` (None: anywhere)."""
    draw = Draw(split, _rng(TaskKind.NEEDLE, split, seed, index, length, depth))
    document = make_long_document(draw, count_tokens, length=length, depth=depth)
    turn = needle_turn(draw, document, document.targets[0])
    return Task(
        kind=TaskKind.NEEDLE,
        split=split,
        seed=seed,
        index=index,
        conversation=Conversation(system=document.text, tools=(), turns=(turn,)),
        world=World(tables={}),
        length=document.num_tokens,
        depth=document.depth,
    )


def _rng(*key: object) -> random.Random:
    return random.Random(repr(key))
