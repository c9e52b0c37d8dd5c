"""The judge over tables of polls, the directory against a real server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from seamount.cluster.redis_server import RedisServer
from seamount.router.directory import REMOVE_AFTER_S, Beat, Liveness, PeerJudge, PeerRecord, Role, new_instance
from seamount.router.store import Store
from seamount.router.watcher import Directory, DirectoryWatcher, Registration
from seamount.wire.errors import DeadlineExceeded, InvalidArgument

A, D, ABSENT, UNKNOWN = Liveness.ALIVE, Liveness.DEAD, Liveness.ABSENT, Liveness.UNKNOWN


def peer(peer_id: str = "decode-0", role: Role = Role.DECODE, **changes: object) -> PeerRecord:
    values = {"address": "127.0.0.1:1", "version": "0.1.0", "process_id": 7, "instance": new_instance(), **changes}
    return PeerRecord(peer_id=peer_id, role=role, **values)


def polls(
    counters: Sequence[int | None], expected: Sequence[Liveness], instance: str = "x", gap_s: float = 0.2
) -> list:
    """Polls, one a gap, each with the counter it finds (None: no entry) and what is judged after it."""
    return [(("poll", gap_s, counter, instance), judged) for counter, judged in zip(counters, expected, strict=True)]


BROKEN, CONNECTED = (("broken",), D), ("connected",)

# Steps: ("poll", seconds since the step before, counter or None, instance), ("miss", seconds), ("broken",),
# ("connected",); each with the judgement expected after it. A peer is dead after 3 s.
TABLES = {
    "nothing read yet": [(("miss", 9.0), UNKNOWN), (("broken",), UNKNOWN), *polls([None], [ABSENT])],
    "moves": polls(range(9), [A] * 9, gap_s=1.0),
    "stands still": polls([5, 5, 5, 5, 5, 6, 6], [A, A, A, D, D, A, A], gap_s=1.0),
    "a counter that falls has moved, too": polls([5, 5, 5, 5, 4], [A, A, A, D, A], gap_s=1.0),
    "silence of Redis counts for nobody": [
        *polls([5, 5], [A, A], gap_s=1.0),
        *[(("miss", 1.0), A)] * 60,
        *polls([5, 5, 5], [A, A, D], gap_s=1.0),
    ],
    "a pause of the observer itself counts once": [
        *polls([5], [A]),
        *polls([5], [A], gap_s=500.0),
        *polls([5, 5, 5, 5], [A, A, A, D], gap_s=0.5),
    ],
    "another process starts anew": [
        *polls([5] * 4, [A, A, A, D], gap_s=1.0),
        *polls([5] * 4, [A, A, A, D], "y", gap_s=1.0),
    ],
    "leaves and returns": polls([5, None, 5], [A, ABSENT, A]),
    "broken: needs stream and counter": [*polls([1], [A]), BROKEN, *polls([2, 3], [D, D]), (CONNECTED, A)],
    "broken: a stream alone is not enough": [*polls([1], [A]), BROKEN, (CONNECTED, D), *polls([1, 1, 2], [D, D, A])],
    "broken: the last beat before the break proves nothing": [
        *polls([1], [A]),
        BROKEN,
        (CONNECTED, D),
        *polls([2, 2, 3], [D, D, A]),
    ],
    "broken twice": [
        *polls([1], [A]),
        BROKEN,
        (CONNECTED, D),
        *polls([2], [D]),
        BROKEN,
        *polls([3, 4], [D, D]),
        (CONNECTED, A),
    ],
    "broken, then another process": [*polls([1], [A]), BROKEN, *polls([1], [A], "y")],
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_judge(table: list) -> None:
    now = 1000.0
    judge = PeerJudge(dead_after_s=3.0, clock=lambda: now)
    assert judge.liveness("p") is UNKNOWN
    for index, (step, expected) in enumerate(table):
        match step:
            case ("poll", seconds, counter, instance):
                now += seconds
                judge.observe({} if counter is None else {"p": Beat(instance=instance, counter=counter)})
            case ("miss", seconds):
                now += seconds
                judge.missed()
            case ("broken",):
                judge.mark_broken("p")
            case ("connected",):
                judge.mark_connected("p")
        assert judge.liveness("p") is expected, f"step {index}: {step}"


def test_only_those_who_stood_still_for_a_minute_are_removed() -> None:
    now = 0.0
    judge = PeerJudge(dead_after_s=3.0, clock=lambda: now)
    still = Beat(instance="x", counter=1)
    for second in range(int(REMOVE_AFTER_S) + 1):
        now = float(second)
        assert judge.long_dead() == []
        judge.observe({"still": still, "moving": Beat(instance="y", counter=second)})
        judge.mark_broken("moving")
    assert judge.long_dead() == [("still", still)]


def test_records_and_beats_round_trip_and_refuse_rubbish() -> None:
    record = peer(gang_id="decode-1", gang_rank=1, gang_size=2, expert_parallel=2, layout="fp8/512", fingerprint="ab")
    assert PeerRecord.from_bytes(record.to_bytes()) == record
    newer = record.to_bytes()[:-1] + b',"unknown":[1]}'
    assert PeerRecord.from_bytes(newer) == record
    beat = Beat(instance="x", counter=12, state=b"a:b\xff\0")
    assert Beat.from_bytes(beat.to_bytes()) == beat
    for rubbish in (b"", b"[]", b"{}", b"\xff", record.to_bytes().replace(b":7", b":true"), b'{"role":"queen"}'):
        with pytest.raises(ValueError):  # noqa: PT011
            PeerRecord.from_bytes(rubbish)
        with pytest.raises(ValueError):  # noqa: PT011
            Beat.from_bytes(rubbish)
    with pytest.raises(InvalidArgument):
        peer("")
    with pytest.raises(InvalidArgument):
        peer(instance="a:b")


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is watched is another part's state, without an event of its own
            await asyncio.sleep(0.01)


async def test_peers_come_beat_and_leave(store: Store) -> None:
    directory = Directory(store, "demo")
    watcher = DirectoryWatcher(directory, poll_interval_s=0.02)
    await watcher.start()
    assert watcher.peers() == []
    assert watcher.liveness("decode-0") is ABSENT
    states = iter(range(10**6))
    registration = Registration(directory, peer(), state=lambda: str(next(states)).encode(), interval_s=0.02)
    changed = asyncio.create_task(watcher.wait_changed(5.0))
    await registration.start()
    router = Registration(directory, peer("router-0", Role.ROUTER), interval_s=0.02)
    await router.start()
    assert await changed
    await until(lambda: len(watcher.peers()) == 2)
    assert [found.record.peer_id for found in watcher.peers(Role.DECODE, Role.PREFILL)] == ["decode-0"]
    await until(lambda: watcher.peers(Role.DECODE)[0].state >= b"3")
    assert Directory(store, "other")._keys != directory._keys
    assert await Directory(store, "other").read() == {}
    for _ in range(2):
        await registration.stop()
        await router.stop()
    await until(lambda: watcher.peers(alive_only=False) == [])
    assert not await watcher.wait_changed(0.05)
    for _ in range(2):
        await watcher.stop()


async def test_a_silent_peer_dies_and_revives(store: Store) -> None:
    directory = Directory(store, "demo")
    record = peer()
    await directory.register(record)
    watcher = DirectoryWatcher(directory, poll_interval_s=0.02, dead_after_s=0.3)
    await watcher.start()
    assert watcher.liveness(record.peer_id) is A
    await until(lambda: watcher.liveness(record.peer_id) is D)
    assert watcher.peers() == []
    assert len(watcher.peers(alive_only=False)) == 1
    assert await directory.beat(record.peer_id, Beat(instance=record.instance, counter=1))
    await until(lambda: watcher.liveness(record.peer_id) is A)
    watcher.mark_broken(record.peer_id)
    assert watcher.peers() == []
    await watcher.stop()


async def test_a_successor_is_neither_beaten_for_nor_removed_by_its_predecessor(store: Store) -> None:
    directory = Directory(store, "demo")
    old, new = peer(), peer()
    await directory.register(old)
    await directory.register(new)
    assert not await directory.beat(old.peer_id, Beat(instance=old.instance, counter=9))
    await directory.leave(old)
    await directory.remove(old.peer_id, Beat(instance=old.instance, counter=0))
    assert (await directory.read())[new.peer_id][0] == new
    await directory.beat(new.peer_id, Beat(instance=new.instance, counter=1))
    await directory.remove(new.peer_id, Beat(instance=new.instance, counter=0))  # it has beaten since
    assert new.peer_id in await directory.read()
    await directory.remove(new.peer_id, Beat(instance=new.instance, counter=1))
    assert await directory.read() == {}


async def test_a_lost_directory_fills_again(store: Store) -> None:
    directory = Directory(store, "demo")
    record = peer()
    registration = Registration(directory, record, interval_s=0.02)
    await registration.start()
    for lost in (directory._keys, directory._keys[:1], directory._keys[1:]):
        await store.command("DEL", *lost)
        async with asyncio.timeout(3.0):
            while (await directory.read()).get(record.peer_id, (None,))[0] != record:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await registration.stop()


async def test_unreadable_entries_hide_nobody(store: Store) -> None:
    directory = Directory(store, "demo")
    await directory.register(peer())
    await store.command("HSET", directory._keys[0], b"\xffbad", b"\xff", "half", peer("half").to_bytes())
    entries = await directory.read()
    assert list(entries) == ["decode-0"]


async def test_a_pause_of_redis_kills_nobody(tmp_path: Path) -> None:
    with RedisServer() as server:
        url = server.start(tmp_path)
        store = await Store.open(url, command_timeout_s=0.1)
        directory = Directory(store, "demo")
        registration = Registration(directory, peer(), interval_s=0.05)
        await registration.start()
        # More than MAX_COUNTED_GAP_S: a busy machine may stop this loop, with its beats and its polls, for as long.
        watcher = DirectoryWatcher(directory, poll_interval_s=0.05, dead_after_s=1.5)
        await watcher.start()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            await until(lambda: not watcher.is_answered)
            for _ in range(20):
                await asyncio.sleep(0.1)
                assert watcher.liveness("decode-0") is A
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for _ in range(10):
            await asyncio.sleep(0.05)
            assert watcher.liveness("decode-0") is A
        await until(lambda: watcher.is_answered)
        await watcher.stop()
        await registration.stop()
        await store.close()


async def test_rendezvous(store: Store) -> None:
    directory = Directory(store, "demo")
    waiting = [asyncio.create_task(directory.wait_for("gang-1", "store", timeout_s=5.0)) for _ in range(3)]
    await asyncio.sleep(0.05)
    await directory.publish("gang-2", "store", b"other")
    await directory.publish("gang-1", "store", b"127.0.0.1:5\xff")
    assert await asyncio.gather(*waiting) == [b"127.0.0.1:5\xff"] * 3
    with pytest.raises(DeadlineExceeded):
        await directory.wait_for("gang-1", "other", timeout_s=0.1)
