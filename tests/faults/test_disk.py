"""A rank that is killed and started again finds its caches on disk; what is damaged there is computed anew."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from harness.points import points
from harness.recording import Event, RecordingClient, said
from seamount.cluster.forking import Parent
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import validate
from seamount.router.client import Sampling, user
from seamount.router.messages import ThinkingMode
from seamount.wire.hashes import PAGE_SIZE

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.cluster]

SAMPLING = Sampling(max_output_tokens=24, temperature=0.8, seed=9)
FIRST = "Say what you know of the planets, and of the moons that they have. " * 8
SECOND = "And which of them can be seen without a telescope?"


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(fault_checkpoint: Path, tmp_path: Path, parent: Parent) -> AsyncIterator[LocalCluster]:
    """One decode rank with a disk below it."""
    settings = validate(
        {
            "run_dir": str(tmp_path),
            "model": {"path": str(fault_checkpoint), "name": "test-model"},
            "cache": {"layout": "exact", "dtype": "float64", "num_pages": 64, "disk_cache_dir": str(tmp_path / "disk")},
            "engine": {"max_context_tokens": 4096},
            "pools": {"prefill": {"gangs": 0}, "decode": {"gangs": 1, "expert_parallel": 1}},
            "router": {"port": 0},
            "placement": {"path": "local"},
            "redis": {"data_dir": str(tmp_path / "redis")},
        }
    )
    async with LocalCluster(settings=settings, parent=parent) as running:
        yield running


async def conversation(
    cluster: LocalCluster, between: Callable[[], None] | None = None
) -> tuple[list[Event], list[Event]]:
    """Two turns; ``between``: what is done to the disk while the rank is dead, None = the rank lives on."""
    async with RecordingClient(cluster.address) as client:
        session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
        await client.run_turn(session.id, [user(FIRST)], sampling=SAMPLING).result()
        first = client.told.events
        if between is not None:
            await on_disk(client, first)
            await cluster.kill("decode-0.0")
            between()
            await cluster.start_gang("decode", "decode-0")
        client.told.calls.clear()
        await client.run_turn(session.id, [user(SECOND)], sampling=SAMPLING).result()
        return first, client.told.events


async def on_disk(client: RecordingClient, first: list[Event]) -> None:
    """Full pages are copied down in the background."""
    receipt = first[-1].finished.receipt
    wanted = (receipt.num_prompt_tokens + receipt.num_output_tokens - 1) // PAGE_SIZE
    async with asyncio.timeout(20):
        while (await client.list_ranks())[0].state.num_disk_cached_pages < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def num_new(first: list[Event], second: list[Event]) -> int:
    """Tokens of the second prompt that nobody had computed."""
    before, after = first[-1].finished.receipt, second[-1].finished.receipt
    return after.num_prompt_tokens - before.num_prompt_tokens - (before.num_output_tokens - 1)


async def test_a_restarted_rank_restores_what_it_had(cluster: LocalCluster) -> None:
    expected = await conversation(cluster)
    first, second = await conversation(cluster, lambda: None)
    assert [said(first), said(second)] == list(map(said, expected))
    receipt = second[-1].finished.receipt
    assert receipt.num_disk_tokens > 0
    assert receipt.num_decode_computed_tokens <= PAGE_SIZE - 1 + num_new(first, second)


DAMAGES = ("a byte of a page", "bytes of many pages", "the pages are cut short", "a byte of the index")


@points("damage", DAMAGES, seeded=0)
async def test_what_is_damaged_on_disk_is_computed(cluster: LocalCluster, tmp_path: Path, damage: str) -> None:
    expected = await conversation(cluster)
    rng = random.Random(damage)

    def harm() -> None:
        (pages,), (index,) = ([*(tmp_path / "disk").rglob(name)] for name in ("pages.dat", "index.dat"))
        match damage:
            case "a byte of a page":
                flip(pages, rng, 1)
            case "bytes of many pages":
                flip(pages, rng, 400)
            case "the pages are cut short":
                with pages.open("r+b") as file:
                    file.truncate(pages.stat().st_size // 3)
            case "a byte of the index":
                flip(index, rng, 1)

    first, second = await conversation(cluster, harm)
    assert [said(first), said(second)] == list(map(said, expected))
    print(f"{damage}: {second[-1].finished.receipt.num_disk_tokens} tokens came from disk")


def flip(path: Path, rng: random.Random, number: int) -> None:
    """One bit each of so many bytes."""
    content = bytearray(path.read_bytes())
    for at in rng.sample(range(len(content)), number):
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
