"""One turn of a conversation with its gold steps, and the scene in which turns are made."""

from __future__ import annotations

import copy
import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from typing import Any

from examples.tiny_agent.mentions import mentions
from examples.tiny_agent.tables import Fault, Field, Rows, Table, World, make_world
from examples.tiny_agent.toolbox import Toolbox, make_toolbox
from examples.tiny_agent.tools import Arguments, Calculator, Lookup, Result, Search, Tool, execute, ordered, result_json
from examples.tiny_agent.values import Draw


class TaskKind(enum.Enum):
    SINGLE = "single"
    MULTI = "multi"
    PARALLEL = "parallel"
    ERRORS = "errors"
    FOLLOW_UP = "follow_up"
    NO_TOOL = "no_tool"
    NEEDLE = "needle"
    PLAN = "plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A tool's result must have shown this: the record with this key, with this value in this field."""

    key_name: str
    key: str
    field: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What must hold once a turn is over.

    values: each stands in the answer. any_of: one of these phrases stands there. forbidden: none stands there. first:
    of several keys, this one is named first (its rivals are in ``rivals``). state: all records afterwards; None where
    the turn changes none. evidence: what results must have shown, so that a guess does not count; results: numbers that
    a calculator must have given; required_calls: (tool, arguments) that must have been made and have worked. max_calls:
    calls of the turn at most. parallel: so many calls at least stand in the first block. options: one of them is chosen
    in the first reasoning and named in the answer, no other.
    """

    values: tuple[Any, ...] = ()
    forbidden: tuple[Any, ...] = ()
    exact: str = ""
    """The whole answer, white space at its ends apart."""
    any_of: tuple[str, ...] = ()
    """One of these phrases stands in the answer."""
    ordered: bool = False
    """The values come in their order."""
    first: str = ""
    rivals: tuple[str, ...] = ()
    state: dict[str, Rows] | None = None
    evidence: tuple[Evidence, ...] = ()
    results: tuple[float, ...] = ()
    required_calls: tuple[tuple[str, Arguments], ...] = ()
    failed_calls: tuple[tuple[str, str], ...] = ()
    """(Tool, key) that must have been tried and have failed."""
    max_calls: int | None = None
    parallel: int = 0
    options: tuple[str, ...] = ()
    number_range: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    tool: Tool
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Step:
    """One assistant message with calls, and their results in order."""

    reasoning: str
    calls: tuple[Call, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """chat: whether the turn can be done without reasoning, so that its visible part is worth learning by itself."""

    kind: TaskKind
    question: str
    steps: tuple[Step, ...]
    reasoning: str
    answer: str
    check: Check
    chat: bool = True
    faults: tuple[Fault, ...] = ()
    locks: tuple[tuple[str, str], ...] = ()
    """What goes wrong in this turn: set up in the world before it begins."""

    @property
    def num_calls(self) -> int:
        return sum(len(step.calls) for step in self.steps)


@dataclass(slots=True, kw_only=True)
class Known:
    """What the conversation spoke of last: a record and one of its fields; and what results showed of records."""

    table: Table | None = None
    key: str = ""
    field: Field | None = None
    shown: list[tuple[str, str, str]] = default(default_factory=list)
    """(noun, key, field), oldest first."""

    def about(self, table: Table, key: str, field: Field) -> None:
        self.table, self.key, self.field = table, key, field


_DATED_SHARE = 0.3


class Scene:
    """A world with tools and a conversation in the making. Turns change the world as they are made.

    full: with the tools for long chains of calls (``make_toolbox``). for_checking: False where nobody will check what a
    model does, which saves copies of the records.
    """

    def __init__(
        self, draw: Draw, *, num_tables: int, max_tools: int, full: bool = False, for_checking: bool = True
    ) -> None:
        self.draw = draw
        self.for_checking = for_checking
        self.world: World = make_world(draw, num_tables=num_tables)
        self.tools: Toolbox = make_toolbox(draw, self.world, max_tools=max_tools, full=full)
        self.initial_world = copy.deepcopy(self.world) if for_checking else None
        """As it was before the first turn."""
        self.known = Known()
        self.today = draw.date() if draw.chance(_DATED_SHARE) else ""
        """What the system message says of the day, if it does."""

    @property
    def tables(self) -> list[Table]:
        return list(self.world.tables.values())

    def expected_state(self) -> dict[str, Rows] | None:
        """All records as they are now."""
        return self.world.state() if self.for_checking else None

    def lookup(self, table: Table) -> Lookup:
        found = self.tools.find(Lookup, table.noun)
        assert found is not None, "every table has a look-up"
        return found


class Script:
    """Builds a turn's steps: thoughts, then calls, which are executed at once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.steps: list[Step] = []
        self._thoughts: list[str] = []
        self._faults: list[Fault] = []
        self._locks: list[tuple[str, str]] = []
        scene.world.faults.clear()  # those of the turn before: a record made later may have the key that they wait for

    def fail(self, fault: Fault) -> None:
        """A tool will give this answer in place of its own."""
        self._faults.append(fault)
        self.scene.world.faults.append(replace(fault))

    def lock(self, noun: str, key: str) -> None:
        """A record will have to be released first."""
        self._locks.append((noun, key))
        self.scene.world.locked.add((noun, key))

    def think(self, text: str) -> None:
        self._thoughts.append(text)

    def call(self, tool: Tool, values: Arguments) -> Result:
        """One call in a block of its own."""
        return self.calls([(tool, values)])[0]

    def calls(self, calls: Sequence[tuple[Tool, Arguments]]) -> list[Result]:
        """Several calls in one block."""
        made = tuple(Call(tool, ordered(tool, values)) for tool, values in calls)
        if not all(isinstance(call.tool, Lookup | Search | Calculator) for call in made):
            self.scene.known.shown.clear()
        results = [execute(call.tool, self.scene.world, call.arguments) for call in made]
        self.steps.append(Step(self._reasoning(), made, tuple(map(result_json, results))))
        return results

    def finish(self, kind: TaskKind, question: str, answer: str, check: Check, *, chat: bool = True) -> Turn:
        """The turn, with the thoughts since the last call as its last reasoning.

        What the gold answer says itself is not forbidden.
        """
        if self.scene.for_checking:  # nobody reads it otherwise
            allowed = tuple(value for value in check.forbidden if not mentions(answer, value))
            check = replace(check, forbidden=tuple(dict.fromkeys(allowed)))
        return Turn(
            kind=kind,
            question=question,
            steps=tuple(self.steps),
            reasoning=self._reasoning(),
            answer=answer,
            check=check,
            chat=chat,
            faults=tuple(self._faults),
            locks=tuple(self._locks),
        )

    @property
    def num_calls(self) -> int:
        return sum(len(step.calls) for step in self.steps)

    def _reasoning(self) -> str:
        text = " ".join(self._thoughts)
        self._thoughts.clear()
        return text
