"""A decode rank is killed; the one that starts in its place has the session's pages from its disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from seamount.router.client import AsyncClient, Sampling, ThinkingMode, user
from seamount.v1 import events_pb2

from .conftest import StartCluster

pytestmark = pytest.mark.cluster
SHORT = Sampling(temperature=0.0, max_output_tokens=12)


async def pages_on_disk(client: AsyncClient, num_pages: int) -> None:
    """Wait until a rank has so many there."""
    for _ in range(200):
        if any(rank.state.num_disk_cached_pages >= num_pages for rank in await client.list_ranks()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the pages do not reach the disk")


async def test_a_rank_killed_and_started_again_restores_from_its_disk(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    overrides = {
        "cache": {"disk_cache_dir": str(tmp_path)},
        "pools": {"prefill": {"gangs": 0}, "decode": {"expert_parallel": 1}},
        "placement": {"path": "auto"},
    }
    async with start_cluster(overrides) as cluster, AsyncClient(cluster.address) as client:
        session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
        first = (await client.run_turn(session.id, [user("word " * 100)], sampling=SHORT).result()).receipt
        known = first.num_prompt_tokens + first.num_output_tokens - 1
        assert known > 300
        await pages_on_disk(client, known // 64)
        await cluster.kill("decode-0.0")
        await cluster.start_gang("decode", "decode-0")
        second = (await client.run_turn(session.id, [user("and more")], sampling=SHORT).result()).receipt
        assert second.num_disk_tokens == second.num_cached_tokens == known // 64 * 64
        assert second.num_decode_computed_tokens <= second.num_prompt_tokens - known + 63
        assert second.miss_cause == events_pb2.MISS_CAUSE_RANK_LOST
        totals = (await client.get_session(session.id)).totals
        assert totals.num_disk_tokens == second.num_disk_tokens
        (rank,) = [one for one in await client.list_ranks() if one.alive]
        assert list(await client.list_rank_sessions(rank.state.rank_id)) == [session.id]
