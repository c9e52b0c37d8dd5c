"""First token, inter-token latency and token rate, in three ways: a session's turn through the router; the same without
a session (``Generate``); the same Reserve + Generate at a rank.

All ways compute the same prompt tokens (no prefix is shared between turns) and take the same forced output. What
differs is the router (authentication, rendering, placement, parsing, events), and between the first two what makes a
turn durable: the session taken and committed, every token logged before its events are told. The ways alternate.
Streams pause for a moment between turns, the same random moments in all ways: without it, the streams of the direct way
stay in step with each other, compute all their prompts in one batch, and that is what would be measured.

    python -m benchmarks.latency                                           the table of docs/performance.md
    python -m benchmarks.latency --turns 1000 --turns-many 500 --rounds 20   tails, and steadier medians
    python -m benchmarks.latency --turns 20 --turns-many 1 --rounds 2        a quick look
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.protobuf import duration_pb2
from rich.console import Console
from rich.progress import Progress

from benchmarks._report import Row, load_average, percentile, publish
from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import validate
from seamount.router.client import AsyncClient
from seamount.router.messages import Message, Role, ThinkingMode
from seamount.router.session_service import FORCED_TOKENS_KEY
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

MAX_PAUSE_S = 0.1
PROMPT_WORDS = 24
STREAMS = {1: 16, 4: 64, 16: 64, 32: 64}
"""Streams to the output tokens of a turn: one stream is for latencies, which come with few tokens."""


@dataclass(slots=True)
class Measured:
    """Seconds of one way at one number of streams."""

    first_token: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def add(self, began: float, arrivals: list[float]) -> None:
        self.first_token.append(arrivals[0] - began)
        self.inter_token += [later - earlier for earlier, later in itertools.pairwise(arrivals)]


class Router:
    """A turn of a fresh session through the router; the session is made beforehand."""

    def __init__(self, address: str, forced: list[int]) -> None:
        self.num_output = len(forced)
        self._channel = grpc.aio.insecure_channel(address)
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self._metadata = ((FORCED_TOKENS_KEY, ",".join(map(str, forced))),)

    async def turn(self, text: str, measured: Measured) -> None:
        created = await self._sessions.CreateSession(
            session_pb2.CreateSessionRequest(thinking_mode=common_pb2.THINKING_MODE_CHAT)
        )
        request = session_pb2.RunTurnRequest(session_id=created.session.id, idempotency_key="1")
        request.messages.add(role=common_pb2.ROLE_USER, content=text)
        request.sampling.max_output_tokens = self.num_output
        arrivals: list[float] = []
        began = time.perf_counter()
        async for response in self._sessions.RunTurn(request, metadata=self._metadata):
            now = time.perf_counter()
            # One printable character a token: each token is one content event.
            arrivals += [now for event in response.events if event.WhichOneof("event") == "content_delta"]
        assert len(arrivals) == self.num_output, len(arrivals)
        measured.add(began, arrivals)

    async def close(self) -> None:
        await self._channel.close()


class Stateless:
    """The same messages through the router's ``Generate``: nothing is stored, nothing is logged."""

    def __init__(self, address: str, forced: list[int]) -> None:
        self.num_output = len(forced)
        self._channel = grpc.aio.insecure_channel(address)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._metadata = ((FORCED_TOKENS_KEY, ",".join(map(str, forced))),)

    async def turn(self, text: str, measured: Measured) -> None:
        request = inference_pb2.GenerateRequest()
        request.messages.thinking_mode = common_pb2.THINKING_MODE_CHAT
        request.messages.messages.add(role=common_pb2.ROLE_USER, content=text)
        request.sampling.max_output_tokens = self.num_output
        arrivals: list[float] = []
        began = time.perf_counter()
        async for response in self._inference.Generate(request, metadata=self._metadata):
            now = time.perf_counter()
            arrivals += [now for event in response.events if event.WhichOneof("event") == "content_delta"]
        assert len(arrivals) == self.num_output, len(arrivals)
        measured.add(began, arrivals)

    async def close(self) -> None:
        await self._channel.close()


class Direct:
    """The same Reserve, Generate and Release at the decode ranks in turn."""

    def __init__(self, addresses: list[str], forced: list[int], tokenizer: AsyncClient) -> None:
        self._channels = [grpc.aio.insecure_channel(address) for address in addresses]
        self._workers = [worker_pb2_grpc.WorkerServiceStub(channel) for channel in self._channels]
        self.num_output = len(forced)
        self._forced = forced
        self._tokenizer = tokenizer
        self._num_turns = 0

    async def turn(self, text: str, measured: Measured) -> None:
        message = Message(role=Role.USER, content=text)
        token_ids = await self._tokenizer.tokenize([message], thinking_mode=ThinkingMode.CHAT)
        self._num_turns += 1
        worker = self._workers[self._num_turns % len(self._workers)]
        arrivals: list[float] = []
        began = time.perf_counter()
        reserved = await worker.Reserve(
            worker_pb2.ReserveRequest(
                session_id=uuid.uuid4().hex,
                turn_id="1",
                epoch=1,
                attempt=1,
                cache_salt=bytes(32),
                token_ids=token_ids,
                time_to_live=duration_pb2.Duration(seconds=30),
            )
        )
        request = worker_pb2.WorkerServiceGenerateRequest(
            reservation_id=reserved.reservation_id,
            epoch=1,
            sampling=worker_pb2.ResolvedSampling(
                temperature=1.0, top_p=0.95, seed=1, max_output_tokens=self.num_output, num_logprobs=-1
            ),
            forced_token_ids=self._forced,
        )
        async for response in worker.Generate(request):
            now = time.perf_counter()
            arrivals += [now] * len(response.tokens.token_ids)
        assert len(arrivals) == self.num_output, len(arrivals)
        measured.add(began, arrivals)
        await worker.Release(worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id))

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


Way = Router | Stateless | Direct


async def measure(way: Way, num_streams: int, num_turns: int, measured: Measured) -> None:
    """``num_turns`` turns, ``num_streams`` at a time; adds the token rate of the whole."""
    pauses = random.Random(num_streams)
    texts = [" ".join(uuid.uuid4().hex[:4] for _ in range(PROMPT_WORDS)) for _ in range(num_turns)]
    queue = iter(texts)

    async def stream() -> None:
        for text in queue:
            await asyncio.sleep(pauses.uniform(0, MAX_PAUSE_S))
            await way.turn(text, measured)

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(num_streams)))
    measured.rates.append(num_turns * way.num_output / (time.perf_counter() - began))


async def run(num_turns: int, num_turns_many: int, num_rounds: int, folder: Path) -> list[Row]:
    checkpoint = folder / "checkpoint"
    init_checkpoint(checkpoint, seed=1, geometry="demo")
    settings = validate(
        {
            "run_dir": str(folder / "run"),
            "redis": {"data_dir": str(folder / "redis")},
            "model": {"path": str(checkpoint)},
            "router": {"port": 0},
            "placement": {"path": "local"},
            "cache": {"num_pages": 1024},
        }
    )
    letters = Tokenizer.load(checkpoint).encode("abcdefghijklmnopqrstuvwxyz")
    rows: list[Row] = []
    async with (
        LocalCluster(settings=settings, allow_forced_tokens=True) as cluster,
        AsyncClient(cluster.address) as client,
    ):
        decode = [p.address for name, p in cluster.processes.items() if name.startswith("decode")]
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("rounds", total=len(STREAMS) * num_rounds * 3)
            for num_streams, num_output in STREAMS.items():
                forced = [letters[index % len(letters)] for index in range(num_output)]
                ways: dict[str, Way] = {
                    "router": Router(cluster.address, forced),
                    "stateless": Stateless(cluster.address, forced),
                    "direct": Direct(decode, forced, client),
                }
                results = {name: Measured() for name in ways}
                for way in ways.values():
                    await measure(way, num_streams, num_streams, Measured())  # warm
                wanted = num_turns if num_streams == 1 else num_turns_many
                per_round = max(num_streams, wanted // num_rounds)
                for _ in range(num_rounds):
                    for name, way in ways.items():
                        await measure(way, num_streams, per_round, results[name])
                        progress.advance(task)
                rows += [row(name, num_streams, num_output, results) for name in results]
                for way in ways.values():
                    await way.close()
    return rows


def row(name: str, num_streams: int, num_output: int, results: dict[str, Measured]) -> Row:
    """One line; the last columns compare with the direct and the stateless way of the same run."""
    mine, direct, stateless = results[name], results["direct"], results["stateless"]
    rate = percentile(mine.rates, 0.5)
    return {
        "way": name,
        "streams": num_streams,
        "turns": len(mine.first_token),
        "output_tokens": num_output,
        "first_ms_p50": percentile(mine.first_token, 0.5) * 1e3,
        "first_ms_p99": percentile(mine.first_token, 0.99) * 1e3,
        "inter_ms_p50": percentile(mine.inter_token, 0.5) * 1e3,
        "inter_ms_p99": percentile(mine.inter_token, 0.99) * 1e3,
        "tokens_per_s": rate,
        "first_added_ms_p50": (percentile(mine.first_token, 0.5) - percentile(direct.first_token, 0.5)) * 1e3,
        "rate_ratio": rate / percentile(direct.rates, 0.5),
        "first_added_to_stateless_ms_p50": (percentile(mine.first_token, 0.5) - percentile(stateless.first_token, 0.5))
        * 1e3,
        "inter_ratio_to_stateless_p50": percentile(mine.inter_token, 0.5) / percentile(stateless.inter_token, 0.5),
        "rate_ratio_to_stateless": rate / percentile(stateless.rates, 0.5),
    }


def main(
    turns: Annotated[int, typer.Option(min=1, help="Turns of each way with one stream.")] = 40,
    turns_many: Annotated[int, typer.Option(min=1, help="Turns of each way with several streams.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="The ways alternate this often.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Measure on this machine; three to five minutes.

    Examples: python -m benchmarks.latency --turns 20 --turns-many 1 --rounds 2 · python -m benchmarks.latency --json
    """
    load = load_average()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(run(turns, turns_many, rounds, Path(name)))
    publish("latency", rows, as_json=json, load=load)


if __name__ == "__main__":
    typer.run(main)
