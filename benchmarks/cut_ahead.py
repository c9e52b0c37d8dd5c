"""First token of user turns after a tool's result, with and without the cut of reasoning ahead of time.

Each session: a question, a recorded tool call, the tool's result, and a forced answer with thoughts. Then a person
reads, for ``--pause`` seconds, and asks again. That question cuts the thoughts, so all behind the first of them, the
tool's result among it, has to be computed again: either in that turn, or by the idle rank during the pause. Two routers
of one cluster differ in ``router.cut_ahead`` alone; they take turns, one session at a time.

    python -m benchmarks.cut_ahead                                 the table of docs/performance.md
    python -m benchmarks.cut_ahead --sessions 3 --pause 1          a quick look
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks._report import Row, load_average, percentile, publish
from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import Settings, validate
from seamount.router.messages import Message, Role, ToolCall, message_to_proto
from seamount.router.session_service import FORCED_TOKENS_KEY
from seamount.router.tokenizer import Control, Tokenizer
from seamount.v1 import events_pb2, session_pb2, session_pb2_grpc

RESULT_CHARACTERS = (500, 1_000, 2_000)
"""Of the tool's result; the tokenizer of the checkpoint takes about one token for each."""
NUM_THOUGHTS, NUM_ANSWER = 64, 64
CALL = ToolCall(id="call-1", name="search", arguments_json='{"query": "the sea"}')


@dataclass(slots=True)
class Way:
    """One router: user turns after results of one size."""

    sessions: session_pb2_grpc.SessionServiceStub
    first_s: list[float] = field(default_factory=list)
    receipts: list[events_pb2.Receipt] = field(default_factory=list)


def settings_of(folder: Path, checkpoint: Path, *, cut_ahead: bool) -> Settings:
    return validate(
        {
            "run_dir": str(folder / "run"),
            "redis": {"data_dir": str(folder / "redis")},
            "model": {"path": str(checkpoint)},
            "router": {"port": 0, "cut_ahead": cut_ahead},
            "placement": {"path": "local"},
            "pools": {"decode": {"gangs": 1, "expert_parallel": 1}, "prefill": {"gangs": 0}},
            "cache": {"num_pages": 1024},
        }
    )


async def turn(
    way: Way, session_id: str, messages: list[Message], forced: list[int]
) -> tuple[float, events_pb2.Receipt]:
    """Run one; returns the seconds to its first token, and its receipt."""
    request = session_pb2.RunTurnRequest(
        session_id=session_id,
        idempotency_key=uuid.uuid4().hex,
        messages=[message_to_proto(message) for message in messages],
    )
    request.sampling.max_output_tokens = max(1, len(forced))
    metadata = ((FORCED_TOKENS_KEY, ",".join(map(str, forced))),) if forced else ()
    first_s, receipt, began = 0.0, events_pb2.Receipt(), time.perf_counter()
    async for response in way.sessions.RunTurn(request, metadata=metadata):
        for event in response.events:
            kind = event.WhichOneof("event")
            if kind in ("reasoning_delta", "content_delta"):
                first_s = first_s or time.perf_counter() - began
            elif kind == "finished":
                receipt = event.finished.receipt
    return first_s, receipt


async def session(way: Way, num_characters: int, answer: list[int], pause_s: float) -> None:
    """One conversation; its second question is measured."""
    created = await way.sessions.CreateSession(session_pb2.CreateSessionRequest())
    session_id = created.session.id
    asks = Message(role=Role.USER, content=f"What do they say of {uuid.uuid4().hex}?")
    calls = Message(role=Role.ASSISTANT, reasoning_content="I should look that up.", tool_calls=(CALL,))
    words = " ".join(uuid.uuid4().hex[:7] for _ in range(num_characters // 8))
    result = Message(role=Role.TOOL, tool_call_id=CALL.id, content=words)
    await turn(way, session_id, [asks, calls], [])
    await turn(way, session_id, [result], answer)
    await asyncio.sleep(pause_s)
    first_s, receipt = await turn(way, session_id, [Message(role=Role.USER, content="And then?")], answer[:4])
    way.first_s.append(first_s)
    way.receipts.append(receipt)


async def run(num_sessions: int, pause_s: float, folder: Path) -> list[Row]:
    checkpoint = folder / "checkpoint"
    init_checkpoint(checkpoint, seed=1, geometry="demo")
    tokenizer = Tokenizer.load(checkpoint)
    letters = tokenizer.encode("abcdefghijklmnopqrstuvwxyz" * 3)
    answer = [*letters[:NUM_THOUGHTS], tokenizer.control_id(Control.END_THINK), *letters[:NUM_ANSWER]]
    answer.append(tokenizer.eos_token_id)
    rows: list[Row] = []
    on = settings_of(folder, checkpoint, cut_ahead=True)
    async with LocalCluster(settings=on, allow_forced_tokens=True) as cluster:
        cluster.settings = settings_of(folder, checkpoint, cut_ahead=False)
        second = await cluster.start_router(1)
        async with (
            grpc.aio.insecure_channel(cluster.address) as first_channel,
            grpc.aio.insecure_channel(second.address) as second_channel,
        ):
            stubs = [session_pb2_grpc.SessionServiceStub(one) for one in (first_channel, second_channel)]
            with Progress(console=Console(stderr=True)) as progress:
                task = progress.add_task("sessions", total=len(RESULT_CHARACTERS) * num_sessions * 2)
                for num_characters in RESULT_CHARACTERS:
                    ahead, without = ways = [Way(stub) for stub in stubs]
                    for number in range(num_sessions):
                        for way in ways if number % 2 else reversed(ways):
                            await session(way, num_characters, answer, pause_s)
                            progress.advance(task)
                    rows.append(row(num_characters, ahead, without))
    return rows


def row(num_characters: int, ahead: Way, without: Way) -> Row:
    """One line. Token counts are means of a user turn; ``ratio`` is of the medians."""

    def mean(way: Way, name: str) -> int:
        return round(sum(getattr(receipt, name) for receipt in way.receipts) / len(way.receipts))

    with_s, without_s = percentile(ahead.first_s, 0.5), percentile(without.first_s, 0.5)
    return {
        "result_characters": num_characters,
        "sessions": len(ahead.first_s),
        "prompt_tokens": mean(ahead, "num_prompt_tokens"),
        "cached_without": mean(without, "num_cached_tokens"),
        "cached_ahead": mean(ahead, "num_cached_tokens"),
        "computed_without": mean(without, "num_decode_computed_tokens"),
        "computed_ahead": mean(ahead, "num_decode_computed_tokens"),
        "prepared": mean(ahead, "num_prepared_tokens"),
        "first_without_ms_p50": without_s * 1e3,
        "first_ahead_ms_p50": with_s * 1e3,
        "ratio": with_s / without_s,
    }


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Of each size at each router.")] = 8,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds that a person reads.")] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Measure on this machine; eight minutes.

    Examples: python -m benchmarks.cut_ahead --sessions 3 --pause 1 · python -m benchmarks.cut_ahead --json
    """
    load = load_average()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(run(sessions, pause, Path(name)))
    publish("cut_ahead", rows, as_json=json, load=load, constants={"pause_s": pause})


if __name__ == "__main__":
    typer.run(main)
