"""One answer over ranks that die, hang, forget and refuse: real gRPC servers whose answers the test dictates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from harness.generations import EOS, answer, make_generation
from seamount.router import generation as generation_module
from seamount.router import quarantine
from seamount.router.directory import Role
from seamount.router.generation import Generation
from seamount.router.placement import PathPolicy, PathRules
from seamount.v1 import common_pb2, worker_pb2
from seamount.wire.errors import DeadlineExceeded, Internal, NotFound, Unavailable

PROMPT = list(range(100, 110))
Make = Callable[..., Generation]


@pytest.fixture
def make(system: Any) -> Make:
    def make(*, policy: PathPolicy = "local", deadline_s: float = 10.0, max_output_tokens: int = 5) -> Generation:
        return make_generation(
            system.ranks,
            PROMPT,
            rules=PathRules(policy=policy),
            deadline_s=deadline_s,
            max_output_tokens=max_output_tokens,
        )

    return make


def gone() -> NotFound:
    return NotFound("the reservation has ended", reason="RESERVATION_NOT_FOUND")


async def test_a_reservation_that_ended_is_made_anew_and_the_rank_is_not_blamed(system: Any, make: Make) -> None:
    rank = await system.add("decode-a")
    await system.add("decode-b")

    async def once(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        if len(rank.generated) == 1:
            yield system.token_frame(40, 0)
            raise gone()
        async for frame in rank.tokens(request):
            yield frame

    rank.on_generate = once
    generation = make()
    assert await answer(generation) == [40, 41, 42, 43, 44]
    assert [request.attempt for request in rank.reserved] == [1, 2]
    assert list(rank.reserved[1].token_ids) == [*PROMPT, 40], "what was sampled goes on"
    assert rank.generated[1].sampling.first_output_index == 1
    assert system.ranks.load("decode-a") is not None, "a rank that forgot one reservation is alive"
    assert generation.account.num_retries == 1
    assert [release.reservation_id for release in rank.released] == ["decode-a/1", "decode-a/2"]


async def test_a_request_that_the_rank_ended_is_no_answer(system: Any, make: Make) -> None:
    rank = await system.add("decode-a")

    async def superseded_once(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        if len(rank.generated) == 1:
            yield system.finished_frame(common_pb2.FINISH_REASON_CANCELLED)
            return
        async for frame in rank.tokens(request):
            yield frame

    rank.on_generate = superseded_once
    assert await answer(make()) == [40, 41, 42, 43, 44]
    assert len(rank.reserved) == 2


async def test_after_a_failed_prefill_the_reservation_in_force_is_used(system: Any, make: Make) -> None:
    """The one that the prefill was for has ended meanwhile: Reserve made another, under another id."""
    rank, prefill = await system.add("decode-a"), await system.add("prefill-a", Role.PREFILL)

    async def renamed(request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResponse:
        return worker_pb2.ReserveResponse(reservation_id=f"r{len(rank.reserved)}", cached_len=2 * len(rank.reserved))

    async def fails(request: worker_pb2.PrefillRequest) -> AsyncIterator[Any]:
        yield worker_pb2.PrefillResponse()
        raise gone()

    rank.on_reserve, prefill.on_prefill = renamed, fails
    assert len(await answer(make(policy="remote"))) == 5
    assert [request.attempt for request in rank.reserved] == [1, 1]
    assert [request.reservation_id for request in rank.generated] == ["r2"]
    assert [request.reservation_id for request in rank.released] == ["r2"]


async def test_prefill_ranks_are_tried_max_attempts_times(system: Any, make: Make) -> None:
    await system.add("decode-a")
    prefills = [await system.add(f"prefill-{number}", Role.PREFILL) for number in range(5)]

    async def fails(request: worker_pb2.PrefillRequest) -> AsyncIterator[Any]:
        yield worker_pb2.PrefillResponse()
        raise Unavailable("no", reason="LINK_LOST")

    for prefill in prefills:
        prefill.on_prefill = fails
    generation = make(policy="remote")
    assert len(await answer(generation)) == 5
    assert sum(len(prefill.prefilled) for prefill in prefills) == 3
    assert generation.account.num_retries == 3, "and none of them counts as a lost decode rank"


async def test_a_prefill_that_gets_nowhere_is_given_up(
    system: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames say that the rank is alive; its counters stand still."""
    monkeypatch.setattr(generation_module, "PREFILL_STALL_S", 0.4)
    rank, prefill = await system.add("decode-a"), await system.add("prefill-a", Role.PREFILL)

    async def alive(request: worker_pb2.PrefillRequest) -> AsyncIterator[Any]:
        while True:
            yield worker_pb2.PrefillResponse(progress=worker_pb2.PrefillProgress(num_computed_tokens=3))
            await asyncio.sleep(0.05)

    prefill.on_prefill = alive
    generation = make(policy="remote")
    async with asyncio.timeout(3):
        assert len(await answer(generation)) == 5
    assert generation.account.receipt(num_prompt=10, num_output=5).prefill_rank == ""
    assert len(rank.generated) == 1


async def test_a_cancelled_reserve_is_released_all_the_same(system: Any, make: Make) -> None:
    rank = await system.add("decode-a")
    asked = asyncio.Event()

    async def slow(request: worker_pb2.ReserveRequest) -> None:
        asked.set()
        await asyncio.sleep(0.3)

    rank.on_reserve = slow
    task = asyncio.create_task(answer(make()))
    async with asyncio.timeout(5):
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [release.reservation_id for release in rank.released] == ["decode-a/1"]
    assert not system.ranks._num_assigned


@pytest.mark.parametrize("last", ["eos", "cut"])
async def test_the_receipt_of_an_answer_that_ends_early(system: Any, make: Make, last: str) -> None:
    """By its EOS, whose account follows; by the router (a stop string), which then knows the cost itself."""
    rank = await system.add("decode-a")
    rank.cached_len = 4

    async def tokens(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        yield system.token_frame(40, 0)
        await asyncio.sleep(0.1)
        yield system.token_frame(EOS if last == "eos" else 41, 1)
        if last == "eos":
            yield system.finished_frame(common_pb2.FINISH_REASON_STOP, num_computed=17)
        await asyncio.sleep(30)

    rank.on_generate = tokens
    generation = make()
    async with aclosing(generation.batches()) as batches:
        async for _ in batches:
            if len(generation.token_ids) == 2:
                break
    await generation.release(12)
    receipt = generation.account.receipt(num_prompt=10, num_output=2)
    assert receipt.num_cached_tokens == 4
    decode_s = receipt.decode_time.ToTimedelta().total_seconds()
    if last == "eos":
        assert receipt.num_decode_computed_tokens == 17, "the rank's own figure"
        assert decode_s == pytest.approx(0.07)
    else:
        assert receipt.num_decode_computed_tokens == len(PROMPT) - 4
        assert 0.09 < decode_s < 1.0
    assert rank.released[0].keep_len == 12


async def test_the_cached_length_is_that_of_the_first_reservation_that_was_made(system: Any, make: Make) -> None:
    broken, rank = await system.add("decode-a"), await system.add("decode-b")
    rank.cached_len = 6

    async def refuses(request: worker_pb2.ReserveRequest) -> None:
        raise Unavailable("stopping", reason="ENGINE_STOPPED")

    broken.on_reserve = refuses
    generation = make()
    await answer(generation)
    assert generation.account.receipt(num_prompt=10, num_output=5).num_cached_tokens == 6


async def test_a_defect_of_well_ranks_keeps_its_type_and_blames_none(system: Any, make: Make) -> None:
    ranks = [await system.add(f"decode-{number}") for number in range(3)]

    async def defect(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        raise Internal("the logits are not finite", reason="LOGITS_NOT_FINITE")
        yield

    for rank in ranks:
        rank.on_generate = defect
    with pytest.raises(Internal) as caught:
        await answer(make())
    assert caught.value.reason == "LOGITS_NOT_FINITE"
    assert [len(rank.generated) for rank in ranks] == [1, 1, 1]
    assert [len(rank.released) for rank in ranks] == [1, 1, 1], "a rank that is alive gets its pages back"
    assert all(system.ranks.load(rank.rank_id) for rank in ranks)


async def test_the_deadline_ends_everything_and_is_nobodys_fault(system: Any, make: Make) -> None:
    rank = await system.add("decode-a")

    async def endless(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        while True:
            yield worker_pb2.WorkerServiceGenerateResponse(progress=worker_pb2.GenerateProgress())
            await asyncio.sleep(0.05)

    rank.on_generate = endless
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await answer(make(deadline_s=0.6))
    assert time.monotonic() - started < 2
    assert caught.value.reason == "TURN_DEADLINE"
    assert system.ranks.load("decode-a") is not None
    await asyncio.sleep(0.1)
    assert rank.num_cancelled == 1, "the rank knows the deadline"


async def test_no_rank_before_the_deadline(system: Any, make: Make) -> None:
    started = time.monotonic()
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await answer(make(deadline_s=0.5))
    assert time.monotonic() - started < 2


async def test_a_rank_that_leaves_lets_its_stream_end(system: Any, make: Make) -> None:
    rank = await system.add("decode-a")

    async def slow(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        for index in range(5):
            yield system.token_frame(40 + index, index)
            await asyncio.sleep(0.2)
        yield system.finished_frame()

    rank.on_generate = slow
    generation = make()
    task = asyncio.create_task(answer(generation))
    await system.until(lambda: rank.generated)
    await rank.registration.stop()  # what a draining rank does first
    assert await task == [40, 41, 42, 43, 44]
    assert generation.account.num_retries == 0
    await system.until(lambda: not system.ranks._closing)


async def test_a_silent_state_stream_is_a_dead_rank(system: Any) -> None:
    rank = await system.add("decode-a")
    rank.is_silent = True
    await system.until(lambda: system.ranks.load("decode-a") is None)
    rank.is_silent = False
    await system.until(lambda: system.ranks.load("decode-a") is not None)


@pytest.mark.parametrize("in_batch", [True, False])
async def test_a_turn_that_ranks_die_of_is_refused_for_good(
    system: Any, make: Make, monkeypatch: pytest.MonkeyPatch, in_batch: bool
) -> None:
    monkeypatch.setattr(generation_module, "NODE_WINDOW_S", 0.05)
    monkeypatch.setattr(quarantine, "NODE_WINDOW_S", 0.0)  # all ranks are on this one node
    ranks = [await system.add(f"decode-{number}") for number in range(3)]
    asked: list[worker_pb2.WorkerServiceGenerateRequest] = []

    def poisoned(rank: Any) -> Callable[..., AsyncIterator[Any]]:
        async def generate(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
            asked.append(request)
            if len(asked) <= 2:
                rank.die()
                yield worker_pb2.WorkerServiceGenerateResponse(progress=worker_pb2.GenerateProgress(in_batch=in_batch))
                await asyncio.sleep(30)
            async for frame in rank.tokens(request):
                yield frame

        return generate

    for rank in ranks:
        rank.on_generate = poisoned(rank)
    if in_batch:
        with pytest.raises(Internal) as caught:
            await answer(make())
        assert caught.value.reason == "REQUEST_QUARANTINED"
        assert [request.alone for request in asked] == [False, True]
    else:
        assert await answer(make()) == [40, 41, 42, 43, 44]
        assert not any(request.alone for request in asked), "who waited there has nothing to do with it"
