"""A prefill rank dies, or falls silent, at a frame of cache entries; frames arrive damaged: a later first token, and
nothing else."""

from __future__ import annotations

import asyncio
import time

import pytest

from harness.listener import Reached
from harness.points import points, sample
from harness.recording import RecordingClient
from harness.recoveries import Promise
from harness.requests import SEEDED
from harness.system import CHUNK_TOKENS, FaultSystem

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.cluster]

NUM_LAYERS = 3
NUM_CHUNKS = 5
EVERY = [(layer, CHUNK_TOKENS * chunk) for chunk in range(NUM_CHUNKS) for layer in range(NUM_LAYERS)]
IN_FLIGHT_S = 0.05
"""What frames before the one that is waited at get to arrive."""


@pytest.mark.faults
async def test_every_frame_is_known(system: FaultSystem) -> None:
    """The points below are all that there are."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        answer = await system.begin(client, asked)
        await answer.task
    frames = [r.at for r in system.listener.seen if r.point == "rank.frame" and system.pool_of(r.pid) == "prefill"]
    assert frames == [f"{layer}:{first}" for layer, first in EVERY]


@points("layer,first", EVERY, seeded=1)
async def test_killed_at_a_chunk(system: FaultSystem, layer: int, first: int) -> None:
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        trap = system.listener.stop_at("rank.frame", lambda reached: reached.at == f"{layer}:{first}")
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        await asyncio.sleep(IN_FLIGHT_S)
        before = await system.num_computed()
        assert (await system.kill(paused.pid)).startswith("prefill")
        killed_at = time.monotonic()
        await answer.task
        system.recoveries.note(Promise.PREFILL_KILLED, client.told.first_token_after(killed_at) - killed_at)
        receipt = client.told.events[-1].finished.receipt
        assert receipt.num_retries >= 1
        missing = receipt.num_prompt_tokens - first
        assert await system.num_computed_since(before) <= missing + CHUNK_TOKENS
        await system.check(answer, asked)


@points("layer,first", sample(EVERY, 6), seeded=0)
async def test_stopped_at_a_chunk_and_continued(system: FaultSystem, layer: int, first: int) -> None:
    """When it wakes it goes on to push, into a reservation that is over."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        trap = system.listener.stop_at("rank.frame", lambda reached: reached.at == f"{layer}:{first}")
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        async with system.stopped(paused.pid):
            stopped_at = time.monotonic()
            await answer.task
        paused.go_on()
        system.recoveries.note(Promise.PREFILL_HUNG, client.told.first_token_after(stopped_at) - stopped_at)
        await system.check(answer, asked)


@points("layer,first", EVERY, seeded=1)
async def test_damaged_on_the_way(system: FaultSystem, layer: int, first: int) -> None:
    """What did not verify, and what came behind it, is computed by the decode rank."""
    asked = await system.afresh(SEEDED)

    def is_that_frame(reached: Reached) -> bool:
        return reached.point == "rank.frame" and reached.at == f"{layer}:{first}"

    system.listener.damage(is_that_frame)
    async with RecordingClient(system.addresses()) as client:
        begun_at = time.monotonic()
        answer = await system.begin(client, asked)
        await answer.task
        assert any(map(is_that_frame, system.listener.seen))
        system.recoveries.note(Promise.PAGE_DAMAGED, client.told.first_token_after(begun_at) - begun_at)
        receipt = client.told.events[-1].finished.receipt
        assert receipt.num_pushed_tokens == first
        assert receipt.num_decode_computed_tokens <= receipt.num_prompt_tokens - first + CHUNK_TOKENS
        await system.check(answer, asked)
