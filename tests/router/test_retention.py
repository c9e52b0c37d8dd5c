"""Leases between turns: who may ask, what is stored and for how long, what the next receipt says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import duration_pb2

from seamount.router import retention as retention_module
from seamount.router import tool_waits
from seamount.router.retention import Retention
from seamount.router.tokenizer import Tokenizer
from seamount.router.turns import Turns
from seamount.v1 import common_pb2, events_pb2, session_pb2, worker_pb2
from seamount.wire.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from seamount.wire.ids import SessionId, TenantId
from seamount.wire.limits import MAX_TOOL_WAIT_S

ALICE, BOB = TenantId("alice"), TenantId("bob")


@pytest.fixture
def retention(turns: Turns) -> Retention:
    return turns.retention


def message(role: int, text: str, **more: Any) -> common_pb2.Message:
    return common_pb2.Message(role=role, content=text, **more)  # type: ignore[arg-type]


async def run(turns: Turns, session_id: str, key: str, *messages: common_pb2.Message) -> events_pb2.TurnFinished:
    request = session_pb2.RunTurnRequest(session_id=session_id, idempotency_key=key, messages=messages)
    stream = await turns.open(ALICE, request)
    async with asyncio.timeout(10):
        told = [event async for batch in stream.follow() for event in batch]
    assert told[-1].HasField("finished"), told[-1]
    return told[-1].finished


async def waiting(turns: Turns) -> SessionId:
    """A session that has been answered once and then waits for a tool."""
    request = session_pb2.CreateSessionRequest(defaults=common_pb2.SamplingParameters(max_output_tokens=5))
    session_id = SessionId((await turns.sessions.create(ALICE, request, model="m")).id)
    await run(turns, session_id, "1", message(common_pb2.ROLE_USER, "hi"))
    call = common_pb2.ToolCall(id="c", name="f", arguments_json="{}")
    asked = message(common_pb2.ROLE_USER, "go"), message(common_pb2.ROLE_ASSISTANT, "", tool_calls=[call])
    await run(turns, session_id, "2", *asked)
    return session_id


async def result(turns: Turns, session_id: SessionId) -> events_pb2.Receipt:
    return (await run(turns, session_id, "3", message(common_pb2.ROLE_TOOL, "done", tool_call_id="c"))).receipt


def wait(session_id: str, seconds: float = 30.0, importance: int = 0) -> session_pb2.ReportToolWaitRequest:
    expected = duration_pb2.Duration()
    expected.FromNanoseconds(int(seconds * 1e9))
    return session_pb2.ReportToolWaitRequest(session_id=session_id, expected=expected, importance=importance)  # type: ignore[arg-type]


async def lease_of(turns: Turns, retention: Retention, session_id: SessionId) -> events_pb2.Lease | None:
    return retention.lease_of(await turns.sessions.get(ALICE, session_id))


async def test_the_rank_of_the_last_turn_decides_and_its_answer_is_stored(
    turns: Turns, system: Any, retention: Retention
) -> None:
    rank = await system.add("decode-a")
    session_id = await waiting(turns)
    assert await lease_of(turns, retention, session_id) is None
    rank.lease.outcome = common_pb2.LEASE_OUTCOME_CLIPPED
    rank.lease.rebuild_time.FromMilliseconds(70)
    lease = await retention.report_tool_wait(ALICE, wait(session_id, 50.0, common_pb2.LEASE_IMPORTANCE_HIGH))
    (asked,) = rank.retained
    assert (asked.session_id, asked.duration.seconds) == (session_id, 50)
    assert asked.epoch == (await turns.sessions.get(ALICE, session_id)).epoch
    assert asked.importance == common_pb2.LEASE_IMPORTANCE_HIGH
    assert (lease.outcome, lease.tier) == (common_pb2.LEASE_OUTCOME_CLIPPED, common_pb2.CACHE_TIER_DEVICE)
    assert (lease.num_rebuild_tokens, lease.rebuild_time.ToMilliseconds(), lease.decode_rank) == (5, 70, "decode-a")
    assert await lease_of(turns, retention, session_id) == lease
    again = await retention.report_tool_wait(ALICE, wait(session_id, 50.0))
    assert again.expires_at.ToNanoseconds() > lease.expires_at.ToNanoseconds(), "from the last report on"

    async def held(request: Any) -> worker_pb2.ReserveResponse:
        return worker_pb2.ReserveResponse(reservation_id="r", cached_len=0, is_leased=True)

    rank.on_reserve = held
    receipt = await result(turns, session_id)
    assert receipt.lease == again
    assert receipt.lease.state == events_pb2.LEASE_STATE_HELD
    assert await lease_of(turns, retention, session_id) is None, "the commit ends it"


async def test_a_lease_that_ran_out_is_said_to_have(turns: Turns, system: Any, retention: Retention) -> None:
    rank = await system.add("decode-a")
    session_id = await waiting(turns)
    rank.lease.duration.FromMilliseconds(1)
    await retention.report_tool_wait(ALICE, wait(session_id))
    await asyncio.sleep(0.01)
    lease = await lease_of(turns, retention, session_id)
    assert lease is not None
    assert lease.state == events_pb2.LEASE_STATE_EXPIRED
    assert (await result(turns, session_id)).lease.state == events_pb2.LEASE_STATE_EXPIRED


async def test_a_rank_that_restarts_under_its_id_holds_no_lease(
    turns: Turns, system: Any, retention: Retention
) -> None:
    rank = await system.add("decode-a")
    session_id = await waiting(turns)
    await retention.report_tool_wait(ALICE, wait(session_id))
    await rank.stop()
    await system.until(lambda: system.ranks.instance("decode-a") is None)
    lease = await lease_of(turns, retention, session_id)
    assert lease is not None
    assert lease.state == events_pb2.LEASE_STATE_RANK_LOST
    denied = await retention.report_tool_wait(ALICE, wait(session_id))
    assert (denied.outcome, denied.tier) == (common_pb2.LEASE_OUTCOME_DENIED, common_pb2.CACHE_TIER_UNSPECIFIED)
    assert not denied.HasField("expires_at")
    await system.add("decode-a")
    receipt = await result(turns, session_id)
    assert receipt.lease.state == events_pb2.LEASE_STATE_RANK_LOST
    assert receipt.miss_cause == events_pb2.MISS_CAUSE_RANK_LOST


async def test_a_denial_is_told_too(turns: Turns, system: Any, retention: Retention) -> None:
    rank = await system.add("decode-a")
    session_id = await waiting(turns)
    rank.lease = worker_pb2.RetainResponse(outcome=common_pb2.LEASE_OUTCOME_DENIED, num_rebuild_tokens=5)
    lease = await retention.report_tool_wait(ALICE, wait(session_id))
    assert lease.outcome == common_pb2.LEASE_OUTCOME_DENIED
    assert not lease.HasField("expires_at")
    receipt = await result(turns, session_id)
    assert receipt.lease == lease
    assert receipt.lease.state == events_pb2.LEASE_STATE_UNSPECIFIED


async def test_only_a_session_of_ones_own_that_waits_for_tools(turns: Turns, system: Any, retention: Retention) -> None:
    await system.add("decode-a")
    session_id = await waiting(turns)
    for tenant, name in ((BOB, session_id), (ALICE, "ses_" + "a" * 32)):
        with pytest.raises(NotFound):
            await retention.report_tool_wait(tenant, wait(name))
    await result(turns, session_id)
    with pytest.raises(FailedPrecondition) as refused:
        await retention.report_tool_wait(ALICE, wait(session_id))
    assert refused.value.reason == "NO_PENDING_TOOL_CALLS"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (session_pb2.ReportToolWaitRequest(session_id="s"), "expected"),
        (wait("s", -1.0), "expected"),
        (wait("s", MAX_TOOL_WAIT_S + 0.001), "expected"),
        (session_pb2.ReportToolWaitRequest(expected=duration_pb2.Duration(seconds=1 << 62)), "expected"),
        (wait("s", 5.0, 9), "importance"),
    ],
)
async def test_bad_fields_are_named(retention: Retention, request_: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await retention.report_tool_wait(ALICE, request_)
    assert refused.value.field == field


async def test_an_answer_that_comes_after_the_next_turn_is_not_stored(
    turns: Turns, system: Any, retention: Retention
) -> None:
    await system.add("decode-a")
    session_id = await waiting(turns)
    before = await turns.sessions.get(ALICE, session_id)
    await result(turns, session_id)
    with pytest.raises(Aborted) as refused:
        await retention.ask(ALICE, before, duration_s=5.0, importance=common_pb2.LEASE_IMPORTANCE_NORMAL)
    assert refused.value.reason == "HEAD_MOVED"
    assert await lease_of(turns, retention, session_id) is None


CALL_TEXT = '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'


@pytest.fixture
def calling_ids(official_tokenizer: Any, tokenizer: Tokenizer) -> list[int]:
    """What a model says that calls ``f`` and waits."""
    return [*official_tokenizer.encode(CALL_TEXT, add_special_tokens=False).ids, tokenizer.eos_token_id]


async def calls_a_tool(turns: Turns, system: Any, rank: Any, calling_ids: list[int]) -> SessionId:
    """A session whose model has called ``f``."""

    async def call(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        for index, token_id in enumerate(calling_ids):
            yield system.token_frame(token_id, index)
        yield system.finished_frame(common_pb2.FINISH_REASON_STOP)

    rank.on_generate = call
    request = session_pb2.CreateSessionRequest(
        thinking_mode=common_pb2.THINKING_MODE_CHAT, defaults=common_pb2.SamplingParameters(max_output_tokens=500)
    )
    session_id = SessionId((await turns.sessions.create(ALICE, request, model="m")).id)
    finished = await run(turns, session_id, "1", message(common_pb2.ROLE_USER, "hi"))
    assert finished.reason == common_pb2.FINISH_REASON_TOOL_CALLS
    rank.on_generate = None
    return session_id


async def answered(turns: Turns, session_id: SessionId) -> events_pb2.Receipt:
    (call,) = (await turns.sessions.get(ALICE, session_id)).session.pending_tool_calls
    done = message(common_pb2.ROLE_TOOL, "done", tool_call_id=call.id)
    sampling = common_pb2.SamplingParameters(max_output_tokens=2)
    request = session_pb2.RunTurnRequest(session_id=session_id, idempotency_key="2", messages=[done], sampling=sampling)
    stream = await turns.open(ALICE, request)
    async with asyncio.timeout(10):
        told = [event async for batch in stream.follow() for event in batch]
    return told[-1].finished.receipt


async def test_a_turn_that_calls_tools_leases_its_caches_for_as_long_as_these_took(
    turns: Turns, system: Any, retention: Retention, calling_ids: list[int]
) -> None:
    rank = await system.add("decode-a")
    for _ in range(tool_waits.MIN_WAITS):
        session_id = await calls_a_tool(turns, system, rank, calling_ids)
        lease = await lease_of(turns, retention, session_id)
        assert lease is not None, "stored with the commit"
        assert lease.state == events_pb2.LEASE_STATE_HELD
        receipt = await answered(turns, session_id)
        assert receipt.lease.decode_rank == "decode-a"
        await retention.close()
    await calls_a_tool(turns, system, rank, calling_ids)
    asked = [request.duration.ToMilliseconds() / 1000 for request in rank.retained]
    assert asked[:-1] == [tool_waits.DEFAULT_WAIT_S] * tool_waits.MIN_WAITS
    assert asked[-1] < tool_waits.DEFAULT_WAIT_S, "the results came within a moment"
    assert {request.importance for request in rank.retained} == {common_pb2.LEASE_IMPORTANCE_LOW}


async def test_a_rank_that_does_not_answer_costs_the_lease_and_not_the_turn(
    turns: Turns, system: Any, retention: Retention, calling_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "AUTOMATIC_BUDGET_S", 0.05)
    rank = await system.add("decode-a")

    async def never(request: Any) -> None:
        await asyncio.sleep(5)

    rank.on_retain = never
    session_id = await calls_a_tool(turns, system, rank, calling_ids)
    assert await lease_of(turns, retention, session_id) is None
    assert not (await answered(turns, session_id)).HasField("lease")


async def test_an_answer_without_calls_asks_for_no_lease(turns: Turns, system: Any, retention: Retention) -> None:
    rank = await system.add("decode-a")
    session_id = await waiting(turns)  # the call came from the client, who computed it elsewhere
    assert not rank.retained
    await result(turns, session_id)
    await retention.close()
    assert await turns.retention.waits.expected_s(ALICE, ["f"]) == tool_waits.DEFAULT_WAIT_S
    assert not rank.retained
