"""While a person reads an answer, idle ranks compute the session without its reasoning; the next question finds it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import pytest_asyncio

from seamount.cluster.local import LocalCluster
from seamount.router.client import AsyncClient, Sampling, user
from seamount.router.messages import ThinkingMode
from seamount.v1 import events_pb2

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
PagesAreBack = Callable[[AsyncClient], Awaitable[None]]
SEEDED = Sampling(max_output_tokens=150, temperature=0.8, seed=5)
QUESTIONS = ["a long question about the sea " * 5, "and the land?", "and the sky?"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster) -> AsyncIterator[LocalCluster]:
    settings = {
        "pools": {"decode": {"gangs": 1, "expert_parallel": 2}, "prefill": {"gangs": 0}},
        "placement": {"path": "local"},
        "router": {"cut_ahead": True},
    }
    async with start_cluster(settings) as running:
        yield running


async def num_prepared(client: AsyncClient) -> int:
    return sum(rank.state.num_prepared_tokens for rank in await client.list_ranks())


async def prepared(client: AsyncClient, *, beyond: int) -> int:
    """Tokens computed ahead, once they are more than ``beyond`` and grow no more."""
    before = -1
    while (count := await num_prepared(client)) == beyond or count != before:
        before = count
        await asyncio.sleep(0.4)
    return count


async def test_the_next_question_finds_what_was_computed_while_it_was_written(
    cluster: LocalCluster, pages_are_back: PagesAreBack
) -> None:
    async with AsyncClient(cluster.address) as client:
        session = await client.create_session(thinking_mode=ThinkingMode.THINKING)
        turns: list[Any] = []
        count = 0
        for text in QUESTIONS:
            turns.append(await client.run_turn(session.id, [user(text)], sampling=SEEDED).result())
            async with asyncio.timeout(20):
                count = await prepared(client, beyond=count)
        first, second, third = (turn.receipt for turn in turns)
        assert first.num_prepared_tokens == 0
        for receipt, before in ((second, first), (third, second)):
            assert receipt.num_prepared_tokens > 0
            assert receipt.num_cached_tokens > before.num_prompt_tokens - 20, "beyond the cut, up to the question"
            assert receipt.miss_cause == events_pb2.MISS_CAUSE_NONE
            num_question = receipt.num_prompt_tokens - receipt.num_cached_tokens
            assert receipt.num_decode_computed_tokens == num_question < 64
        totals = (await client.get_session(session.id)).totals
        assert totals.num_prepared_tokens == second.num_prepared_tokens + third.num_prepared_tokens
        await pages_are_back(client)

        # The same tokens as where nothing is computed ahead: there is no time for it.
        hurried = await client.create_session(thinking_mode=ThinkingMode.THINKING)
        for text, expected in zip(QUESTIONS, turns, strict=True):
            turn = await client.run_turn(hurried.id, [user(text)], sampling=SEEDED).result()
            assert turn.token_ids == expected.token_ids
