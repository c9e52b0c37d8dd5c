"""What logging a token before its events are told adds to it: from the rank's frame to the client's event.

The log's writer alone, with a real server that syncs its file before every answer. Each turn adds a token every 20 ms,
at a moment of its own; the delay is from ``TurnLog.add`` to the delivery of the events. No rank, no model: what they do
to the same cores is in benchmarks.latency.

    python -m benchmarks.token_log                    the table of docs/performance.md
    python -m benchmarks.token_log --seconds 2        a quick look
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks._report import Row, load_average, percentile, publish
from seamount.cluster.redis_server import RedisServer
from seamount.router.session_turns import BegunTurn
from seamount.router.sessions import Sessions
from seamount.router.store import Store
from seamount.router.stored import AppendArguments
from seamount.router.token_log import TokenLog
from seamount.v1 import events_pb2, record_pb2, session_pb2
from seamount.wire.errors import SeamountError
from seamount.wire.ids import RankId, RouterId, SessionId, TenantId

PACE_S = 0.02
TURNS = (1, 32, 128)
TENANT = TenantId("bench")


class Flushes:
    """Counts the round trips of a ``Sessions``."""

    def __init__(self, sessions: Sessions) -> None:
        self.num = 0
        self._append = sessions.append_tokens
        sessions.append_tokens = self  # type: ignore[method-assign,assignment]

    async def __call__(self, appends: Sequence[AppendArguments]) -> list[SeamountError | None]:
        self.num += 1
        return await self._append(appends)


async def begun(sessions: Sessions) -> BegunTurn:
    session = await sessions.create(TENANT, session_pb2.CreateSessionRequest(), model="m")
    turn = await sessions.begin_turn(
        TENANT,
        SessionId(session.id),
        key="k",
        body_hash=bytes(32),
        start=record_pb2.TurnStart(),
        time_to_live_s=600.0,
    )
    assert isinstance(turn, BegunTurn)
    return turn


async def one_turn(token_log: TokenLog, turn: BegunTurn, until: float, delays: list[float]) -> None:
    added: list[float] = []

    def deliver(events: Sequence[events_pb2.TurnEvent]) -> None:
        now = time.perf_counter()
        delays.extend(now - added[event.sequence] for event in events)

    log = token_log.open(turn, deliver)
    await asyncio.sleep(random.uniform(0, PACE_S))
    while time.perf_counter() < until:
        event = events_pb2.TurnEvent(turn_id=turn.turn_id, sequence=len(added))
        event.content_delta.text = "word"
        added.append(time.perf_counter())
        log.add([len(added)], (), [event], decode_rank=RankId("decode-0.0"))
        await asyncio.sleep(PACE_S)
    await log.is_logged()


async def measure(store: Store, num_turns: int, seconds: float) -> Row:
    sessions = Sessions(store, secret=bytes(32), router_id=RouterId("bench"))
    token_log, flushes, delays = TokenLog(sessions), Flushes(sessions), list[float]()
    turns = [await begun(sessions) for _ in range(num_turns)]
    began = time.perf_counter()
    until = began + seconds
    await asyncio.gather(*(one_turn(token_log, turn, until, delays) for turn in turns))
    took_s = time.perf_counter() - began
    await sessions.close()
    return {
        "turns": num_turns,
        "tokens": len(delays),
        "tokens_per_s": len(delays) / took_s,
        "flushes_per_s": flushes.num / took_s,
        "delay_ms_p50": percentile(delays, 0.5) * 1e3,
        "delay_ms_p99": percentile(delays, 0.99) * 1e3,
        "delay_over_pace_p50": percentile(delays, 0.5) / PACE_S,
    }


async def run(seconds: float, folder: Path) -> list[Row]:
    with RedisServer() as server:
        store = await Store.open(server.start(folder))
        try:
            return [await measure(store, num_turns, seconds) for num_turns in TURNS]
        finally:
            await store.close()


def main(
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each number of turns.")] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Measure on this machine; half a minute.

    Examples: python -m benchmarks.token_log --seconds 2 · python -m benchmarks.token_log --json
    """
    load = load_average()
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(run(seconds, Path(name)))
    publish("token_log", rows, as_json=json, load=load)


if __name__ == "__main__":
    typer.run(main)
