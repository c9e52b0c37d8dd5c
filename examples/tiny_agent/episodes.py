"""Plays a task: the model's calls are executed on the hidden state, and the project's own history makes the prompts.

The prompts are those that a served session would have: ``History`` renders them, with the sampled ids as they are and
without the reasoning of earlier turns.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jsonschema  # type: ignore[import-untyped]

from examples.tiny_agent.checking import MadeCall, Trace, failure
from examples.tiny_agent.conversation import turn_messages
from examples.tiny_agent.shapes import object_schema
from examples.tiny_agent.tasks import Task
from examples.tiny_agent.toolbox import Toolbox
from examples.tiny_agent.tools import Tool, execute, result_json
from examples.tiny_agent.turns import Turn
from seamount.router.encoding import RunEncoder, Sampled, render
from seamount.router.history import History, sampled_message
from seamount.router.messages import Message, Role, ThinkingMode, ToolCall, message_to_proto
from seamount.router.messages import tool_calls_to_proto as calls_to_proto
from seamount.router.parsing import OutputMode, ParsedOutput, TurnParser
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, record_pb2

_SPARE_STEPS = 3
"""Assistant messages allowed beyond those of the gold turn."""
MAX_OUTPUT_TOKENS = 400


class Inference(Protocol):
    """A model, wherever it runs."""

    def generate(self, prompts: Mapping[int, Sequence[int]], *, max_output_tokens: int) -> dict[int, list[int]]:
        """The output of each prompt: ids up to and with EOS, or ``max_output_tokens`` of them.

        Prompts are numbered by their conversation: one that goes on keeps its number, and may find what is cached.
        """
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """failure: why the task does not count, empty where it does. num_calls: all that were made; num_valid_calls: with a
    known tool and arguments that are valid under its schema; num_plain_arguments: strings without an enumeration."""

    failure: str
    num_calls: int
    num_valid_calls: int
    num_arguments: int
    num_plain_arguments: int
    num_output_tokens: int

    @property
    def succeeded(self) -> bool:
        return not self.failure


class Episode:
    """One task being played. While not ``done``: ``prompt``, then ``take`` what the model said to it.

    history: may be shared by episodes of one thread. keeps_reasoning: False takes the reasoning of each step out of the
    prompts of the next, which served sessions never do: what a task then loses is what kept reasoning is worth.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        history: History,
        mode: ThinkingMode = ThinkingMode.THINKING,
        *,
        keeps_reasoning: bool = True,
    ) -> None:
        self.task = task
        self.failure = ""
        self.done = False
        self.traces: list[Trace] = []
        self._tokenizer = tokenizer
        self._history = history
        self._mode = mode
        self._keeps_reasoning = keeps_reasoning
        self._world = copy.deepcopy(task.world)
        self._tools = Toolbox(tools=list(task.conversation.tools))
        self._records: list[record_pb2.TurnRecord] = []
        self._new: list[Message] = list(task.conversation.opening())
        self._num_steps = 0
        self._num_output_tokens = 0
        self._begin_turn()

    @property
    def turn(self) -> Turn:
        """The gold turn that is being played."""
        return self.task.conversation.turns[len(self.traces) - 1]

    def prompt(self) -> list[int]:
        """Token ids, ready to be continued."""
        return self._history.prompt(self._records, self._new, self._mode).token_ids

    def take(self, token_ids: Sequence[int]) -> None:
        """What the model said to the last prompt."""
        output = self._parse(token_ids)
        self._remember(token_ids, output)
        trace, message = self.traces[-1], output.message
        if not self._num_steps:
            trace.first_reasoning = message.reasoning_content
        self._num_steps += 1
        if message.tool_calls:
            self._new = [self._made(call) for call in message.tool_calls]
            if self._num_steps >= len(self.turn.steps) + 1 + _SPARE_STEPS:
                self._end_turn()
            return
        trace.answer = message.content
        trace.ended = output.reason == common_pb2.FINISH_REASON_STOP
        self._end_turn()

    def outcome(self) -> Outcome:
        """The result of an episode that is done."""
        calls = [call for trace in self.traces for call in trace.calls]
        arguments = [
            (self._tools.named(call.name), name, value) for call in calls for name, value in call.arguments.items()
        ]
        return Outcome(
            failure=self.failure,
            num_calls=len(calls),
            num_valid_calls=sum(call.valid for call in calls),
            num_arguments=len(arguments),
            num_plain_arguments=sum(_is_plain(tool, name, value) for tool, name, value in arguments),
            num_output_tokens=self._num_output_tokens,
        )

    def _begin_turn(self) -> None:
        turn = self.task.conversation.turns[len(self.traces)]
        self._world.faults[:] = [replace(fault) for fault in turn.faults]
        self._world.locked.update(turn.locks)
        self.traces.append(Trace(state_before=self._world.state()))
        self._new.append(Message(role=Role.USER, content=turn.question))
        self._num_steps = 0

    def _end_turn(self) -> None:
        trace = self.traces[-1]
        trace.state_after = self._world.state()
        self.failure = failure(self.turn.check, trace)
        self.done = bool(self.failure) or len(self.traces) == len(self.task.conversation.turns)
        if not self.done:
            self._new = []
            self._begin_turn()

    def _parse(self, token_ids: Sequence[int]) -> ParsedOutput:
        parser = TurnParser(self._tokenizer, OutputMode.of(self._mode), call_id_prefix=f"call-{len(self._records)}-")
        for token_id in token_ids:
            parser.feed(token_id)
        return parser.finish(common_pb2.FINISH_REASON_LENGTH)[1]

    def _remember(self, token_ids: Sequence[int], output: ParsedOutput) -> None:
        self._num_output_tokens += output.num_tokens
        sampled = sampled_message(token_ids, output, self._tokenizer)
        if not self._keeps_reasoning:
            del sampled.token_ids[: sampled.num_reasoning_tokens]
            sampled.num_reasoning_tokens = 0
        self._records.append(
            record_pb2.TurnRecord(
                turn_id=f"{id(self)}-{len(self._records)}",
                input=[message_to_proto(message) for message in self._new],
                output=sampled,
                fingerprint=self._history.fingerprint,
                pending_tool_calls=calls_to_proto(output.message.tool_calls),
            )
        )

    def _made(self, call: ToolCall) -> Message:
        arguments = json.loads(call.arguments_json)
        tool = self._tools.named(call.name)
        problem = "no such tool" if tool is None else argument_problem(tool, arguments)
        result = {"error": problem} if problem or tool is None else execute(tool, self._world, arguments)
        text = result_json(result)
        made = MadeCall(self._num_steps - 1, call.name, arguments, not problem, text)
        self.traces[-1].calls.append(made)
        return Message(role=Role.TOOL, content=text, tool_call_id=call.id)


def argument_problem(tool: Tool, arguments: dict[str, Any]) -> str:
    """Why a tool cannot take arguments: its schema refuses them, or it has no such parameter. Empty where it can."""
    schema = object_schema(tool.parameters)
    error = next(iter(jsonschema.Draft202012Validator(_closed(schema)).iter_errors(arguments)), None)
    return "" if error is None else f"bad arguments: {'.'.join(map(str, error.absolute_path)) or tool.name}"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, with no other properties allowed in any object."""
    if schema.get("type") != "object":
        return schema
    inner = {name: _closed(value) for name, value in schema["properties"].items()}
    return {**schema, "properties": inner, "additionalProperties": False}


def _is_plain(tool: Tool | None, name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    parameters = tool.parameters if tool is not None else ()
    return not any(parameter.name == name and parameter.choices for parameter in parameters)


def gold_outputs(task: Task, tokenizer: Tokenizer, mode: ThinkingMode = ThinkingMode.THINKING) -> list[list[int]]:
    """What a perfect model says, message by message: reasoning, calls or answer, EOS."""
    encoder = RunEncoder(tokenizer)
    outputs = []
    for i, turn in enumerate(task.conversation.turns):
        for message in turn_messages(turn, i):
            if message.role is Role.ASSISTANT:
                outputs.append(said(message, encoder, mode))
    return outputs


def said(message: Message, encoder: RunEncoder, mode: ThinkingMode = ThinkingMode.THINKING) -> list[int]:
    """An assistant message as the ids that a model would have sampled."""
    pieces = render([message], mode=mode, begins=False).pieces()
    assert not any(isinstance(piece, Sampled) for piece in pieces)
    return list(encoder.encode(pieces))


def play(
    episodes: Sequence[Episode],
    model: Inference,
    *,
    max_output_tokens: int = MAX_OUTPUT_TOKENS,
    batch_size: int = 256,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Play all to their end, ``batch_size`` at a time; outcomes in the order of the episodes.

    on_step: told how many are done.
    """
    for start in range(0, len(episodes), batch_size):
        batch = episodes[start : start + batch_size]
        while prompts := {i: episode.prompt() for i, episode in enumerate(batch) if not episode.done}:
            for i, output in model.generate(prompts, max_output_tokens=max_output_tokens).items():
                batch[i].take(output)
            on_step(sum(episode.done for episode in episodes))
    return [episode.outcome() for episode in episodes]
