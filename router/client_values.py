"""What calls of the client take and return, beside the protocol's own messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seamount.router.messages import Message, Role, Tool, ToolCall
from seamount.v1 import common_pb2, events_pb2, session_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is None or empty takes the session's, then the deployment's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_output_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None

    def to_proto(self) -> common_pb2.SamplingParameters:
        return common_pb2.SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_output_tokens=self.max_output_tokens,
            stop_strings=self.stop_strings,
            stop_token_ids=self.stop_token_ids,
            num_logprobs=self.num_logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A session with everything said in it. receipts: one a turn that generated."""

    session: session_pb2.Session
    messages: tuple[Message, ...]
    receipts: tuple[events_pb2.Receipt, ...]


def user(text: str) -> Message:
    return Message(role=Role.USER, content=text)


def system(text: str, *, tools: Sequence[Tool] = (), response_format_json: str = "") -> Message:
    return Message(role=Role.SYSTEM, content=text, tools=tuple(tools), response_format_json=response_format_json)


def tool_result(call: ToolCall, content: str) -> Message:
    """The answer to a call that the model made."""
    return Message(role=Role.TOOL, content=content, tool_call_id=call.id)
