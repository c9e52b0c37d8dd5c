"""What prompts leave out of a history that has grown too long. Pure functions of stored turns and new messages.

A policy acts at the turn whose prompt would fill more than ``TRIGGER_SHARE`` of the model's context, as in
DeepSeek-V3.2's search agents (technical report, context management):

    error                 nothing is left out; a prompt without room for an answer is refused
    discard tool results  results of tools that earlier turns brought become ``DISCARDED_RESULT``; calls and reasoning
                          stay
    discard all           the context is reset: calls, their reasoning and their results go, those that this turn brings
                          included; what is left (system messages, questions, final answers) ends in the question

Nothing is taken from the stored history. Each turn stores how far it discarded (``Discards``), so every later prompt
leaves out the same, and a router that takes the turn over renders the same ids.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from seamount.router.messages import ASKING_ROLES, Message, Role, messages_from_proto
from seamount.v1 import common_pb2, record_pb2
from seamount.wire.errors import InvalidArgument

TRIGGER_SHARE = 0.8
DISCARDED_RESULT = "[discarded]"


class ContextPolicy(enum.Enum):
    ERROR = int(common_pb2.CONTEXT_POLICY_ERROR)
    DISCARD_TOOL_RESULTS = int(common_pb2.CONTEXT_POLICY_DISCARD_TOOL_RESULTS)
    DISCARD_ALL = int(common_pb2.CONTEXT_POLICY_DISCARD_ALL)

    def to_proto(self) -> common_pb2.ContextPolicy:
        return common_pb2.ContextPolicy.Name(self.value)  # type: ignore[return-value] # protobuf takes the name, too


def context_policy_from_proto(value: int, *, field: str = "context_policy") -> ContextPolicy:
    """Unspecified is error. Raises ``InvalidArgument`` for an unknown number."""
    if value == common_pb2.CONTEXT_POLICY_UNSPECIFIED:
        return ContextPolicy.ERROR
    try:
        return ContextPolicy(value)
    except ValueError:
        raise InvalidArgument(
            f"{field} is not known; use error, discard tool results or discard all", field=field
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnDiscards:
    """What is left out of one turn. results: of its input, replaced; input_tools: results and calls of its input;
    output_calls: its output, if that has calls."""

    results: bool = False
    input_tools: bool = False
    output_calls: bool = False

    def kept_input(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The turn's input as prompts tell it."""
        if self.input_tools:
            return tuple(message for message in messages if message.role is not Role.TOOL and not message.tool_calls)
        if self.results:
            return tuple(
                replace(message, content=DISCARDED_RESULT) if message.role is Role.TOOL else message
                for message in messages
            )
        return tuple(messages)

    def keeps_output(self, record: record_pb2.TurnRecord) -> bool:
        return record.HasField("output") and not (self.output_calls and record.output.message.tool_calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discards:
    """How far a history is discarded; see ``Discards`` in record.proto. Both only grow from turn to turn."""

    num_turns_without_results: int = 0
    num_reset_inputs: int = 0

    def of_turn(self, index: int) -> TurnDiscards:
        return TurnDiscards(
            results=index < self.num_turns_without_results,
            input_tools=index < self.num_reset_inputs,
            output_calls=index < self.num_reset_inputs - 1,
        )

    def to_proto(self) -> record_pb2.Discards:
        return record_pb2.Discards(
            num_turns_without_results=self.num_turns_without_results, num_reset_inputs=self.num_reset_inputs
        )


NOTHING = Discards()


def discards_of(records: Sequence[record_pb2.TurnRecord]) -> Discards:
    """How far the last of these turns had discarded."""
    stored = records[-1].discards if records else record_pb2.Discards()
    return Discards(
        num_turns_without_results=stored.num_turns_without_results, num_reset_inputs=stored.num_reset_inputs
    )


def next_discards(
    policy: ContextPolicy, records: Sequence[record_pb2.TurnRecord], messages: Sequence[Message]
) -> Discards | None:
    """How far a turn with these new messages discards, once its prompt is too long; None where its policy has nothing
    to discard, or where a reset would leave no question to answer."""
    before, num_turns = discards_of(records), len(records)
    match policy:
        case ContextPolicy.ERROR:
            return None
        case ContextPolicy.DISCARD_TOOL_RESULTS:
            after = replace(before, num_turns_without_results=num_turns)
        case ContextPolicy.DISCARD_ALL:
            after = replace(before, num_reset_inputs=num_turns + 1)
            if not _ends_in_question(records, messages, after):
                return None
    return after if after != before else None


def _ends_in_question(
    records: Sequence[record_pb2.TurnRecord], messages: Sequence[Message], discards: Discards
) -> bool:
    kept = discards.of_turn(len(records)).kept_input(messages)
    for index in range(len(records) - 1, -1, -1):
        if kept:
            break
        record, part = records[index], discards.of_turn(index)
        if part.keeps_output(record):
            return False
        kept = part.kept_input(messages_from_proto(record.input))
    return bool(kept) and kept[-1].role in ASKING_ROLES
