"""The power goes while turns are committed: with ``appendfsync always`` none that was acknowledged is lost.

A killed server loses nothing that it wrote, for the page cache outlives it; only what was synced outlives the power.
So a small library (``synced_size.c``) is loaded into the server, which notes the size of the append-only file at each
fsync that came back. A power cut is then SIGKILL at a random moment, and the file cut to that size: the least that a
disk can be left with. Every other time a part of what was written behind it is left as well, as where the disk had
begun with the next record. The server starts again from that (``aof-load-truncated yes``, its default).
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from seamount.cluster.redis_server import RedisServer
from seamount.router.begun_turn import BegunTurn
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import Sessions
from seamount.router.store import Store
from seamount.router.stored import RunningTurn
from seamount.v1 import record_pb2, session_pb2
from seamount.wire.errors import Unavailable
from seamount.wire.ids import RouterId, SessionId, TenantId

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)
TENANT = TenantId("t")
NUM_COMMITS, NUM_CUTS, NUM_WRITERS = 1000, 8, 16
NEXT_RECORD = b"*1\r\n$5\r\nMULTI\r\n*3\r\n$5\r\nRPUSH\r\n$40\r\nseamount"
"""The beginning of a record, for a server that was killed with everything synced."""


@pytest.fixture(scope="module")
def synced_size_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("library") / "synced_size.so"
    source = Path(__file__).with_name("synced_size.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass(kw_only=True)
class Writer:
    """Commits turn after turn of one session. in_doubt: sent to be committed, and not answered yet."""

    session_id: SessionId
    acknowledged: list[record_pb2.TurnRecord] = field(default_factory=list)
    in_doubt: record_pb2.TurnRecord | None = None

    async def write(self, sessions: Sessions, rng: random.Random) -> None:
        """Until the server is gone."""
        while True:
            try:
                await self._write_one(sessions, rng)
            except Unavailable:
                return

    async def _write_one(self, sessions: Sessions, rng: random.Random) -> None:
        turn = await sessions.begin_turn(
            TENANT,
            self.session_id,
            key=f"k{len(self.acknowledged)}",
            body_hash=bytes(32),
            start=record_pb2.TurnStart(),
            time_to_live_s=600.0,
            expected_head=len(self.acknowledged),
        )
        if isinstance(turn, ReplayedTurn):
            assert turn.record == self.in_doubt, "committed when the power went, without an answer"
            assert turn.record is not None
            self.acknowledged.append(turn.record)
            return
        if isinstance(turn, RunningTurn):  # begun when the power went
            turn, _ = await sessions.take_over(TENANT, self.session_id, turn)
        assert isinstance(turn, BegunTurn)
        record = record_pb2.TurnRecord(turn_id=turn.turn_id)
        record.output.token_ids.extend(rng.randrange(129_280) for _ in range(rng.randrange(400)))
        self.in_doubt = record
        await sessions.commit_turn(turn, record, rank="", num_context_tokens=0)
        self.acknowledged.append(record)

    async def num_lost(self, sessions: Sessions) -> int:
        """Acknowledged turns that are gone. What is there is whole: the chain over all records is verified, and
        behind the acknowledged ones there is at most the one that was sent last."""
        _, history = await sessions.read(TENANT, self.session_id)
        found = list(history.records)
        num_known = min(len(found), len(self.acknowledged))
        assert found[:num_known] == self.acknowledged[:num_known]
        assert found[num_known:] in ([], [self.in_doubt])
        return len(self.acknowledged) - num_known


class Power:
    """A server whose power can be cut."""

    def __init__(self, data_dir: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = RedisServer()
        self.num_unsynced_bytes = 0
        self._data_dir = data_dir
        self._synced_size = data_dir.with_name("synced_size")
        self._library = library
        self._monkeypatch = monkeypatch

    async def on(self) -> str:
        with self._monkeypatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(self._library))
            patch.setenv("SYNCED_SIZE", str(self._synced_size))
            return await asyncio.to_thread(self.server.start, self._data_dir)

    async def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        await asyncio.to_thread(self.server.stop)

    def cut(self, rng: random.Random, *, is_torn: bool) -> None:
        """Leave of the file what was synced; torn: and a part of what follows."""
        (file,) = self._data_dir.glob("appendonlydir/*.incr.aof")
        written = file.read_bytes()
        num_synced = int.from_bytes(self._synced_size.read_bytes(), sys.byteorder)
        assert 0 < num_synced <= len(written)
        self.num_unsynced_bytes += len(written) - num_synced
        following = written[num_synced:] or NEXT_RECORD
        torn = following[: rng.randrange(1, len(following))] if is_torn else b""
        file.write_bytes(written[:num_synced] + torn)


async def write_until(has_enough: Callable[[], bool], power: Power, url: str, writers: list[Writer], name: str) -> None:
    """All writers at once, until there is enough and a random moment later the server is killed."""
    store = await Store.open(url, retry_budget_s=0.0, command_timeout_s=10.0)  # only a server that is gone ends it
    sessions, rng = Sessions(store, secret=bytes(32), router_id=RouterId(name)), random.Random(name)
    writing = [asyncio.create_task(writer.write(sessions, rng)) for writer in writers]
    while not has_enough():
        assert not any(task.done() for task in writing)
        await asyncio.sleep(0.002)
    await asyncio.sleep(rng.uniform(0.0, 0.01))
    await power.kill()
    await asyncio.gather(*writing)
    await sessions.close()
    await store.close()


async def sessions_of(url: str) -> tuple[Store, list[Writer]]:
    store = await Store.open(url)
    sessions = Sessions(store, secret=bytes(32), router_id=RouterId("first"))
    made = [await sessions.create(TENANT, session_pb2.CreateSessionRequest(), model="m") for _ in range(NUM_WRITERS)]
    return store, [Writer(session_id=SessionId(session.id)) for session in made]


async def num_lost(url: str, writers: list[Writer]) -> int:
    store = await Store.open(url)
    assert await store.command("CONFIG", "GET", "aof-load-truncated") == [b"aof-load-truncated", b"yes"]
    cold = Sessions(store, secret=bytes(32), router_id=RouterId("cold"))
    lost = sum([await writer.num_lost(cold) for writer in writers])
    await store.close()
    return lost


@pytest.fixture
def power(tmp_path: Path, synced_size_library: Path, monkeypatch: pytest.MonkeyPatch) -> Power:
    return Power(tmp_path / "redis", synced_size_library, monkeypatch)


@pytest.mark.figures
async def test_no_acknowledged_turn_is_lost_when_the_power_goes(power: Power) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    url = await power.on()
    store, writers = await sessions_of(url)
    await store.close()
    lost = 0
    for cut in range(NUM_CUTS):
        most = NUM_COMMITS * (cut + 1) // NUM_CUTS
        await write_until(
            lambda most=most: sum(len(writer.acknowledged) for writer in writers) >= most,
            power,
            url,
            writers,
            f"{seed}-{cut}",
        )
        power.cut(rng, is_torn=cut % 2 == 1)
        url = await power.on()
        lost += await num_lost(url, writers)
    await asyncio.to_thread(power.server.stop)
    committed = sum(len(writer.acknowledged) for writer in writers)
    print(
        f"appendfsync always: {committed} commits acknowledged, {NUM_CUTS} power cuts ({NUM_CUTS // 2} in the middle "
        f"of a record), {power.num_unsynced_bytes} bytes written and not synced, {lost} turns lost"
    )
    assert committed >= NUM_COMMITS
    assert lost == 0


@pytest.mark.figures
async def test_the_cut_takes_what_was_not_synced(power: Power) -> None:
    """The same with a server that answers before it syncs: the cut is seen to lose turns."""
    url = await power.on()
    store, writers = await sessions_of(url)
    await store.command("CONFIG", "SET", "appendfsync", "no")
    await store.close()
    await write_until(lambda: sum(len(writer.acknowledged) for writer in writers) >= 100, power, url, writers, "no")
    power.cut(random.Random(0), is_torn=False)
    lost = await num_lost(await power.on(), writers)
    await asyncio.to_thread(power.server.stop)
    committed = sum(len(writer.acknowledged) for writer in writers)
    print(f"appendfsync no: {committed} commits acknowledged, 1 power cut, {lost} turns lost")
    assert lost == committed
