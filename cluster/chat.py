"""``seamount chat``: a conversation on one session. Reasoning is dimmed; the user plays the tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from seamount.cluster.terminal import printable
from seamount.router.client import (
    BlockingTurnStream,
    Client,
    Message,
    Sampling,
    Tool,
    ToolCall,
    Turn,
    system,
    tool_result,
    user,
)
from seamount.router.messages import tool_calls_from_proto
from seamount.v1 import events_pb2
from seamount.wire.errors import InvalidArgument, SeamountError

Ask = Callable[[str], str]
"""Shows a prompt, returns a line; raises EOFError at the end of input."""


class Chat:
    """One session in front of one terminal."""

    def __init__(self, client: Client, session_id: str, console: Console, ask: Ask, sampling: Sampling) -> None:
        self._client = client
        self._session_id = session_id
        self._console = console
        self._ask = ask
        self._sampling = sampling

    def run(self, first: Sequence[Message] = ()) -> None:
        """Until the input ends or says ``/quit``. first: messages that go before the user's first one."""
        before = list(first)
        try:
            self._answer_calls(tool_calls_from_proto(self._client.get_session(self._session_id).pending_tool_calls))
            while (text := self._ask("you> ").strip()) != "/quit":
                if text:
                    turn = self._turn([*before, user(text)])
                    before = [] if turn is not None else before
                    self._answer_calls(turn.tool_calls if turn is not None else ())
        except EOFError:
            self._console.print()

    def _answer_calls(self, calls: Sequence[ToolCall]) -> None:
        while calls:
            results = [
                tool_result(call, self._ask(f"result of {printable(call.name)} ({call.id})> ")) for call in calls
            ]
            turn = self._turn(results)
            calls = turn.tool_calls if turn is not None else ()

    def _turn(self, messages: Sequence[Message]) -> Turn | None:
        """None where the turn failed or was cancelled by Ctrl-C: the session then stands as before it."""
        try:
            with self._client.run_turn(self._session_id, messages, sampling=self._sampling) as stream:
                turn = print_turn(stream, self._console)
        except KeyboardInterrupt:
            self._client.cancel_turn(self._session_id)
            self._console.print("\n[yellow]cancelled")
            return None
        except SeamountError as error:
            self._console.print(f"\n{error.reason}: {error.message}", style="red", markup=False, highlight=False)
            return None
        self._console.print(receipt_line(turn.receipt), style="dim", markup=False, highlight=False, soft_wrap=True)
        return turn


def print_turn(stream: BlockingTurnStream, console: Console) -> Turn:
    """Print a turn's events as they come; returns the whole of it."""
    wrote, thinks = "", False

    def write(text: str, style: str | None = None) -> None:
        nonlocal wrote
        wrote = text or wrote
        console.out(printable(text), style=style, end="", highlight=False)

    for event in stream:
        match event.WhichOneof("event"):
            case "reasoning_delta":
                write(event.reasoning_delta.text, "dim italic")
                thinks = True
            case "content_delta":
                write(f"\n{event.content_delta.text}" if thinks else event.content_delta.text)
                thinks = False
            case "tool_call_started":
                write(f"\n→ {event.tool_call_started.name} ", "bold cyan")
            case "tool_call_arguments_delta":
                write(event.tool_call_arguments_delta.arguments_json, "cyan")
    if not wrote.endswith("\n"):
        console.print()
    return stream.result()


def receipt_line(receipt: events_pb2.Receipt) -> str:
    """What the turn cost, in one line."""
    computed = receipt.num_decode_computed_tokens + receipt.num_prefill_computed_tokens
    where = f" (prefill rank {receipt.prefill_rank})" if receipt.prefill_rank else ""
    first_ms = receipt.time_to_first_token.ToMilliseconds()
    return (
        f"[prompt {receipt.num_prompt_tokens} tokens: {receipt.num_cached_tokens} cached, {computed} computed{where}; "
        f"{receipt.num_output_tokens} sampled on {receipt.decode_rank}; first token after {first_ms} ms]"
    )


def read_tools(path: Path) -> Message:
    """A system message with the tools of a file: a JSON list of {"name", "description", "parameters"} objects.

    Raises ``InvalidArgument`` for a file that cannot be read or holds anything else.
    """
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"--tools: cannot read {path}: {error}", field="tools") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidArgument(f"--tools: {path} must hold a JSON list of function objects", field="tools")
    return system("", tools=[Tool(function_json=json.dumps(tool, ensure_ascii=False)) for tool in tools])
