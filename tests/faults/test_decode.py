"""A decode rank dies, or falls silent, at a token: the same stream goes on at another one."""

from __future__ import annotations

import time

import pytest

from harness.points import points, sample
from harness.recording import RecordingClient
from harness.recoveries import Promise
from harness.requests import NAMES, NUM_TOKENS, SEEDED, request
from harness.system import CHUNK_TOKENS, FaultSystem
from seamount.router.tokenizer import Tokenizer
from seamount.wire.errors import Internal

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.cluster]

EVERY = [(name, index) for name in NAMES for index in range(NUM_TOKENS)]


@points("name,index", EVERY, seeded=3, ids=[f"{name} {index}" for name, index in EVERY])
async def test_killed_at_a_token(system: FaultSystem, tokenizer: Tokenizer, name: str, index: int) -> None:
    asked = request(name, tokenizer)
    num_tokens = len(asked.forced) or NUM_TOKENS
    index = index * num_tokens // NUM_TOKENS  # a tool call is longer than the others
    await system.reference(asked)
    async with RecordingClient(system.addresses(), forced=asked.forced) as client:
        trap = system.listener.stop_at("rank.token", lambda reached: reached.at == str(index))
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        before = await system.num_computed()
        killed = await system.kill(paused.pid)
        killed_at = time.monotonic()
        await answer.task
        assert killed.startswith("decode")
        system.recoveries.note(Promise.DECODE_KILLED, client.told.silence_s(killed_at))
        receipt = client.told.events[-1].finished.receipt
        assert receipt.num_retries == 1
        missing = receipt.num_prompt_tokens + index
        assert await system.num_computed_since(before) <= missing + CHUNK_TOKENS
        await system.check(answer, asked)


@pytest.mark.faults
async def test_killed_between_its_last_token_and_its_account(system: FaultSystem) -> None:
    async with RecordingClient(system.addresses()) as client:
        trap = system.listener.stop_at("rank.finished")
        answer = await system.begin(client, SEEDED)
        paused = await trap.wait()
        await system.kill(paused.pid)
        await answer.task
        await system.check(answer, SEEDED)


@points("index", sample(range(NUM_TOKENS), 6), seeded=1)
async def test_stopped_at_a_token_and_continued(system: FaultSystem, index: int) -> None:
    """What it computes when it wakes is nobody's: the turn is over, told and stored by then."""
    await system.reference(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        trap = system.listener.stop_at("rank.token", lambda reached: reached.at == str(index))
        answer = await system.begin(client, SEEDED)
        paused = await trap.wait()
        async with system.stopped(paused.pid):
            stopped_at = time.monotonic()
            await answer.task
        paused.go_on()
        system.recoveries.note(Promise.DECODE_HUNG, client.told.silence_s(stopped_at))
        assert client.told.events[-1].finished.receipt.num_retries == 1
        await system.check(answer, SEEDED)


@pytest.mark.faults
async def test_a_turn_that_two_engines_hang_in_is_refused_for_good(system: FaultSystem) -> None:
    """Their processes live and say that no step ends: whatever it is, it is in the batch."""
    async with RecordingClient(system.addresses()) as client:
        first, second = (system.listener.stop_at("rank.token", lambda reached: reached.at == "3") for _ in range(2))
        answer = await system.begin(client, SEEDED)
        hung = [await first.wait(), await second.wait()]
        with pytest.raises(Internal) as caught:
            await answer.task
        assert caught.value.reason == "REQUEST_QUARANTINED"
        for paused in hung:
            paused.go_on()
        assert len({paused.pid for paused in hung}) == 2
        assert (await client.get_session(answer.session.id)).head == 0
