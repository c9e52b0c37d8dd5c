from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router.messages import (
    Message,
    Role,
    ThinkingMode,
    Tool,
    ToolCall,
    check_messages,
    check_turn,
    in_call_order,
    message_from_proto,
    message_to_proto,
    messages_from_proto,
    thinking_mode_from_proto,
)
from seamount.v1 import common_pb2
from seamount.wire import limits
from seamount.wire.errors import FailedPrecondition, InvalidArgument

USER = Message(role=Role.USER, content="q")
CALL = ToolCall(id="c1", name="f", arguments_json="{}")
OTHER_CALL = ToolCall(id="c2", name="f", arguments_json="{}")
CALLING = Message(role=Role.ASSISTANT, tool_calls=(CALL, OTHER_CALL))


def result(call_id: str) -> Message:
    return Message(role=Role.TOOL, tool_call_id=call_id, content="r")


def with_arguments(arguments_json: str) -> Message:
    return Message(role=Role.ASSISTANT, tool_calls=(replace(CALL, arguments_json=arguments_json),))


def with_tool(function_json: str) -> Message:
    return Message(role=Role.SYSTEM, tools=(Tool(function_json=function_json),))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_proto_round_trips_and_generated_messages_are_well_formed(data: st.DataObject, strategies: Any) -> None:
    messages: Sequence[Message] = data.draw(strategies.hostile_conversations)
    check_messages(messages)
    protos = [message_to_proto(message) for message in messages]
    wire = [common_pb2.Message.FromString(proto.SerializeToString()) for proto in protos]
    assert messages_from_proto(wire) == messages


@pytest.mark.parametrize("number", [0, 6, 77])
def test_an_unknown_role_is_named(number: int) -> None:
    proto = common_pb2.Message.FromString(bytes([8, number]))
    with pytest.raises(InvalidArgument) as caught:
        messages_from_proto([message_to_proto(USER), proto])
    assert caught.value.field == "messages[1].role"
    assert caught.value.reason == "UNKNOWN_ROLE"
    with pytest.raises(InvalidArgument):
        message_from_proto(proto)


def test_thinking_modes() -> None:
    assert thinking_mode_from_proto(common_pb2.THINKING_MODE_UNSPECIFIED) is ThinkingMode.THINKING
    assert thinking_mode_from_proto(common_pb2.THINKING_MODE_CHAT) is ThinkingMode.CHAT
    with pytest.raises(InvalidArgument):
        thinking_mode_from_proto(9)


NAME = "n" * limits.MAX_NAME_BYTES
KEY = "k" * limits.MAX_PARAMETER_NAME_BYTES
DEEP = limits.MAX_JSON_DEPTH


def nested(depth: int) -> str:
    return '{"k": ' * (depth - 1) + "{}" + "}" * (depth - 1)


def sized_json(num_bytes: int) -> str:
    return '{"name": "' + "x" * (num_bytes - len('{"name": ""}')) + '"}'


def sized_tool(num_bytes: int) -> str:
    start = '{"name": "f", "description": "'
    return start + "x" * (num_bytes - len(start) - 2) + '"}'


@pytest.mark.parametrize(
    "message",
    [
        Message(role=Role.USER),
        Message(role=Role.USER, content="x" * limits.MAX_CONTENT_BYTES),
        Message(role=Role.ASSISTANT),
        Message(role=Role.TOOL, tool_call_id=NAME),
        Message(role=Role.DEVELOPER, content="x", tools=(Tool(function_json='{"name": "f"}'),)),
        with_arguments(nested(DEEP)),
        with_arguments(f'{{"{KEY}": 1}}'),
        with_arguments('{"quote\\" >": "\\u0041"}'),
        with_tool(sized_tool(limits.MAX_TOOL_JSON_BYTES)),
        Message(role=Role.SYSTEM, response_format_json=sized_json(limits.MAX_TOOL_JSON_BYTES)),
        Message(role=Role.SYSTEM, tools=(Tool(function_json='{"name": "f"}'),) * limits.MAX_TOOLS),
        Message(
            role=Role.ASSISTANT,
            tool_calls=tuple(replace(CALL, id=f"c{i}") for i in range(limits.MAX_TOOL_CALLS_PER_MESSAGE)),
        ),
    ],
)
def test_what_is_just_within_the_limits_passes(message: Message) -> None:
    check_messages([message])
    check_messages([message] * limits.MAX_MESSAGES_PER_TURN if len(message.content) < 10 else [message])


@pytest.mark.parametrize(
    ("message", "field", "reason"),
    [
        (Message(role=Role.USER, content="é" * (limits.MAX_CONTENT_BYTES // 2) + "x"), "content", "OUT_OF_RANGE"),
        (Message(role=Role.USER, content="a\ud800"), "content", "INVALID_UNICODE"),
        (Message(role=Role.DEVELOPER), "content", "EMPTY_CONTENT"),
        (replace(USER, reasoning_content="r"), "reasoning_content", "FIELD_OF_ANOTHER_ROLE"),
        (replace(USER, tool_calls=(CALL,)), "tool_calls", "FIELD_OF_ANOTHER_ROLE"),
        (replace(USER, tool_call_id="c"), "tool_call_id", "FIELD_OF_ANOTHER_ROLE"),
        (replace(USER, tools=(Tool(function_json='{"name": "f"}'),)), "tools", "FIELD_OF_ANOTHER_ROLE"),
        (replace(USER, response_format_json="{}"), "response_format_json", "FIELD_OF_ANOTHER_ROLE"),
        (Message(role=Role.TOOL), "tool_call_id", "OUT_OF_RANGE"),
        (Message(role=Role.TOOL, tool_call_id=NAME + "n"), "tool_call_id", "OUT_OF_RANGE"),
        (replace(CALLING, tool_calls=(CALL, CALL)), "tool_calls", "DUPLICATE_TOOL_CALL_ID"),
        (replace(CALLING, tool_calls=(replace(CALL, name='a"b'),)), "tool_calls[0].name", "INVALID_NAME"),
        (replace(CALLING, tool_calls=(replace(CALL, name=""),)), "tool_calls[0].name", "OUT_OF_RANGE"),
        (replace(CALLING, tool_calls=(replace(CALL, id=""),)), "tool_calls[0].id", "OUT_OF_RANGE"),
        (replace(CALLING, tool_calls=(replace(CALL, name="a\nb"),)), "tool_calls[0].name", "INVALID_NAME"),
        (with_arguments("[]"), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments(""), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": NaN}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": -Infinity}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": 1e999}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": 1, "a": 2}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": [{"b": 1, "b": 2}]}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"\\ud800": 1}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": "\\udc00"}'), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": ' + "1" * 5000 + "}"), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments(nested(DEEP + 1)), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a":' * 100_000), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments('{"a": ' + "[" * DEEP + "]" * DEEP + "}"), "tool_calls[0].arguments_json", "INVALID_JSON"),
        (with_arguments(f'{{"{KEY}k": 1}}'), "tool_calls[0].arguments_json (a name)", "OUT_OF_RANGE"),
        (with_arguments('{"a\\" string=\\"true\\">": 1}'), "tool_calls[0].arguments_json", "INVALID_NAME"),
        (with_tool("{}"), "tools[0].function_json", "INVALID_TOOL"),
        (with_tool('{"type": "function", "function": {"name": "f"}}'), "tools[0].function_json", "INVALID_TOOL"),
        (with_tool('{"name": "f", "parameters": []}'), "tools[0].function_json", "INVALID_TOOL"),
        (with_tool('{"name": ""}'), "tools[0].function_json (name)", "OUT_OF_RANGE"),
        (with_tool(sized_tool(limits.MAX_TOOL_JSON_BYTES + 1)), "tools[0].function_json", "OUT_OF_RANGE"),
        (
            Message(role=Role.SYSTEM, response_format_json=sized_json(limits.MAX_TOOL_JSON_BYTES + 1)),
            "response_format_json",
            "OUT_OF_RANGE",
        ),
        (Message(role=Role.SYSTEM, response_format_json="3"), "response_format_json", "INVALID_JSON"),
        (
            Message(role=Role.SYSTEM, tools=(Tool(function_json='{"name": "f"}'),) * (limits.MAX_TOOLS + 1)),
            "tools",
            "OUT_OF_RANGE",
        ),
        (
            Message(
                role=Role.ASSISTANT,
                tool_calls=tuple(replace(CALL, id=f"c{i}") for i in range(limits.MAX_TOOL_CALLS_PER_MESSAGE + 1)),
            ),
            "tool_calls",
            "OUT_OF_RANGE",
        ),
    ],
)
def test_each_bad_field_is_named(message: Message, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_messages([USER, message])
    assert caught.value.field == f"messages[1].{field}"
    assert caught.value.reason == reason
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("count", [0, limits.MAX_MESSAGES_PER_TURN + 1])
def test_the_number_of_messages_is_bounded(count: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_messages([USER] * count)
    assert caught.value.field == "messages"


def test_results_may_come_in_any_order() -> None:
    plan = check_turn((CALL, OTHER_CALL), [result("c2"), result("c1"), USER])
    assert plan.generates
    assert plan.pending_tool_calls == ()
    assert in_call_order([result("c2"), result("c1")], (CALL, OTHER_CALL)) == [result("c1"), result("c2")]


def test_a_turn_that_ends_with_the_assistant_records() -> None:
    plan = check_turn((), [USER, CALLING, result("c2"), result("c1"), Message(role=Role.ASSISTANT)])
    assert not plan.generates
    assert plan.pending_tool_calls == ()
    plan = check_turn((), [USER, CALLING])
    assert not plan.generates
    assert plan.pending_tool_calls == (CALL, OTHER_CALL)


@pytest.mark.parametrize(
    ("pending", "messages", "field"),
    [
        ((), [result("c1")], "messages[0].tool_call_id"),
        ((CALL,), [result("c9")], "messages[0].tool_call_id"),
        ((CALL,), [result("c1"), USER, result("c1")], "messages[2].tool_call_id"),
        ((CALL,), [result("c1"), CALLING, result("c1"), result("c2"), result("c3")], "messages[4].tool_call_id"),
    ],
)
def test_a_result_for_an_unknown_call(pending: tuple[ToolCall, ...], messages: list[Message], field: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_turn(pending, messages)
    assert caught.value.reason == "UNKNOWN_TOOL_CALL_ID"
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("pending", "messages", "missing"),
    [
        ((CALL, OTHER_CALL), [USER], "c1,c2"),
        ((CALL, OTHER_CALL), [result("c2")], "c1"),
        ((CALL,), [Message(role=Role.ASSISTANT, content="never mind")], "c1"),
        ((CALL,), [Message(role=Role.SYSTEM), result("c1")], "c1"),
        ((), [USER, CALLING, result("c1"), USER], "c2"),
    ],
)
def test_missing_results_are_listed(pending: tuple[ToolCall, ...], messages: list[Message], missing: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_turn(pending, messages)
    assert caught.value.reason == "MISSING_TOOL_RESULTS"
    assert caught.value.metadata["tool_call_ids"] == missing


def test_a_result_given_twice() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_turn((CALL, OTHER_CALL), [result("c1"), result("c1")])
    assert caught.value.reason == "DUPLICATE_TOOL_RESULT"
    assert caught.value.field == "messages[1].tool_call_id"


def test_a_system_message_is_nothing_to_answer() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_turn((), [USER, Message(role=Role.SYSTEM, content="s")])
    assert caught.value.reason == "NOTHING_TO_ANSWER"
    assert check_turn((), [Message(role=Role.SYSTEM, content="s"), USER]).generates
