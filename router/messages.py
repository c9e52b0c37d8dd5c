"""Messages of a conversation: their types, their checks, and the rule that calls are answered before all else.

What a client sends passes ``check_messages`` (each message by itself) and then ``check_turn`` (in its conversation).
Everything behind them (encoding, history) relies on both and has no errors of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seamount.router import strict_json
from seamount.v1 import common_pb2
from seamount.wire import limits
from seamount.wire.errors import FailedPrecondition, InvalidArgument

_PARAMETER_NAME_ENDS = ('" string="true">', '" string="false">')


class Role(enum.Enum):
    SYSTEM = int(common_pb2.ROLE_SYSTEM)
    DEVELOPER = int(common_pb2.ROLE_DEVELOPER)
    USER = int(common_pb2.ROLE_USER)
    ASSISTANT = int(common_pb2.ROLE_ASSISTANT)
    TOOL = int(common_pb2.ROLE_TOOL)


ASKING_ROLES = frozenset({Role.USER, Role.DEVELOPER})
"""Roles at whose messages all earlier reasoning is cut."""


class ThinkingMode(enum.Enum):
    CHAT = int(common_pb2.THINKING_MODE_CHAT)
    THINKING = int(common_pb2.THINKING_MODE_THINKING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    id: str
    name: str
    arguments_json: str
    """A JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    function_json: str
    """The JSON object {"name", "description", "parameters"}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Role
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[Tool, ...] = ()
    response_format_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPlan:
    """What a turn's messages ask for."""

    generates: bool
    """False where the last message is the assistant's: the turn only records."""
    pending_tool_calls: tuple[ToolCall, ...]
    """Calls that wait for results once the messages are recorded; always empty where the turn generates."""


# --- proto


def message_from_proto(proto: common_pb2.Message, *, field: str = "message") -> Message:
    """Raises ``InvalidArgument`` for a role that is not one of the five; nothing else is checked here."""
    try:
        role = Role(proto.role)
    except ValueError:
        raise InvalidArgument(
            f"{field}.role is not known; use system, developer, user, assistant or tool",
            field=f"{field}.role",
            reason="UNKNOWN_ROLE",
        ) from None
    return Message(
        role=role,
        content=proto.content,
        reasoning_content=proto.reasoning_content,
        tool_calls=tool_calls_from_proto(proto.tool_calls),
        tool_call_id=proto.tool_call_id,
        tools=tuple(Tool(function_json=tool.function_json) for tool in proto.tools),
        response_format_json=proto.response_format_json,
    )


def messages_from_proto(protos: Iterable[common_pb2.Message], *, field: str = "messages") -> tuple[Message, ...]:
    """Raises ``InvalidArgument`` for an unknown role, naming ``field[i].role``."""
    return tuple(message_from_proto(proto, field=f"{field}[{i}]") for i, proto in enumerate(protos))


def message_to_proto(message: Message) -> common_pb2.Message:
    return common_pb2.Message(
        role=common_pb2.Role.Name(message.role.value),
        content=message.content,
        reasoning_content=message.reasoning_content,
        tool_calls=tool_calls_to_proto(message.tool_calls),
        tool_call_id=message.tool_call_id,
        tools=[common_pb2.Tool(function_json=tool.function_json) for tool in message.tools],
        response_format_json=message.response_format_json,
    )


def tool_calls_from_proto(protos: Iterable[common_pb2.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in protos)


def tool_calls_to_proto(calls: Iterable[ToolCall]) -> list[common_pb2.ToolCall]:
    return [common_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in calls]


def thinking_mode_from_proto(value: int, *, field: str = "thinking_mode") -> ThinkingMode:
    """Unspecified is thinking. Raises ``InvalidArgument`` for an unknown number."""
    if value == common_pb2.THINKING_MODE_UNSPECIFIED:
        return ThinkingMode.THINKING
    try:
        return ThinkingMode(value)
    except ValueError:
        raise InvalidArgument(f"{field} is not known; use chat or thinking", field=field) from None


# --- each message by itself


def check_messages(messages: Sequence[Message], *, field: str = "messages") -> None:
    """Raise ``InvalidArgument``, naming the field, unless every message is well formed and within the limits.

    Empty content is allowed, except of a developer message, which the template cannot do without.
    """
    limits.check_length(messages, field=field, low=1, high=limits.MAX_MESSAGES_PER_TURN, unit="messages")
    for i, message in enumerate(messages):
        _check_message(message, f"{field}[{i}]")


def checked_messages(protos: Iterable[common_pb2.Message], *, field: str = "messages") -> tuple[Message, ...]:
    """``messages_from_proto``, then ``check_messages``."""
    messages = messages_from_proto(protos, field=field)
    check_messages(messages, field=field)
    return messages


def _check_message(message: Message, field: str) -> None:
    _check_text(message.content, f"{field}.content", limits.MAX_CONTENT_BYTES)
    _check_fields_of_role(message, field)
    if message.role is Role.DEVELOPER and not message.content:
        raise InvalidArgument(
            f"{field}.content is empty; a developer message needs one", field=f"{field}.content", reason="EMPTY_CONTENT"
        )
    if message.role is Role.TOOL:
        _check_name(message.tool_call_id, f"{field}.tool_call_id")
    _check_text(message.reasoning_content, f"{field}.reasoning_content", limits.MAX_CONTENT_BYTES)
    limits.check_length(message.tool_calls, field=f"{field}.tool_calls", high=limits.MAX_TOOL_CALLS_PER_MESSAGE)
    for i, call in enumerate(message.tool_calls):
        _check_tool_call(call, f"{field}.tool_calls[{i}]")
    if len({call.id for call in message.tool_calls}) != len(message.tool_calls):
        raise InvalidArgument(
            f"{field}.tool_calls has the same id twice; give each call its own",
            field=f"{field}.tool_calls",
            reason="DUPLICATE_TOOL_CALL_ID",
        )
    limits.check_length(message.tools, field=f"{field}.tools", high=limits.MAX_TOOLS)
    for i, tool in enumerate(message.tools):
        _check_tool(tool, f"{field}.tools[{i}].function_json")
    if message.response_format_json:
        _check_object(
            message.response_format_json, f"{field}.response_format_json", max_bytes=limits.MAX_TOOL_JSON_BYTES
        )


def _check_fields_of_role(message: Message, field: str) -> None:
    asking = (Role.SYSTEM, Role.DEVELOPER)
    rules: tuple[tuple[str, object, tuple[Role, ...]], ...] = (
        ("reasoning_content", message.reasoning_content, (Role.ASSISTANT,)),
        ("tool_calls", message.tool_calls, (Role.ASSISTANT,)),
        ("tool_call_id", message.tool_call_id, (Role.TOOL,)),
        ("tools", message.tools, asking),
        ("response_format_json", message.response_format_json, asking),
    )
    for name, value, roles in rules:
        if value and message.role not in roles:
            owners = " and ".join(role.name.lower() for role in roles)
            raise InvalidArgument(
                f"{field}.{name} is set on a {message.role.name.lower()} message; only {owners} messages have it",
                field=f"{field}.{name}",
                reason="FIELD_OF_ANOTHER_ROLE",
            )


def _check_text(text: str, field: str, max_bytes: int) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{field} holds a lone surrogate at character {error.start}; send valid Unicode",
            field=field,
            reason="INVALID_UNICODE",
        ) from None
    limits.check_length(encoded, field=field, high=max_bytes, unit="bytes")
    return encoded


def is_name(text: str) -> bool:
    """Whether a call may have this name or id: 1 to MAX_NAME_BYTES bytes, printable, no quotation mark."""
    return text.isprintable() and '"' not in text and 1 <= len(text.encode()) <= limits.MAX_NAME_BYTES


def _check_name(name: str, field: str) -> None:
    encoded = _check_text(name, field, limits.MAX_NAME_BYTES)
    limits.check_length(encoded, field=field, low=1, high=limits.MAX_NAME_BYTES, unit="bytes")
    if not is_name(name):
        raise InvalidArgument(
            f"{field} holds a quotation mark or an unprintable character; leave them out",
            field=field,
            reason="INVALID_NAME",
        )


def _check_tool_call(call: ToolCall, field: str) -> None:
    _check_name(call.id, f"{field}.id")
    _check_name(call.name, f"{field}.name")
    field = f"{field}.arguments_json"
    for name in _check_object(call.arguments_json, field, max_bytes=limits.MAX_CONTENT_BYTES):
        limits.check_length(
            name.encode(), field=f"{field} (a name)", high=limits.MAX_PARAMETER_NAME_BYTES, unit="bytes"
        )
        if any(end in name for end in _PARAMETER_NAME_ENDS):
            raise InvalidArgument(
                f"{field} has a name that reads like the end of a DSML tag; rename that argument",
                field=field,
                reason="INVALID_NAME",
            )


def _check_tool(tool: Tool, field: str) -> None:
    function = _check_object(tool.function_json, field, max_bytes=limits.MAX_TOOL_JSON_BYTES)
    name = function.get("name")
    if not isinstance(name, str):
        inner = 'send the object under "function" itself' if "function" in function else 'add a "name"'
        raise InvalidArgument(f'{field} has no string "name"; {inner}', field=field, reason="INVALID_TOOL")
    _check_name(name, f"{field} (name)")
    if not isinstance(function.get("parameters", {}), dict):
        raise InvalidArgument(
            f'{field} has "parameters" that are not an object; send a JSON schema', field=field, reason="INVALID_TOOL"
        )


def _check_object(text: str, field: str, *, max_bytes: int) -> dict[str, object]:
    _check_text(text, field, max_bytes)
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise InvalidArgument(f"{field} is refused: {error}", field=field, reason="INVALID_JSON") from None
    if not isinstance(value, dict):
        raise InvalidArgument(
            f"{field} is not a JSON object; send one, {{}} if it is empty", field=field, reason="INVALID_JSON"
        )
    return value


# --- messages in their conversation


def check_turn(
    pending_tool_calls: Sequence[ToolCall], messages: Sequence[Message], *, field: str = "messages"
) -> TurnPlan:
    """Check one or more well-formed messages against the calls that wait for results.

    Results may come in any order, but all of them before any other message and before the model answers.

    Raises ``FailedPrecondition`` UNKNOWN_TOOL_CALL_ID (a result for a call that does not wait), MISSING_TOOL_RESULTS
    (metadata ``tool_call_ids``: the missing ones, comma-separated, in call order); ``InvalidArgument``
    DUPLICATE_TOOL_RESULT, NOTHING_TO_ANSWER (the last message is a system message).
    """
    waiting = {call.id: call for call in pending_tool_calls}
    answered: set[str] = set()
    for i, message in enumerate(messages):
        if message.role is Role.TOOL:
            _take_result(message.tool_call_id, waiting, answered, f"{field}[{i}].tool_call_id")
            continue
        _check_none_missing(waiting, f"{field}[{i}]")
        waiting, answered = {call.id: call for call in message.tool_calls}, set()
    last = messages[-1].role
    if last is Role.ASSISTANT:
        return TurnPlan(generates=False, pending_tool_calls=tuple(waiting.values()))
    _check_none_missing(waiting, field)
    if last is Role.SYSTEM:
        raise InvalidArgument(
            f"{field}[{len(messages) - 1}] is a system message and there is nothing to answer after it; "
            "end with a user, developer or tool message",
            field=f"{field}[{len(messages) - 1}].role",
            reason="NOTHING_TO_ANSWER",
        )
    return TurnPlan(generates=True, pending_tool_calls=())


def _take_result(call_id: str, waiting: dict[str, ToolCall], answered: set[str], field: str) -> None:
    if call_id in answered:
        raise InvalidArgument(
            f"{field} names a call that has its result already; send one result a call",
            field=field,
            reason="DUPLICATE_TOOL_RESULT",
            metadata={"tool_call_id": call_id},
        )
    if waiting.pop(call_id, None) is None:
        raise FailedPrecondition(
            f"{field} names a call that does not wait for a result; read the session's pending_tool_calls",
            field=field,
            reason="UNKNOWN_TOOL_CALL_ID",
            metadata={"tool_call_id": call_id},
        )
    answered.add(call_id)


def _check_none_missing(waiting: dict[str, ToolCall], field: str) -> None:
    if waiting:
        raise FailedPrecondition(
            f"{field}: {len(waiting)} tool call(s) still wait for results; send a tool message for each of them first",
            field=field,
            reason="MISSING_TOOL_RESULTS",
            metadata={"tool_call_ids": ",".join(waiting)},
        )


def in_call_order(results: Iterable[Message], calls: Sequence[ToolCall]) -> list[Message]:
    """Tool messages sorted into the order of the calls that they answer (checked by ``check_turn``)."""
    order = {call.id: i for i, call in enumerate(calls)}
    return sorted(results, key=lambda result: order[result.tool_call_id])
