"""The terminal chat, against a scripted router behind a real server."""

import io
import json
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from seamount.cluster.chat import Chat, read_tools, receipt_line
from seamount.cluster.terminal import StartDisplay, printable
from seamount.router.client import Client, Retries, Sampling
from seamount.router.messages import Role
from seamount.v1 import common_pb2, events_pb2, session_pb2, session_pb2_grpc
from seamount.wire.errors import FailedPrecondition, InvalidArgument, to_status

CALL = common_pb2.ToolCall(id="c1", name="look", arguments_json='{"a":1}')


def answer(text: str, *, reasoning: str = "", call: bool = False) -> list[events_pb2.TurnEvent]:
    events = [events_pb2.TurnEvent(started=events_pb2.TurnStarted(session_id="s"))]
    if reasoning:
        events.append(events_pb2.TurnEvent(reasoning_delta=events_pb2.ReasoningDelta(text=reasoning)))
    events.append(events_pb2.TurnEvent(content_delta=events_pb2.ContentDelta(text=text)))
    if call:
        started = events_pb2.ToolCallStarted(index=0, id=CALL.id, name=CALL.name)
        delta = events_pb2.ToolCallArgumentsDelta(index=0, arguments_json=CALL.arguments_json)
        events.append(events_pb2.TurnEvent(tool_call_started=started))
        events.append(events_pb2.TurnEvent(tool_call_arguments_delta=delta))
    receipt = events_pb2.Receipt(
        num_prompt_tokens=9, num_cached_tokens=4, num_decode_computed_tokens=5, decode_rank="d0"
    )
    events.append(events_pb2.TurnEvent(finished=events_pb2.TurnFinished(receipt=receipt)))
    for number, event in enumerate(events, start=1):
        event.sequence = number
    return events


class Script(session_pb2_grpc.SessionServiceServicer):
    def __init__(self) -> None:
        self.turns: list[list[events_pb2.TurnEvent]] = []
        self.pending: list[common_pb2.ToolCall] = []
        self.requests: list[session_pb2.RunTurnRequest] = []

    def GetSession(self, request, context):
        return session_pb2.GetSessionResponse(
            session=session_pb2.Session(id=request.session_id, pending_tool_calls=self.pending)
        )

    def RunTurn(self, request, context):
        self.requests.append(request)
        yield session_pb2.RunTurnResponse(events=self.turns.pop(0))


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def chat(script: Script) -> Iterator[Callable[..., str]]:
    """Holds a chat with the given lines as input; returns what was shown."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    session_pb2_grpc.add_SessionServiceServicer_to_server(script, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    def hold(*lines: str, first=()) -> str:
        out = io.StringIO()
        console = Console(file=out, width=200)
        left = iter(lines)

        def ask(prompt: str) -> str:
            out.write(prompt)
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        with Client(address, retries=Retries(max_attempts=1)) as client:
            Chat(client, "s", console, ask, Sampling(seed=1)).run(first)
        assert list(left) == []
        return out.getvalue()

    yield hold
    server.stop(0).wait(5)


def test_it_talks_until_quit(script: Script, chat: Callable[..., str]) -> None:
    script.turns = [answer("first answer", reasoning="let me think"), answer("second answer")]
    out = chat("hello", "", "more", "/quit")
    assert out.index("let me think") < out.index("first answer") < out.index("second answer")
    assert out.count("[prompt 9 tokens: 4 cached, 5 computed;") == 2
    assert [[message.content for message in request.messages] for request in script.requests] == [["hello"], ["more"]]
    assert all(request.sampling.seed == 1 for request in script.requests)
    assert script.requests[0].idempotency_key != script.requests[1].idempotency_key


def test_the_user_types_what_the_tool_says(script: Script, chat: Callable[..., str]) -> None:
    script.turns = [answer("calling", call=True), answer("done")]
    out = chat("use it", "42 degrees")
    assert '→ look {"a":1}' in out
    assert "result of look (c1)> " in out
    (result,) = script.requests[1].messages
    assert (result.role, result.content, result.tool_call_id) == (common_pb2.ROLE_TOOL, "42 degrees", "c1")


def test_a_session_that_waits_for_results_asks_for_them_first(script: Script, chat: Callable[..., str]) -> None:
    script.pending, script.turns = [CALL], [answer("thanks")]
    out = chat("the result", "/quit")
    assert out.index("result of look") < out.index("thanks") < out.index("you> ")


def test_a_refused_turn_is_shown_and_the_chat_goes_on(script: Script, chat: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "look"}]')
    failed = events_pb2.TurnEvent(sequence=1)
    refusal = to_status(FailedPrecondition("the [session] is closed", reason="CLOSED"))
    failed.failed.status.ParseFromString(refusal.SerializeToString())
    script.turns = [[failed], answer("now it works")]
    out = chat("one", "two", first=[read_tools(tmp_path / "tools.json")])
    assert "CLOSED: the [session] is closed" in out
    assert "now it works" in out
    # The tools of a new session go before the first turn that was accepted.
    assert [[m.role for m in r.messages] for r in script.requests] == [
        [common_pb2.ROLE_SYSTEM, common_pb2.ROLE_USER]
    ] * 2


def test_what_a_model_says_cannot_steer_the_terminal(script: Script, chat: Callable[..., str]) -> None:
    script.turns = [answer("red \x1b[31m [bold]alert[/] \x9b2J \u202e tab\tend\n", call=False)]
    out = chat("x")
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert "\u202e" not in out
    assert "[bold]alert[/]" in out
    assert printable("a\tb\nc\r\x07é中") == "a\tb\nc\ufffd\ufffdé中"


def test_tools_come_from_a_json_list(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    tools = [{"name": "é", "parameters": {"z": 1, "a": 2}}]
    file.write_text(json.dumps(tools))
    message = read_tools(file)
    assert message.role is Role.SYSTEM
    assert [json.loads(tool.function_json) for tool in message.tools] == tools
    for bad in ("{}", "[1]", "nope", "[" * 100_000):
        file.write_text(bad)
        with pytest.raises(InvalidArgument, match="--tools"):
            read_tools(file)


def test_a_receipt_names_the_prefill_rank_where_there_was_one() -> None:
    receipt = events_pb2.Receipt(num_prompt_tokens=9, num_prefill_computed_tokens=8, num_decode_computed_tokens=1)
    assert "9 computed;" in receipt_line(receipt)
    receipt.prefill_rank = "p0"
    assert "9 computed (prefill rank p0)" in receipt_line(receipt)


def test_a_start_off_a_terminal_prints_each_change_once() -> None:
    out = io.StringIO()
    with StartDisplay(Console(file=out, width=80)) as display:
        for ready, detail in ((0, ""), (0, ""), (1, "[x] loading"), (2, "")):
            display.show("decode", ready, 2, detail)
    assert out.getvalue().splitlines() == ["decode 0/2", "decode 1/2 [x] loading", "decode 2/2"]


def test_a_start_on_a_terminal_draws_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with StartDisplay(console) as display:
        display.show("decode", 1, 2, "")
        display.show("decode", 2, 2, "")
    assert "decode" in out.getvalue()
    assert "2/2" in out.getvalue()
