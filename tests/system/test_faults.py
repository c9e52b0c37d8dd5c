"""A dead prefill rank costs time, never the turn; a dead decode rank is replaced under the same stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import pytest_asyncio

from seamount.cluster.local import LocalCluster
from seamount.router.client import AsyncClient, Message, Role, Sampling, Tool, ToolCall, system, tool_result, user
from seamount.v1 import common_pb2, events_pb2

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
PagesAreBack = Callable[[AsyncClient], Awaitable[None]]
SHORT = Sampling(max_output_tokens=8, temperature=0.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster) -> AsyncIterator[LocalCluster]:
    # One rank a decode gang, so that a gang can be killed and started alone; small chunks, so that pushes last.
    overrides = {
        "pools": {"decode": {"gangs": 2, "expert_parallel": 1}},
        "engine": {"prefill_chunk_tokens": 32, "max_batch_tokens": 96},
        "directory": {"beat_s": 0.2, "dead_after_s": 1.0},
    }
    async with start_cluster(overrides) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster, pages_are_back: PagesAreBack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address) as opened:
        yield opened
        await pages_are_back(opened)


async def undisturbed(client: AsyncClient, text: str, sampling: Sampling) -> tuple[str, str]:
    """What the turn says when nobody is killed: the same session state, so the same tokens."""
    session = await client.create_session()
    turn = await client.run_turn(session.id, [user(text)], sampling=sampling).result()
    return turn.reasoning, turn.content


async def test_prefill_killed_between_turns(cluster: LocalCluster, client: AsyncClient) -> None:
    session = await client.create_session()
    first = await client.run_turn(session.id, [user("word " * 30)], sampling=SHORT).result()
    assert first.receipt.path == events_pb2.PREFILL_PATH_REMOTE
    await cluster.kill("prefill-0.0")
    second = await client.run_turn(session.id, [user("more " * 30)], sampling=SHORT).result()
    assert second.usage.num_output_tokens == 8
    assert second.receipt.path == events_pb2.PREFILL_PATH_LOCAL
    assert second.receipt.num_decode_computed_tokens > 100
    await cluster.start_gang("prefill", "prefill-0")
    await until_alive(client, "prefill")
    third = await client.run_turn(session.id, [user("again " * 30)], sampling=SHORT).result()
    assert third.receipt.path == events_pb2.PREFILL_PATH_REMOTE


@pytest.mark.figures
async def test_prefill_killed_during_a_push(cluster: LocalCluster, client: AsyncClient) -> None:
    text = "a long question " * 200
    prefill = cluster.processes["prefill-0.0"]
    before = await computed(client, "prefill")
    session = await client.create_session()
    turn = asyncio.create_task(client.run_turn(session.id, [user(text)], sampling=SHORT).result())
    while await computed(client, "prefill") < before + 128:
        assert not turn.done(), "the turn was over before the push was on its way"
        await asyncio.sleep(0.02)
    await cluster.kill("prefill-0.0")
    assert prefill.process.returncode is not None
    answered = await turn
    assert answered.usage.num_output_tokens == 8
    assert answered.receipt.num_retries >= 1
    computed_here = answered.receipt.num_decode_computed_tokens
    num_prompt = answered.receipt.num_prompt_tokens
    print(f"of {num_prompt} prompt tokens {num_prompt - computed_here} had arrived when the prefill rank was killed")
    assert computed_here > 1
    assert (await undisturbed(client, text, SHORT)) == (answered.reasoning, answered.content)
    await cluster.start_gang("prefill", "prefill-0")
    await until_alive(client, "prefill")


async def test_decode_killed_under_a_stream(
    cluster: LocalCluster, client: AsyncClient, the_busy_decode_rank: Callable[..., Awaitable[str]]
) -> None:
    # Long enough (seconds) that the kill surely falls into it; with this seed the model does not end it earlier.
    sampling = Sampling(max_output_tokens=400, temperature=0.8, seed=9)
    expected = await undisturbed(client, "tell me a story", sampling)
    session = await client.create_session()
    stream = client.run_turn(session.id, [user("tell me a story")], sampling=sampling)
    killed = ""
    async for event in stream:
        if not killed and event.WhichOneof("event") == "reasoning_delta" and event.sequence > 8:
            killed = await the_busy_decode_rank(cluster, client)
            await cluster.kill(killed)
    turn = await stream.result()
    assert killed
    assert (turn.reasoning, turn.content) == expected
    assert turn.receipt.num_retries == 1
    assert turn.usage.num_output_tokens == 400
    await cluster.start_gang("decode", killed.split(".")[0])


async def test_receipts_say_why_the_past_was_computed_again(cluster: LocalCluster, client: AsyncClient) -> None:
    session = await client.create_session()
    receipts = [(await client.run_turn(session.id, [user("word " * 30)], sampling=SHORT).result()).receipt]
    receipts.append((await client.run_turn(session.id, [user("again")], sampling=SHORT).result()).receipt)
    last = await process_of(cluster, client, receipts[-1].decode_rank)
    await cluster.kill(last)
    receipts.append((await client.run_turn(session.id, [user("and again")], sampling=SHORT).result()).receipt)
    assert [events_pb2.MissCause.Name(receipt.miss_cause) for receipt in receipts] == [
        "MISS_CAUSE_FIRST_TURN",
        "MISS_CAUSE_REASONING_CUT",
        "MISS_CAUSE_RANK_LOST",
    ]
    await cluster.start_gang("decode", last.split(".")[0])


async def test_a_rank_that_dies_takes_its_leases_with_it(cluster: LocalCluster, client: AsyncClient) -> None:
    session = await client.create_session()
    tool = Tool(function_json='{"name": "f", "parameters": {"type": "object"}}')
    call = ToolCall(id="c1", name="f", arguments_json="{}")
    first = await client.run_turn(session.id, [system("x", tools=[tool]), user("hello")], sampling=SHORT).result()
    await client.run_turn(session.id, [user("go"), Message(role=Role.ASSISTANT, tool_calls=(call,))]).result()
    lease = await client.report_tool_wait(session.id, 60.0)
    assert (lease.state, lease.decode_rank) == (events_pb2.LEASE_STATE_HELD, first.receipt.decode_rank)
    last = await process_of(cluster, client, lease.decode_rank)
    await cluster.kill(last)
    async with asyncio.timeout(10):
        while (await client.get_session(session.id)).lease.state != events_pb2.LEASE_STATE_RANK_LOST:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (await client.report_tool_wait(session.id, 60.0)).outcome == common_pb2.LEASE_OUTCOME_DENIED
    receipt = (await client.run_turn(session.id, [tool_result(call, "done")], sampling=SHORT).result()).receipt
    assert receipt.miss_cause == events_pb2.MISS_CAUSE_RANK_LOST
    assert receipt.lease.state == events_pb2.LEASE_STATE_RANK_LOST
    assert receipt.lease.outcome == common_pb2.LEASE_OUTCOME_ACCEPTED
    await cluster.start_gang("decode", last.split(".")[0])


async def process_of(cluster: LocalCluster, client: AsyncClient, rank_id: str) -> str:
    (pid,) = [r.state.process_id for r in await client.list_ranks() if r.state.rank_id == rank_id]
    return next(name for name, process in cluster.processes.items() if process.pid == pid)


async def until_alive(client: AsyncClient, pool: str) -> None:
    for _ in range(100):
        if any(rank.alive and rank.state.gang_id.startswith(pool) for rank in await client.list_ranks()):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"no {pool} rank came up")


async def computed(client: AsyncClient, pool: str) -> int:
    return sum(
        rank.state.num_computed_tokens
        for rank in await client.list_ranks()
        if rank.alive and rank.state.gang_id.startswith(pool)
    )
