"""Streams that survive: routers killed and stopped, Redis restarted, decode ranks hung, clients gone. The same text
token for token as undisturbed, every event once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from seamount.cluster.local import LocalCluster
from seamount.cluster.redis_server import RedisServer
from seamount.router.client import AsyncClient, Sampling, TurnStream, user
from seamount.router.quarantine import NODE_WINDOW_S
from seamount.v1 import common_pb2, events_pb2, session_pb2
from seamount.wire.errors import Internal, SeamountError

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
PagesAreBack = Callable[[AsyncClient], Awaitable[None]]
Events = list[events_pb2.TurnEvent]
# Long enough (seconds) that a fault surely falls into it; with this seed the model does not end it earlier.
STORY = Sampling(max_output_tokens=300, temperature=0.8, seed=9)
ENDLESS = Sampling(max_output_tokens=3000, temperature=0.0)
OVERRIDES = {
    "pools": {"decode": {"gangs": 2, "expert_parallel": 1}, "prefill": {"gangs": 0}},
    "placement": {"path": "local"},
    "directory": {"beat_s": 0.2, "dead_after_s": 1.5},
    "engine": {"step_timeout_s": 3.0},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster) -> AsyncIterator[LocalCluster]:
    async with start_cluster(OVERRIDES, num_routers=2) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster, pages_are_back: PagesAreBack) -> AsyncIterator[AsyncClient]:
    """Knows both routers; the first one is asked first."""
    for number in range(2):
        if f"router-{number}" not in cluster.processes:
            await cluster.start_router(number)
    async with AsyncClient(addresses(cluster)) as opened:
        yield opened
        await pages_are_back(opened)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(cluster: LocalCluster) -> str:
    """What the turn says when nobody is disturbed: every session of this file begins alike."""
    async with AsyncClient(cluster.address) as client:
        session = await client.create_session()
        turn = await client.run_turn(session.id, [user("tell me a story")], sampling=STORY).result()
        assert turn.usage.num_output_tokens == STORY.max_output_tokens
        return turn.reasoning + turn.content


def addresses(cluster: LocalCluster) -> str:
    return ",".join(cluster.processes[f"router-{number}"].address for number in range(2))


async def begin(
    client: AsyncClient, *, num_events: int = 20, sampling: Sampling = STORY
) -> tuple[session_pb2.Session, TurnStream, Events]:
    """A story under way, the first events taken."""
    session = await client.create_session()
    stream = client.run_turn(session.id, [user("tell me a story")], sampling=sampling)
    return session, stream, [await anext(stream) for _ in range(num_events)]


def text(events: Events) -> str:
    return "".join(event.reasoning_delta.text + event.content_delta.text for event in events)


def numbers(events: Events) -> list[int]:
    return [event.sequence for event in events]


async def rest(stream: TurnStream) -> tuple[Events, float]:
    """What is left of a stream, and the longest pause in it."""
    events, pause_s, moved_at = [], 0.0, time.monotonic()
    async for event in stream:
        pause_s, moved_at = max(pause_s, time.monotonic() - moved_at), time.monotonic()
        events.append(event)
    return events, pause_s


async def check_whole(client: AsyncClient, session_id: str, seen: Events, expected: str) -> None:
    """Every event once, the undisturbed text, one committed turn, and the same events for whoever asks again."""
    assert numbers(seen) == list(range(1, len(seen) + 1))
    assert text(seen) == expected
    assert seen[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH
    again = [event async for event in client.resume_turn(session_id, seen[0].turn_id)]
    assert again == seen
    session = await client.get_session(session_id)
    assert (session.head, session.state) == (1, session_pb2.SESSION_STATE_IDLE)


@pytest.mark.figures
async def test_router_killed_under_a_stream(cluster: LocalCluster, client: AsyncClient, expected: str) -> None:
    session, stream, seen = await begin(client, sampling=replace(STORY, num_logprobs=1))
    await cluster.kill("router-0")
    events, pause_s = await rest(stream)
    await check_whole(client, session.id, seen + events, expected)
    assert sum(len(event.logprobs) for event in seen + events) == STORY.max_output_tokens
    print(f"router killed: the stream paused for {pause_s:.2f} s")


@pytest.mark.figures
async def test_router_stopped_under_a_stream_and_continued(
    cluster: LocalCluster, client: AsyncClient, expected: str
) -> None:
    session, stream, seen = await begin(client)
    stopped = cluster.processes["router-0"]
    await cluster.kill("router-0", signal.SIGSTOP)
    try:
        async with AsyncClient(cluster.processes["router-1"].address) as other:
            began = time.monotonic()
            resumed = other.resume_turn(session.id, seen[0].turn_id, after_sequence=len(seen))
            elsewhere, _ = await rest(resumed)
            print(f"router stopped: the turn was over at the other one after {time.monotonic() - began:.2f} s")
            await check_whole(other, session.id, seen + elsewhere, expected)
            events, pause_s = await rest(stream)  # its own router never says a word again
            assert events == elsewhere
            print(f"router stopped: its own client's stream paused for {pause_s:.2f} s")
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    async with AsyncClient(stopped.address) as awake:
        again = await until_answered(awake, session.id, seen[0].turn_id)
        assert again == seen + elsewhere, "what it says now is what became of the turn"
        await check_whole(awake, session.id, again, expected)


@pytest.mark.figures
async def test_client_and_router_gone(cluster: LocalCluster, client: AsyncClient, expected: str) -> None:
    session, stream, seen = await begin(client, num_events=5)
    await stream.aclose()
    await cluster.kill("router-0")
    killed_at = time.monotonic()
    async with AsyncClient(cluster.processes["router-1"].address) as other:
        while (await other.get_session(session.id)).head == 0:
            assert time.monotonic() - killed_at < 30, "nobody went on with the turn"
            await asyncio.sleep(0.1)
        events = [event async for event in other.resume_turn(session.id, seen[0].turn_id)]
        assert events[:5] == seen
        await check_whole(other, session.id, events, expected)


@pytest.mark.figures
async def test_decode_rank_stopped_under_a_stream(
    cluster: LocalCluster, client: AsyncClient, expected: str, the_busy_decode_rank: Callable[..., Awaitable[str]]
) -> None:
    session, stream, seen = await begin(client)
    name = await the_busy_decode_rank(cluster, client)
    stopped = cluster.processes[name]
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        events, pause_s = await rest(stream)
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    await check_whole(client, session.id, seen + events, expected)
    assert events[-1].finished.receipt.num_retries == 1
    assert not stopped.name.startswith(events[-1].finished.receipt.decode_rank)
    print(f"decode rank stopped: the stream paused for {pause_s:.2f} s")
    while not all(rank.alive for rank in await client.list_ranks()):  # noqa: ASYNC110 - it comes back by itself
        await asyncio.sleep(0.1)


@pytest.mark.figures
@pytest.mark.parametrize("number", range(3))
async def test_router_and_decode_rank_killed_together(
    cluster: LocalCluster,
    client: AsyncClient,
    expected: str,
    the_busy_decode_rank: Callable[..., Awaitable[str]],
    number: int,
) -> None:
    session, stream, seen = await begin(client, num_events=10 + 30 * number)
    name = await the_busy_decode_rank(cluster, client)
    await asyncio.gather(cluster.kill(name), cluster.kill("router-0"))
    events, pause_s = await rest(stream)
    await check_whole(client, session.id, seen + events, expected)
    print(f"router and decode rank killed: the stream paused for {pause_s:.2f} s")
    await cluster.start_gang("decode", name.split(".")[0])


async def test_a_turn_that_two_ranks_die_under_is_refused_for_good(
    cluster: LocalCluster, client: AsyncClient, the_busy_decode_rank: Callable[..., Awaitable[str]]
) -> None:
    """Killed from outside: what a rank dies of does not show."""
    session = await client.create_session()
    stream = client.run_turn(session.id, [user("go")], sampling=ENDLESS, idempotency_key="poison")
    killed: list[str] = []

    async def follow() -> None:
        async for event in stream:
            if event.sequence in (20, 60):
                await asyncio.sleep(len(killed) * (NODE_WINDOW_S + 0.5))  # deaths together would be the node's
                killed.append(await the_busy_decode_rank(cluster, client))
                await cluster.kill(killed[-1])

    with pytest.raises(Internal) as caught:
        await follow()
    assert caught.value.reason == "REQUEST_QUARANTINED"
    for name in killed:
        await cluster.start_gang("decode", name.split(".")[0])
    assert len(set(killed)) == 2
    assert (await client.get_session(session.id)).head == 0
    with pytest.raises(Internal):
        await client.run_turn(session.id, [user("go")], sampling=ENDLESS, idempotency_key="poison").result()
    turn = await client.run_turn(session.id, [user("hi")], sampling=Sampling(max_output_tokens=4)).result()
    assert turn.usage.num_output_tokens == 4, "the session is well"


async def test_a_turn_that_ends_with_its_client_frees_its_pages(client: AsyncClient) -> None:
    session = await client.create_session()
    stream = client.run_turn(session.id, [user("go")], sampling=ENDLESS, cancel_on_disconnect=True)
    for _ in range(5):
        await anext(stream)
    await stream.aclose()
    left_at = time.monotonic()
    while (await client.get_session(session.id)).state != session_pb2.SESSION_STATE_IDLE:
        assert time.monotonic() - left_at < 10, "the turn runs on without its client"
        await asyncio.sleep(0.05)
    assert (await client.get_session(session.id)).head == 0


@pytest.mark.figures
async def test_redis_restarted_under_a_stream(
    start_cluster: StartCluster, tmp_path: Path, expected: str, pages_are_back: PagesAreBack
) -> None:
    with RedisServer() as server:
        url = server.start(tmp_path / "redis")
        async with (
            start_cluster(OVERRIDES, redis_url=url) as cluster,
            AsyncClient(cluster.address) as client,
        ):
            session, stream, seen = await begin(client)
            following = asyncio.create_task(rest(stream))
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(1.0)
            assert await asyncio.to_thread(server.start, tmp_path / "redis") == url
            events, pause_s = await following
            await check_whole(client, session.id, seen + events, expected)
            await pages_are_back(client)
            print(f"Redis killed and restarted after 1 s: the stream paused for {pause_s:.2f} s")


async def until_answered(client: AsyncClient, session_id: str, turn_id: str) -> Events:
    for _ in range(50):
        try:
            return [event async for event in client.resume_turn(session_id, turn_id)]
        except SeamountError:
            await asyncio.sleep(0.2)
    raise AssertionError("the router did not wake")
