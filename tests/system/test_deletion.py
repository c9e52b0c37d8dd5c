"""A deleted session's caches go from every tier of every rank; those that its fork has stay, also over a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import pytest

from seamount.cluster.local import LocalCluster
from seamount.router.client import AsyncClient, Sampling, user
from seamount.router.messages import ThinkingMode
from seamount.v1 import common_pb2, worker_pb2
from seamount.wire.errors import NotFound

pytestmark = [pytest.mark.asyncio, pytest.mark.cluster]
StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
SHORT = Sampling(max_output_tokens=8, temperature=0.0)


async def until(
    client: AsyncClient,
    holds: Callable[[worker_pb2.RankState], bool],
    what: str,
    *,
    pool: worker_pb2.Pool = worker_pb2.POOL_DECODE,
) -> worker_pb2.RankState:
    """The state of the pool's one rank, once it is so."""
    state = worker_pb2.RankState()
    for _ in range(200):
        alive = [rank.state for rank in await client.list_ranks() if rank.alive and rank.state.pool == pool]
        if alive and holds(alive[0]):
            return alive[0]
        state = alive[0] if alive else state
        await asyncio.sleep(0.05)
    raise AssertionError(f"{what}: {state}")


async def told(client: AsyncClient, session_id: str, words: str) -> int:
    """A turn; returns how many full pages the session has now."""
    receipt = (await client.run_turn(session_id, [user(words)], sampling=SHORT).result()).receipt
    return (receipt.num_prompt_tokens + receipt.num_output_tokens - 1) // 64


def all_free(state: worker_pb2.RankState) -> bool:
    return state.num_free_pages == state.num_pages and not state.num_reservations


def records(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("index.dat"))


async def test_what_is_left_of_deleted_sessions(start_cluster: StartCluster, tmp_path: Path) -> None:
    overrides = {"cache": {"disk_cache_dir": str(tmp_path)}, "pools": {"decode": {"expert_parallel": 1}}}
    async with start_cluster(overrides) as cluster, AsyncClient(cluster.address) as client:
        await a_turn_that_runs_gives_its_pages_back(client)
        session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
        num_shared = await told(client, session.id, "word " * 60)
        fork = await client.fork_session(session.id)
        num_of_fork = await told(client, fork.id, "on " * 60)
        num_of_both = num_of_fork + await told(client, session.id, "apart " * 40) - num_shared
        assert num_shared < num_of_fork < num_of_both
        state = await until(client, lambda one: one.num_disk_cached_pages == num_of_both, "all on disk")
        assert (state.num_superseded_pages, state.num_disk_superseded_pages) == (0, 0)
        assert session.id.encode() in records(tmp_path)

        await client.delete_session("ses_" + "a" * 32)
        await client.delete_session(session.id)
        await client.delete_session(session.id)
        state = await until(client, lambda one: one.num_disk_cached_pages == num_of_fork, "the fork's alone on disk")
        assert state.num_pages - state.num_free_pages == num_of_fork + 1, "and its tail"
        assert await told(client, fork.id, "and more") >= num_of_fork
        assert list(await client.list_rank_sessions(state.rank_id)) == [fork.id]

        await cluster.kill("decode-0.0")
        await client.delete_session(fork.id)
        await cluster.start_gang("decode", "decode-0")
        state = await until(client, all_free, "nothing is adopted")
        assert state.num_disk_cached_pages == 0
        async with asyncio.timeout(5):
            while fork.id.encode() in records(tmp_path) or session.id.encode() in records(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def a_turn_that_runs_gives_its_pages_back(client: AsyncClient) -> None:
    """And what its prefill rank computed goes with it."""
    session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
    stream = client.run_turn(session.id, [user("word " * 60)], sampling=Sampling(max_output_tokens=2000, seed=1))
    await anext(stream)
    prefill = await until(client, lambda one: one.num_cached_pages > 0, "computed", pool=worker_pb2.POOL_PREFILL)
    assert prefill.num_superseded_pages == 0
    await client.delete_session(session.id)
    with suppress(NotFound):  # its next token was refused before it was told
        assert (await stream.result()).finish_reason == common_pb2.FINISH_REASON_CANCELLED
    for pool in (worker_pb2.POOL_DECODE, worker_pb2.POOL_PREFILL):
        await until(client, all_free, "all pages back", pool=pool)
