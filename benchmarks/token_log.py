"""What the token log costs: the same turns through a router that logs each token before it tells it, and through one
that does not, on the same ranks and the same Redis, which syncs its file before every answer.

Both routers begin and commit their turns alike. With one stream, turns go to the two in turn. With many, the two take
short rounds in turn, and each pair of rounds gives one ratio of token rates: what else the machine does meets both.
First tokens of many streams are compared in rounds where each stream's turns alternate. Beside the clock stands the
processor time of router and Redis, where the log's work is done, and its share of theirs and the ranks': other work on
the machine changes that least.

    python -m benchmarks.token_log                                    the table of docs/performance.md
    python -m benchmarks.token_log --turns 10 --pairs 1               a quick look
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer

from benchmarks._report import Row, load_average, percentile, publish
from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.local import LocalCluster
from seamount.cluster.process import RouterStart
from seamount.cluster.redis_server import RedisServer
from seamount.cluster.settings import validate
from seamount.router.session_service import FORCED_TOKENS_KEY
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, session_pb2, session_pb2_grpc

NUM_STREAMS = 32
OUTPUT_TOKENS = 48
"""Of each turn of many streams; those of one stream are for first tokens, and have few."""
FEW_TOKENS = 8
PROMPT_WORDS = 4


@dataclass(slots=True, kw_only=True)
class Way:
    """One router, and what was measured there: seconds to the first token, alone and of many; tokens a second;
    processor seconds a token of router and Redis, ``pids``, and of the ranks, ``ranks``."""

    name: str
    sessions: session_pb2_grpc.SessionServiceStub
    pids: tuple[int, ...]
    ranks: tuple[int, ...]
    first_alone: list[float] = field(default_factory=list)
    first_of_many: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    ranks_cpu_s: list[float] = field(default_factory=list)


async def turn(way: Way, forced: list[int]) -> float:
    """A turn of a fresh session, made beforehand; returns the seconds to its first token."""
    chat = session_pb2.CreateSessionRequest(thinking_mode=common_pb2.THINKING_MODE_CHAT)
    created = await way.sessions.CreateSession(chat)
    request = session_pb2.RunTurnRequest(session_id=created.session.id, idempotency_key="1")
    text = " ".join(uuid.uuid4().hex[:4] for _ in range(PROMPT_WORDS))
    request.messages.add(role=common_pb2.ROLE_USER, content=text)
    request.sampling.max_output_tokens = len(forced)
    metadata = ((FORCED_TOKENS_KEY, ",".join(map(str, forced))),)
    first, num_tokens = 0.0, 0
    began = time.perf_counter()
    async for response in way.sessions.RunTurn(request, metadata=metadata):
        # One printable character a token: each token is one content event.
        told = sum(event.WhichOneof("event") == "content_delta" for event in response.events)
        first = first or (time.perf_counter() - began if told else 0.0)
        num_tokens += told
    assert num_tokens == len(forced), num_tokens
    return first


async def alone(ways: list[Way], num_turns: int, forced: list[int]) -> None:
    for number in range(num_turns):
        for way in ways if number % 2 else reversed(ways):
            way.first_alone.append(await turn(way, forced))


async def mixed(ways: list[Way], forced: list[int]) -> None:
    """Every stream has a turn at each router, half of the streams at the one first."""

    async def stream(number: int) -> None:
        for way in ways if number % 2 else reversed(ways):
            way.first_of_many.append(await turn(way, forced))

    await asyncio.gather(*map(stream, range(NUM_STREAMS)))


async def round_of(way: Way, forced: list[int]) -> None:
    num_tokens = NUM_STREAMS * len(forced)
    began, cpu_s, ranks_cpu_s = time.perf_counter(), processor_s(way.pids), processor_s(way.ranks)
    await asyncio.gather(*(turn(way, forced) for _ in range(NUM_STREAMS)))
    way.rates.append(num_tokens / (time.perf_counter() - began))
    way.cpu_s.append((processor_s(way.pids) - cpu_s) / num_tokens)
    way.ranks_cpu_s.append((processor_s(way.ranks) - ranks_cpu_s) / num_tokens)


def processor_s(pids: tuple[int, ...]) -> float:
    """Of these processes since their starts (Linux)."""
    fields = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def unlogged(start: RouterStart) -> AsyncIterator[tuple[str, int]]:
    """The address and process of a second router, without a log."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.unlogged_router",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(start.model_dump_json().encode())
    process.stdin.close()
    told = (await process.stdout.readline()).decode()
    try:
        yield json.loads(told)["address"], process.pid
    finally:
        process.terminate()
        await process.wait()


async def run(num_turns: int, num_pairs: int, folder: Path, redis: RedisServer) -> list[Row]:
    checkpoint = folder / "checkpoint"
    init_checkpoint(checkpoint, seed=1, geometry="demo")
    settings = validate(
        {
            "run_dir": str(folder / "run"),
            "redis_url": redis.url,
            "model": {"path": str(checkpoint)},
            "router": {"port": 0},
            "placement": {"path": "local"},
            "cache": {"num_pages": 1024},
        }
    )
    letters = Tokenizer.load(checkpoint).encode("abcdefghijklmnopqrstuvwxyz")
    forced = [letters[index % len(letters)] for index in range(OUTPUT_TOKENS)]
    async with LocalCluster(settings=settings, allow_forced_tokens=True) as cluster:
        start = cluster.processes["router-0"].start
        assert isinstance(start, RouterStart)
        async with (
            unlogged(start) as (address, pid),
            grpc.aio.insecure_channel(cluster.address) as here,
            grpc.aio.insecure_channel(address) as there,
        ):
            ranks = tuple(p.pid for name, p in cluster.processes.items() if name.startswith("decode"))
            logging, plain = (redis.pid, cluster.processes["router-0"].pid), (redis.pid, pid)
            ways = [
                Way(name="logged", sessions=stub(here), pids=logging, ranks=ranks),
                Way(name="not logged", sessions=stub(there), pids=plain, ranks=ranks),
            ]
            for way in ways:  # warm
                await asyncio.gather(*(turn(way, forced[:FEW_TOKENS]) for _ in range(NUM_STREAMS)))
            await alone(ways, num_turns, forced[:FEW_TOKENS])
            for pair in range(num_pairs):
                for way in ways if pair % 2 else reversed(ways):
                    await round_of(way, forced)
                await mixed(ways, forced[:FEW_TOKENS])
    return [row(way, *ways) for way in ways]


stub = session_pb2_grpc.SessionServiceStub


def row(way: Way, logged: Way, plain: Way) -> Row:
    """One line; the columns ``log_…`` are what the log costs: milliseconds to the first token, shares of rate and of
    processor time."""
    ratios = [one / other for one, other in zip(logged.rates, plain.rates, strict=True)]
    ranks_cpu_s = percentile([*logged.ranks_cpu_s, *plain.ranks_cpu_s], 0.5)  # the log's work is not theirs
    costs = zip(logged.cpu_s, plain.cpu_s, strict=True)
    shares = [(with_log - without) / (without + ranks_cpu_s) for with_log, without in costs]
    return {
        "router": way.name,
        "turns": len(way.first_alone),
        "first_ms_p50": percentile(way.first_alone, 0.5) * 1e3,
        "pairs_of_rounds": len(way.rates),
        "streams": NUM_STREAMS,
        "tokens_per_s": percentile(way.rates, 0.5),
        "first_of_many_ms_p50": percentile(way.first_of_many, 0.5) * 1e3,
        "log_first_ms_p50": added_ms(logged.first_alone, plain.first_alone),
        "log_first_of_many_ms_p50": added_ms(logged.first_of_many, plain.first_of_many),
        "log_share_of_rate_p50": 1 - percentile(ratios, 0.5),
        "log_share_least": 1 - max(ratios),
        "log_share_most": 1 - min(ratios),
        "cpu_us_per_token": percentile(way.cpu_s, 0.5) * 1e6,
        "ranks_cpu_us_per_token": percentile(way.ranks_cpu_s, 0.5) * 1e6,
        "log_share_of_cpu_p50": percentile(shares, 0.5),
    }


def added_ms(logged: list[float], plain: list[float]) -> float:
    """Median of the differences of turns that were taken one after the other."""
    return percentile([one - other for one, other in zip(logged, plain, strict=True)], 0.5) * 1e3


def main(
    turns: Annotated[int, typer.Option(min=1, help="Turns of each router with one stream.")] = 100,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds with many streams.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Measure on this machine; four minutes.

    Examples: python -m benchmarks.token_log --turns 10 --pairs 1 · python -m benchmarks.token_log --json
    """
    load = load_average()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with tempfile.TemporaryDirectory() as name, RedisServer() as redis:
        redis.start(Path(name) / "redis")
        rows = asyncio.run(run(turns, pairs, Path(name), redis))
    publish("token_log", rows, as_json=as_json, load=load)


if __name__ == "__main__":
    typer.run(main)
