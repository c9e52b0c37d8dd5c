"""Checkers: a perfect player passes every one of them, and each way of being wrong fails."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from examples.tiny_agent.conversation import turn_messages
from examples.tiny_agent.documents import TOKENIZER, DocumentSource
from examples.tiny_agent.episodes import Episode, Outcome, argument_problem, gold_outputs, play, said
from examples.tiny_agent.mentions import mentions
from examples.tiny_agent.tasks import MAKERS, Task, make_needle, make_task
from examples.tiny_agent.tools import Action, Calculator, Create, RecordTool, Search
from examples.tiny_agent.turns import TaskKind
from examples.tiny_agent.values import Split
from seamount.router.encoding import RunEncoder
from seamount.router.history import History
from seamount.router.messages import Message, Role, ThinkingMode, ToolCall
from seamount.router.tokenizer import Tokenizer

NUM_TASKS = 80
KINDS = [*MAKERS, TaskKind.NEEDLE]
SEED = 11
Change = Callable[[Task, list[Message]], list[Message] | None]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


def task_of(kind: TaskKind, index: int, split: Split = Split.EVALUATION) -> Task:
    if kind is TaskKind.NEEDLE:
        count = DocumentSource.shared().count_tokens
        return make_needle(count, split=split, seed=SEED, index=index, length=400, depth=0.5)
    return make_task(kind, split=split, seed=SEED, index=index)


def episode_of(task: Task, mode: ThinkingMode = ThinkingMode.THINKING) -> Episode:
    return Episode(task, tokenizer(), History(tokenizer(), "fingerprint"), mode)


class Oracle:
    """Says the gold outputs of the tasks that it knows, and nothing to any other prompt."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._outputs: dict[tuple[int, ...], list[int]] = {}
        for task in tasks:
            episode = episode_of(task)
            for output in gold_outputs(task, tokenizer()):
                self._outputs[tuple(episode.prompt())] = output
                episode.take(output)

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        return {i: self._outputs[tuple(prompt)][:max_output_tokens] for i, prompt in prompts.items()}


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_player_passes(kind: TaskKind, split: Split) -> None:
    tasks = [task_of(kind, i, split) for i in range(NUM_TASKS)]
    outcomes = play([episode_of(task) for task in tasks], Oracle(tasks), batch_size=50)
    assert [outcome.failure for outcome in outcomes] == [""] * NUM_TASKS
    assert all(outcome.num_valid_calls == outcome.num_calls for outcome in outcomes)
    gold = [sum(turn.num_calls for turn in task.conversation.turns) for task in tasks]
    assert [outcome.num_calls for outcome in outcomes] == gold


def test_half_of_the_arguments_are_no_plain_strings() -> None:
    outcomes: list[Outcome] = []
    for kind in MAKERS:
        tasks = [task_of(kind, i) for i in range(40)]
        outcomes += play([episode_of(task) for task in tasks], Oracle(tasks))
    plain = sum(outcome.num_plain_arguments for outcome in outcomes)
    assert plain <= sum(outcome.num_arguments for outcome in outcomes) / 2


def test_questions_take_the_calls_that_their_kind_says() -> None:
    calls = {kind: {task_of(kind, i).conversation.turns[-1].num_calls for i in range(NUM_TASKS)} for kind in MAKERS}
    assert calls[TaskKind.SINGLE] == {1}
    assert calls[TaskKind.MULTI] == {2, 3, 4, 5}
    assert calls[TaskKind.NO_TOOL] == {0}
    assert min(calls[TaskKind.PARALLEL]) == 2


# --- ways to be wrong: each changes the messages of the last turn, or gives None where it does not apply


def played(task: Task, change: Change) -> Outcome | None:
    """The turns before the last one as they should be, the last one changed."""
    turns, encoder = task.conversation.turns, RunEncoder(tokenizer())
    changed = change(task, turn_messages(turns[-1], len(turns) - 1))
    if changed is None:
        return None
    before = sum(len(turn.steps) + 1 for turn in turns[:-1])
    outputs = gold_outputs(task, tokenizer())[:before]
    outputs += [said(message, encoder) for message in changed if message.role is Role.ASSISTANT]
    episode = episode_of(task)
    for output in outputs:
        if not episode.done:
            episode.prompt()
            episode.take(output)
    while not episode.done:
        episode.take([tokenizer().eos_token_id])
    return episode.outcome()


def does_not_know(task: Task, messages: list[Message]) -> list[Message]:
    return [*messages[:-1], replace(messages[-1], content="I do not know that.")]


def calls_nothing(task: Task, messages: list[Message]) -> list[Message] | None:
    return messages[-1:] if len(messages) > 2 else None


def answers_another_question(task: Task, messages: list[Message]) -> list[Message] | None:
    turn, other = task.conversation.turns[-1], task_of(task.kind, task.index + 1).conversation.turns[-1].answer
    of_a_flag = turn.check.any_of[:1] in (("yes",), ("no",))
    alike = bool(turn.check.values) and all(mentions(other, value) for value in turn.check.values)
    if of_a_flag or alike or other == turn.answer:
        return None
    return [*messages[:-1], replace(messages[-1], content=other)]


def is_one_digit_off(task: Task, messages: list[Message]) -> list[Message] | None:
    check, answer = task.conversation.turns[-1].check, messages[-1].content
    number = next((value for value in check.values if isinstance(value, int) and value >= 10), None)
    if number is None or task.kind is TaskKind.MULTI:  # an update's answer may name the number twice
        return None
    return [*messages[:-1], replace(messages[-1], content=answer.replace(str(number), str(number + 1)))]


def says_everything(task: Task, messages: list[Message]) -> list[Message] | None:
    check = task.conversation.turns[-1].check
    if not check.forbidden:
        return None
    guesses = " ".join(f"{value} ." for value in check.forbidden)
    return [*messages[:-1], replace(messages[-1], content=f"{messages[-1].content} {guesses}")]


def mistakes_a_key(task: Task, messages: list[Message]) -> list[Message] | None:
    """Another key in the last call that has one."""
    tools = {tool.name: tool for tool in task.conversation.tools}
    for at in range(len(messages) - 1, -1, -1):
        for i, call in enumerate(messages[at].tool_calls):
            tool = tools[call.name]
            if isinstance(tool, RecordTool):
                arguments = json.loads(call.arguments_json)
                arguments[tool.key] = arguments[tool.key][::-1] + "x"
                return with_call(messages, at, i, arguments)
    return None


def mistakes_a_number(task: Task, messages: list[Message]) -> list[Message] | None:
    """Another number in a calculation or an action, a changed value in what is created."""
    tools = {tool.name: tool for tool in task.conversation.tools}
    for at in range(len(messages) - 1, -1, -1):
        for i, call in enumerate(messages[at].tool_calls):
            tool, arguments = tools[call.name], json.loads(call.arguments_json)
            if isinstance(tool, Action):
                return with_call(messages, at, i, {**arguments, tool.amount: max(1, arguments[tool.amount] - 1) + 1000})
            if isinstance(tool, Calculator) and tool.left:
                return with_call(messages, at, i, {**arguments, tool.left: arguments[tool.left] + 1})
            if isinstance(tool, Calculator) and tool.numbers:
                first, *others = arguments[tool.numbers]
                return with_call(messages, at, i, {**arguments, tool.numbers: [first + 1, *others]})
            if isinstance(tool, Create) and not tool.group:
                name = next((name for name, value in arguments.items() if isinstance(value, int)), None)
                if name is not None:
                    value = arguments[name]
                    changed = not value if isinstance(value, bool) else value + 1
                    return with_call(messages, at, i, {**arguments, name: changed})
    return None


def does_it_twice(task: Task, messages: list[Message]) -> list[Message] | None:
    """Adds the new record once more."""
    tools = {tool.name: tool for tool in task.conversation.tools}
    for at, message in enumerate(messages):
        if any(isinstance(tools[call.name], Create) for call in message.tool_calls):
            return [*messages[: at + 1], message, *messages[at + 1 :]]
    return None


def calls_one_by_one(task: Task, messages: list[Message]) -> list[Message] | None:
    if task.kind is not TaskKind.PARALLEL:
        return None
    calls = messages[1].tool_calls
    return [*(replace(messages[1], tool_calls=(call,)) for call in calls), *messages[2:]]


def forgets_its_choice(task: Task, messages: list[Message]) -> list[Message] | None:
    check, answer = task.conversation.turns[-1].check, messages[-1].content
    head, told, chosen = answer.rpartition("My choice is ")
    if not told:
        return None
    other = next((option for option in check.options if f"{option}." != chosen), None)
    if other is None:
        assert check.number_range is not None
        number = int(chosen.rstrip("."))
        other = str(number - 1 if number > check.number_range[0] else number + 1)
    return [*messages[:-1], replace(messages[-1], content=f"{head}{told}{other}.")]


def with_call(messages: list[Message], at: int, i: int, arguments: dict[str, object]) -> list[Message]:
    calls = list(messages[at].tool_calls)
    calls[i] = ToolCall(id=calls[i].id, name=calls[i].name, arguments_json=json.dumps(arguments))
    return [*messages[:at], replace(messages[at], tool_calls=tuple(calls)), *messages[at + 1 :]]


WRONG: dict[Change, set[TaskKind]] = {
    does_not_know: set(KINDS),
    calls_nothing: set(KINDS) - {TaskKind.NO_TOOL, TaskKind.NEEDLE},
    answers_another_question: set(KINDS),
    is_one_digit_off: {TaskKind.SINGLE, TaskKind.FOLLOW_UP, TaskKind.NO_TOOL},
    says_everything: {TaskKind.SINGLE, TaskKind.ERRORS, TaskKind.NEEDLE},
    mistakes_a_key: {TaskKind.SINGLE, TaskKind.MULTI, TaskKind.PARALLEL, TaskKind.ERRORS, TaskKind.FOLLOW_UP},
    mistakes_a_number: {TaskKind.SINGLE, TaskKind.ERRORS, TaskKind.FOLLOW_UP},
    does_it_twice: {TaskKind.SINGLE},
    calls_one_by_one: {TaskKind.PARALLEL},
    forgets_its_choice: {TaskKind.PLAN},
}


@pytest.mark.parametrize(("change", "kinds"), WRONG.items(), ids=[change.__name__ for change in WRONG])
def test_what_is_wrong_fails(change: Change, kinds: set[TaskKind]) -> None:
    for kind in sorted(kinds, key=lambda kind: kind.value):
        outcomes = [(i, played(task_of(kind, i), change)) for i in range(25)]
        applied = [(i, outcome) for i, outcome in outcomes if outcome is not None]
        assert applied, f"{change.__name__} never applied to {kind.value}"
        passed = [i for i, outcome in applied if outcome.succeeded]
        assert not passed, f"{kind.value} tasks {passed} passed though the player {change.__name__}"


def test_an_answer_that_does_not_end_fails() -> None:
    for kind in KINDS:
        task = task_of(kind, 3)
        episode = episode_of(task)
        for output in gold_outputs(task, tokenizer()):
            if not episode.done:
                episode.take(output[:-1])
        assert not episode.outcome().succeeded


def test_other_words_for_the_same_values_pass() -> None:
    num_passed = 0
    for i in range(30):
        task = task_of(TaskKind.SINGLE, i)
        values = task.conversation.turns[-1].check.values
        if task.conversation.turns[-1].check.any_of or not values:
            continue
        told = "I found: " + ", ".join(str(value).upper() for value in values)
        outcome = played(task, lambda _, messages, told=told: [*messages[:-1], replace(messages[-1], content=told)])
        assert outcome is not None
        assert outcome.succeeded, outcome.failure
        num_passed += 1
    assert num_passed


def test_calls_without_a_tool_or_against_the_schema_count_as_invalid() -> None:
    task = next(task for i in range(99) if (task := task_of(TaskKind.SINGLE, i)).conversation.turns[0].num_calls)
    tool = task.conversation.turns[0].steps[0].calls[0].tool
    bad = [("no_such_tool", {}), (tool.name, {"unknown": 1}), (tool.name, {tool.parameters[0].name: None})]
    episode = episode_of(task)
    for i, (name, arguments) in enumerate(bad):
        call = ToolCall(id=f"call-{i}", name=name, arguments_json=json.dumps(arguments))
        episode.take(said(Message(role=Role.ASSISTANT, tool_calls=(call,)), RunEncoder(tokenizer())))
    outcome = episode.outcome()
    assert (outcome.num_calls, outcome.num_valid_calls) == (3, 0)
    assert all(made.failed for made in episode.traces[0].calls)


def test_gold_arguments_are_valid_and_every_change_of_type_is_not() -> None:
    num_checked = 0
    for i in range(60):
        for step in task_of(TaskKind.SINGLE, i).conversation.turns[0].steps:
            for call in step.calls:
                assert argument_problem(call.tool, call.arguments) == ""
                for name in call.arguments:
                    assert argument_problem(call.tool, {**call.arguments, name: None}) != ""
                    num_checked += 1
    assert num_checked


def test_a_task_is_a_function_of_its_seed_and_index() -> None:
    for kind in KINDS:
        assert task_of(kind, 4) == task_of(kind, 4)
        assert task_of(kind, 4).conversation != task_of(kind, 5).conversation


def test_playing_leaves_the_task_as_it_was() -> None:
    task = task_of(TaskKind.MULTI, 7)
    play([episode_of(task)], Oracle([task]))
    assert task == task_of(TaskKind.MULTI, 7)
    assert play([episode_of(task)], Oracle([task]))[0].succeeded


def test_what_a_result_must_have_shown_stands_in_no_question() -> None:
    """So that answering needs the call."""
    num_checked = 0
    for i in range(NUM_TASKS):
        turn = task_of(TaskKind.PARALLEL, i).conversation.turns[-1]
        for wanted in turn.check.evidence:
            if isinstance(wanted.value, int | float | str) and not isinstance(wanted.value, bool):
                assert not mentions(turn.question, wanted.value)
                num_checked += 1
    assert num_checked


def test_searches_occur() -> None:
    calls = [
        c.tool for i in range(60) for s in task_of(TaskKind.SINGLE, i).conversation.turns[0].steps for c in s.calls
    ]
    assert any(isinstance(tool, Search) for tool in calls)
