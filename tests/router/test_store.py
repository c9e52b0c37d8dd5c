"""The store against real servers that are killed, stopped, full, emptied, and against one that is too old."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

import seamount.router.store as store_module
from seamount.cluster.redis_server import RedisServer
from seamount.router.begun_turn import BegunTurn
from seamount.router.directory import Beat, PeerRecord, Role
from seamount.router.sessions import Sessions
from seamount.router.store import LIBRARY, Store, check_server
from seamount.router.watcher import Directory
from seamount.v1 import record_pb2, session_pb2
from seamount.wire.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from seamount.wire.ids import RouterId, SessionId, TenantId

TENANT = TenantId("t")


def opened(store: Store, name: str = "r") -> Sessions:
    return Sessions(store, secret=b"s" * 32, router_id=RouterId(name))


async def created(sessions: Sessions, key: str = "") -> SessionId:
    request = session_pb2.CreateSessionRequest(idempotency_key=key)
    return SessionId((await sessions.create(TENANT, request, model="m")).id)


async def begun(sessions: Sessions, session_id: SessionId, key: str) -> BegunTurn:
    turn = await sessions.begin_turn(
        TENANT, session_id, key=key, body_hash=b"b" * 32, start=record_pb2.TurnStart(), time_to_live_s=60.0
    )
    assert isinstance(turn, BegunTurn)
    return turn


async def commit(sessions: Sessions, turn: BegunTurn, size: int = 100) -> record_pb2.TurnRecord:
    made = record_pb2.TurnRecord(turn_id=turn.turn_id)
    made.output.token_ids.extend(random.randrange(129_280) for _ in range(size))
    await sessions.commit_turn(turn, made, rank="", num_context_tokens=0)
    return made


async def test_acknowledged_commits_survive_kill_and_restart(tmp_path: Path) -> None:
    """SIGKILL at a random moment of a stream of commits, restart, and the stream goes on without an error."""
    server = RedisServer()
    store = await Store.open(server.start(tmp_path))
    sessions = opened(store)
    session_id = await created(sessions)
    made: list[record_pb2.TurnRecord] = []

    async def write() -> None:
        while len(made) < 150:
            turn = await begun(sessions, session_id, f"k{len(made)}")
            made.append(await commit(sessions, turn))

    writing = asyncio.create_task(write())
    for _ in range(3):
        await asyncio.sleep(random.uniform(0.01, 0.06))
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start, tmp_path)
    await asyncio.wait_for(writing, 20.0)
    cold = opened(store, "cold")
    assert list((await cold.read(TENANT, session_id))[1].records) == made
    await store.close()
    server.stop()


async def test_a_stopped_server_is_unavailable_and_the_session_intact_afterwards(tmp_path: Path) -> None:
    with RedisServer() as server:
        store = await Store.open(server.start(tmp_path), command_timeout_s=0.1, retry_budget_s=0.3)
        sessions = opened(store)
        session_id = await created(sessions)
        turn = await begun(sessions, session_id, "k")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            with pytest.raises(Unavailable) as caught:
                await commit(sessions, turn)
            assert caught.value.reason == "STORE_UNAVAILABLE"
            assert caught.value.retry_after_s
            with pytest.raises(Unavailable):
                await sessions.get(TENANT, session_id)
            assert time.monotonic() - start < 2.0
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await asyncio.sleep(0.1)
        # The write that timed out has been applied by now: the same commit again is the same commit.
        made = await commit(sessions, turn)
        view, history = await opened(store, "cold").read(TENANT, session_id)
        assert (view.session.head, view.running) == (1, None)
        assert history.records[0].turn_id == made.turn_id
        await store.close()


async def test_a_stall_shorter_than_the_budget_shows_only_as_time(tmp_path: Path) -> None:
    with RedisServer() as server:
        store = await Store.open(server.start(tmp_path), command_timeout_s=0.1, retry_budget_s=5.0)
        sessions = opened(store)
        session_id = await created(sessions)
        epoch = (await sessions.get(TENANT, session_id)).epoch
        os.kill(server.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.5, os.kill, server.pid, signal.SIGCONT)
        turn = await begun(sessions, session_id, "k")  # sent several times, begun once
        assert turn.epoch == epoch + 1
        await commit(sessions, turn)
        await store.close()


async def test_cancelled_calls_never_get_each_others_replies(redis_url: str, namespace: str) -> None:
    store = await Store.open(redis_url, namespace=namespace, max_connections=2)
    for index in range(50):
        await store.command("SET", store.key(str(index)), f"value {index}")
    for _ in range(8):
        calls = [asyncio.create_task(store.command("GET", store.key(str(index)))) for index in range(50)]
        for call in calls:
            if random.random() < 0.5:
                asyncio.get_running_loop().call_later(random.random() * 0.01, call.cancel)
        replies = await asyncio.gather(*calls, return_exceptions=True)
        for index, reply in enumerate(replies):
            assert isinstance(reply, asyncio.CancelledError) or reply == f"value {index}".encode()
    await store.close()


async def test_calls_on_the_kept_connection_never_get_each_others_replies(redis_url: str, namespace: str) -> None:
    store = await Store.open(redis_url, namespace=namespace)
    for index in range(50):
        await store.command("SET", store.key(str(index)), f"value {index}")

    async def read(index: int) -> list[bytes]:
        return await store.functions([("GET", store.key(str(one))) for one in (index, index // 2)])

    for _ in range(8):
        calls = [asyncio.create_task(read(index)) for index in range(50)]
        for call in calls:
            if random.random() < 0.3:
                asyncio.get_running_loop().call_later(random.random() * 0.005, call.cancel)
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(not isinstance(reply, asyncio.CancelledError) for reply in replies) > 10
        for index, reply in enumerate(replies):
            expected = [f"value {one}".encode() for one in (index, index // 2)]
            assert isinstance(reply, asyncio.CancelledError) or reply == expected
    await store.command("SET", store.key("text"), "x")
    with pytest.raises(DataLoss):  # when all have been done and their replies read
        await store.functions([("LPUSH", store.key("text"), 1), ("SET", store.key("1"), "new")])
    assert await read(1) == [b"new", b"value 0"]
    await store.close()


def test_a_connection_that_was_reset_meanwhile_is_made_anew(tmp_path: Path) -> None:
    """On the loop that routers run on, which has an error of its own for it."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)

    async def run(upstream: str) -> None:
        open_writers: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            open_writers.append(writer)
            from_redis, to_redis = await asyncio.open_unix_connection(upstream)
            with suppress(ConnectionError):
                await asyncio.gather(relay(reader, to_redis), relay(from_redis, writer))

        async def reset() -> None:
            while open_writers:
                writer = open_writers.pop()
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            await asyncio.sleep(0.05)

        proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
        store = await Store.open(f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/0")
        assert await store.functions([("SET", "a", 1)]) == [b"OK"]
        await reset()
        assert await store.command("GET", "a") == b"1"
        with pytest.raises(Unavailable):  # tried once
            await store.functions([("GET", "a")])
        assert await store.functions([("GET", "a")]) == [b"1"]
        await store.close()
        proxy.close()

    with RedisServer() as server:
        uvloop.run(run(server.start(tmp_path).removeprefix("unix://")))


async def test_a_cancellation_is_never_lost(store: Store) -> None:
    """Whoever cancels a task in the middle of a call may wait for its end."""

    async def forever() -> None:
        while True:
            await store.command("PING")

    for _ in range(300):
        task = asyncio.create_task(forever())
        await asyncio.sleep(random.random() * 0.002)
        task.cancel()
        await asyncio.wait({task}, timeout=2.0)
        assert task.cancelled()


async def test_a_full_store_refuses_new_work_and_lets_running_work_end(tmp_path: Path) -> None:
    with RedisServer(maxmemory_bytes=256 << 20) as server:
        store = await Store.open(server.start(tmp_path))
        sessions = opened(store)
        record = PeerRecord(peer_id="r", role=Role.ROUTER, address="a", version="0", process_id=1, instance="i")
        ids = [await created(sessions) for _ in range(3)]
        turn = await begun(sessions, ids[0], "k")
        other = await begun(sessions, ids[1], "k")
        await store.command("CONFIG", "SET", "maxmemory", 1 << 20)  # less than is in use
        for refused in (created, lambda sessions: begun(sessions, ids[2], "k")):
            with pytest.raises(ResourceExhausted) as caught:
                await refused(sessions)
            assert caught.value.reason == "STORE_FULL"
            assert caught.value.retry_after_s
        directory = Directory(store, "demo")
        await directory.register(record)  # nobody is declared dead for want of memory
        assert await directory.beat(record.peer_id, Beat(instance="i", counter=1))
        await commit(sessions, turn)
        event = record_pb2.TurnRecord().final_event
        event.failed.status.code = 14
        await sessions.fail_turn(TENANT, ids[1], other, event, log_end="0-1")
        await sessions.delete(TENANT, ids[2])
        assert (await sessions.get(TENANT, ids[0])).session.head == 1
        await store.close()


async def test_the_library_is_loaded_where_it_is_missing_and_replaced_where_it_differs(tmp_path: Path) -> None:
    with RedisServer() as server:
        url = server.start(tmp_path)
        store = await Store.open(url)
        sessions = opened(store)
        session_id = await created(sessions)
        await store.command("FUNCTION", "FLUSH")
        assert (await sessions.get(TENANT, session_id)).session.id == session_id  # loaded on the way
        changed = f"#!lua name={LIBRARY}\nredis.register_function('{LIBRARY}_get_session', function() return 1 end)"
        await store.command("FUNCTION", "LOAD", "REPLACE", changed)
        again = await Store.open(url)
        await begun(opened(again), session_id, "k")
        libraries = await store.command("FUNCTION", "LIST")
        assert len(libraries) == 1
        await again.close()
        await store.close()


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        await Store.open(f"unix://{tmp_path}/none.sock", retry_budget_s=0.1)
    assert caught.value.retry_after_s
    for url in ("http://x", "", "redis://host:port"):
        with pytest.raises(InvalidArgument, match="redis://"):
            await Store.open(url)
    for namespace in ("", "a" * 65, "{x}", "a b"):
        with pytest.raises(InvalidArgument, match="namespace"):
            await Store.open("redis://localhost", namespace=namespace)


async def test_a_wrong_password_is_told_without_the_password(tmp_path: Path) -> None:
    with RedisServer(tcp=True) as server:
        url = server.start(tmp_path)
        secret = url.partition("@")[0].rpartition(":")[2]
        with pytest.raises(FailedPrecondition) as caught:
            await Store.open(url.replace(secret, "wr0ng"))
        assert caught.value.reason == "STORE_ACCESS"
        assert "wr0ng" not in caught.value.message
        await (await Store.open(url)).close()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"redis_version": "6.2.14"}, "REDIS_TOO_OLD"),
        ({}, "REDIS_TOO_OLD"),
        ({"redis_version": "unstable"}, "REDIS_TOO_OLD"),
        ({"redis_version": "7.0.0", "maxmemory_policy": "allkeys-lru"}, "REDIS_EVICTS"),
    ],
)
def test_unsuitable_servers_are_refused_with_a_remedy(facts: dict[str, object], reason: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_server(facts)
    assert caught.value.reason == reason
    assert str(facts.get("maxmemory_policy", facts.get("redis_version", ""))) in caught.value.message


async def test_a_server_that_says_version_6_is_refused() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b"# Server\r\nredis_version:6.2.14\r\n"
        while await reader.read(4096):
            writer.write(b"$%d\r\n%s\r\n" % (len(body), body))
        writer.close()

    old = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = old.sockets[0].getsockname()[1]
    with pytest.raises(FailedPrecondition, match=r"6\.2\.14.*7 or newer.*SEAMOUNT_REDIS_URL"):
        await Store.open(f"redis://127.0.0.1:{port}")
    old.close()


async def test_wrong_types_and_defects_are_told_apart(store: Store) -> None:
    await store.command("SET", store.key("string"), "x")
    with pytest.raises(DataLoss):
        await store.command("LPUSH", store.key("string"), "y")
    with pytest.raises(Internal):
        await store.command("NOSUCHCOMMAND")
    assert await store.pipeline([]) == []
    assert await store.pipeline([("GET", store.key("string")), ("GET", store.key("none"))]) == [b"x", None]
    assert store.facts.append_only
    assert store.facts.eviction_policy == "noeviction"


async def test_namespaces_do_not_see_each_other(store: Store, redis_url: str) -> None:
    session_id = await created(opened(store), "k")
    other = await Store.open(redis_url, namespace=f"{store.namespace}x")
    with pytest.raises(NotFound):
        await opened(other).get(TENANT, session_id)
    await other.close()


def test_every_function_name_carries_the_version() -> None:
    names = re.findall(r"'(seamount\w*)'", store_module._CODE)
    assert len(names) == store_module._CODE.count("redis.register_function")
    assert all(name.startswith(f"{LIBRARY}_") for name in names)
    assert store_module._CODE.startswith(f"#!lua name={LIBRARY}\n")
