"""Sessions that move between decode ranks: with their pages, token for token, from ranks that leave."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
import pytest_asyncio

from seamount.cluster.local import LocalCluster
from seamount.router.client import AsyncClient, Sampling, user
from seamount.router.messages import ThinkingMode
from seamount.v1 import events_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire.durations import duration
from seamount.wire.errors import FailedPrecondition, NotFound
from seamount.wire.hashes import PAGE_SIZE

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
PagesAreBack = Callable[[AsyncClient], Awaitable[None]]
TURNS = [[user("a long story about the sea " * 20)], [user("and then?")], [user("why? " * 10)]]
SEEDED = Sampling(max_output_tokens=12, temperature=0.8, seed=7)
KEYS = {name: f"{name}-key-0123456789abcdef00" for name in ("moving", "leaving", "staying", "root")}
"""Tenants share no pages: what one computes is no help to the other."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    keys = tmp_path_factory.mktemp("secrets") / "keys"
    lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in KEYS.items()]
    keys.write_text("\n".join(lines[:-1]) + f"\n{lines[-1]}:admin\n")
    settings = {
        "pools": {"decode": {"gangs": 3, "expert_parallel": 1}, "prefill": {"gangs": 0}},
        "placement": {"path": "local"},
        "router": {"api_key_file": str(keys)},
    }
    async with start_cluster(settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def root(cluster: LocalCluster, pages_are_back: PagesAreBack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, api_key=KEYS["root"]) as client:
        yield client
        await pages_are_back(client)


@pytest_asyncio.fixture(loop_scope="module")
async def moving(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, api_key=KEYS["moving"]) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def leaving(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, api_key=KEYS["leaving"]) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(cluster: LocalCluster) -> list[Any]:
    """The same conversation where nobody leaves."""
    async with AsyncClient(cluster.address, api_key=KEYS["staying"]) as client:
        session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
        return [await client.run_turn(session.id, turn, sampling=SEEDED).result() for turn in TURNS]


async def begun(client: AsyncClient) -> tuple[str, Any]:
    """A session after its first turn."""
    session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
    return session.id, await client.run_turn(session.id, TURNS[0], sampling=SEEDED).result()


async def address_of(root: AsyncClient, rank_id: str) -> str:
    (address,) = [rank.address for rank in await root.list_ranks() if rank.state.rank_id == rank_id]
    return address


async def occupy(stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> None:
    """Another router has the rank compute a long prompt."""
    reserved = await stub.Reserve(
        worker_pb2.ReserveRequest(
            session_id="another",
            turn_id="t",
            epoch=1,
            attempt=1,
            cache_salt=bytes(32),
            token_ids=[5 + i % 200 for i in range(4000)],
            time_to_live=duration(60.0),
        )
    )
    sampling = worker_pb2.ResolvedSampling(max_output_tokens=1, top_p=1.0, num_logprobs=-1)
    asked = worker_pb2.WorkerServiceGenerateRequest(reservation_id=reserved.reservation_id, epoch=1, sampling=sampling)
    try:
        async for _ in stub.Generate(asked):
            pass
    finally:
        await stub.Release(worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id, keep_len=0))


async def leave(root: AsyncClient, rank_id: str) -> None:
    """The rank takes no new sessions from now on, and hears of nobody who would take those it has."""
    async with grpc.aio.insecure_channel(await address_of(root, rank_id)) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        assert [moved async for moved in stub.Drain(worker_pb2.DrainRequest(), timeout=10)] == []
    await seen(root, lambda states: states[rank_id].draining)


async def seen(root: AsyncClient, holds: Callable[[dict[str, worker_pb2.RankState]], bool]) -> None:
    """Ranks' states reach the router ten times a second."""
    for _ in range(50):
        if holds({rank.state.rank_id: rank.state for rank in await root.list_ranks()}):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the ranks' states do not show it: {await root.list_ranks()}")


def assert_only_news_computed(receipt: events_pb2.Receipt, before: events_pb2.Receipt) -> None:
    had = before.num_prompt_tokens + before.num_output_tokens - 1  # the last sampled token was never fed back
    assert receipt.num_decode_computed_tokens <= PAGE_SIZE - 1 + receipt.num_prompt_tokens - had
    assert receipt.num_cached_tokens + receipt.num_migrated_tokens >= had // PAGE_SIZE * PAGE_SIZE


async def test_a_turn_leaves_a_busy_home_and_takes_its_pages_along(
    root: AsyncClient, leaving: AsyncClient, undisturbed: Sequence[Any]
) -> None:
    session_id, first = await begun(leaving)
    home = first.receipt.decode_rank
    async with grpc.aio.insecure_channel(await address_of(root, home)) as channel:
        other_work = asyncio.create_task(occupy(worker_pb2_grpc.WorkerServiceStub(channel)))
        await seen(root, lambda states: states[home].num_queued_prefill_tokens > 1500)
        second = await leaving.run_turn(session_id, TURNS[1], sampling=SEEDED).result()
        other_work.cancel()
        await asyncio.wait({other_work})
    assert second.receipt.decode_rank != home
    assert second.receipt.num_migrated_tokens > 0
    assert_only_news_computed(second.receipt, first.receipt)
    assert second.token_ids == undisturbed[1].token_ids


async def test_turns_fetch_their_pages_and_leaving_ranks_hand_them_over(
    cluster: LocalCluster, root: AsyncClient, moving: AsyncClient, undisturbed: Sequence[Any]
) -> None:
    session_id, first = await begun(moving)
    home = first.receipt.decode_rank
    await leave(root, home)

    second = await moving.run_turn(session_id, TURNS[1], sampling=SEEDED).result()
    receipt = second.receipt
    assert (receipt.decode_rank == home, receipt.num_cached_tokens) == (False, 0)
    assert receipt.num_migrated_tokens >= 5 * PAGE_SIZE
    assert_only_news_computed(receipt, first.receipt)
    assert receipt.miss_cause == events_pb2.MISS_CAUSE_MOVED
    await seen(root, lambda states: session_id not in states[home].session_ids)

    moved = await root.drain_rank(receipt.decode_rank, timeout_s=20)
    assert moved.is_empty
    assert moved.num_sessions >= 1
    await seen(root, lambda states: not states[receipt.decode_rank].session_ids)
    states = {rank.state.rank_id: rank.state for rank in await root.list_ranks()}
    assert states[receipt.decode_rank].num_free_pages == states[receipt.decode_rank].num_pages, "nothing stays behind"
    await cluster.kill(
        next(name for name in cluster.processes if name.startswith(receipt.decode_rank.rpartition("-")[0]))
    )

    third = await moving.run_turn(session_id, TURNS[2], sampling=SEEDED).result()
    assert third.receipt.decode_rank not in (home, receipt.decode_rank)
    assert third.receipt.num_migrated_tokens == 0, "it was there before the turn came"
    assert_only_news_computed(third.receipt, receipt)
    assert third.receipt.miss_cause == events_pb2.MISS_CAUSE_NONE
    for turn, expected in zip((first, second, third), undisturbed, strict=True):
        assert turn.token_ids == expected.token_ids
    totals = (await moving.get_session(session_id)).totals
    assert totals.num_migrated_tokens == receipt.num_migrated_tokens


async def test_the_last_rank_has_nobody_to_hand_its_sessions_to(root: AsyncClient) -> None:
    with pytest.raises(NotFound):
        await root.drain_rank("nobody", timeout_s=5)
    staying = [rank.state.rank_id for rank in await root.list_ranks() if not rank.state.draining and rank.alive]
    for rank_id in staying:
        with pytest.raises(FailedPrecondition):
            await root.drain_rank(rank_id, timeout_s=5)
