"""After an answer its rank is told what the next prompt will begin with: exactly that, and only where it pays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from seamount.router.cut_ahead import will_be_cut
from seamount.router.tokenizer import Control, Tokenizer
from seamount.router.turns import Turns
from seamount.v1 import common_pb2, record_pb2, session_pb2, worker_pb2
from seamount.wire.ids import SessionId, TenantId

ALICE = TenantId("alice")
USER, TOOL, SYSTEM = common_pb2.ROLE_USER, common_pb2.ROLE_TOOL, common_pb2.ROLE_SYSTEM


def record(*roles: common_pb2.Role, reasoning: int = 0, calls: int = 0) -> record_pb2.TurnRecord:
    made = record_pb2.TurnRecord(output=record_pb2.SampledMessage(num_reasoning_tokens=reasoning))
    for role in roles:
        made.input.add(role=role)
    for _ in range(calls):
        made.pending_tool_calls.add(id="c")
    return made


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], False),
        ([record(USER, reasoning=5)], True),
        ([record(USER)], False),
        ([record(USER, reasoning=5, calls=1)], False),
        ([record(USER, reasoning=5, calls=1), record(TOOL)], True),
        ([record(SYSTEM, USER, calls=1), record(TOOL)], False),
        # What an earlier question cut is gone from the last prompt already.
        ([record(USER, reasoning=5), record(USER)], False),
        ([record(USER, reasoning=5), record(USER, reasoning=1)], True),
    ],
)
def test_whether_the_next_question_cuts_anything(records: list[record_pb2.TurnRecord], expected: bool) -> None:
    assert will_be_cut(records) is expected


async def session(turns: Turns, mode: common_pb2.ThinkingMode = common_pb2.THINKING_MODE_THINKING) -> SessionId:
    asked = session_pb2.CreateSessionRequest(
        thinking_mode=mode, defaults=common_pb2.SamplingParameters(max_output_tokens=12)
    )
    made = await turns.sessions.create(ALICE, asked, model="m")
    turns.admission.remember(ALICE, made)
    return SessionId(made.id)


async def ask(turns: Turns, session_id: SessionId, text: str) -> None:
    asked = session_pb2.RunTurnRequest(session_id=session_id, idempotency_key=text)
    asked.messages.add(role=USER, content=text)
    stream = await turns.open(ALICE, asked)
    async with asyncio.timeout(10):
        async for _ in stream.follow():
            pass


def thinking(rank: Any, tokenizer: Tokenizer, system: Any) -> None:
    """The rank thinks four tokens, and answers the rest."""
    ids = [40, 41, 42, 43, tokenizer.control_id(Control.END_THINK), *range(50, 57)]

    async def thoughtful(request: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        for index, token_id in enumerate(ids):
            yield system.token_frame(token_id, index)
        yield system.finished_frame()

    rank.on_generate = thoughtful


async def test_the_next_prompt_begins_with_what_was_prepared(turns: Turns, system: Any, tokenizer: Tokenizer) -> None:
    rank = await system.add("decode-a")
    thinking(rank, tokenizer, system)
    session_id = await session(turns)
    for number, text in enumerate(("one", "two", "three")):
        await ask(turns, session_id, text)
        await system.until(lambda number=number: len(rank.prepared) == number + 1)
        assert rank.released, "the turn's own reservation is given back first"
    for asked, reserved in zip(rank.prepared, rank.reserved[1:], strict=False):
        prepared, prompt = list(asked.token_ids), list(reserved.token_ids)
        assert prompt[: len(prepared)] == prepared
        assert len(prepared) > 10
        assert 40 not in prepared, "thoughts are cut"
        assert (asked.session_id, asked.cache_salt) == (session_id, reserved.cache_salt)
        assert asked.epoch == reserved.epoch - 1


async def test_nothing_is_prepared_where_nothing_is_cut(turns: Turns, system: Any) -> None:
    rank = await system.add("decode-a")
    await ask(turns, await session(turns, common_pb2.THINKING_MODE_CHAT), "one")
    await turns.cut_ahead.close()
    assert rank.prepared == []


@pytest.mark.parametrize("turns", [{"cut_ahead": False}], indirect=True)
async def test_a_setting_turns_it_off(turns: Turns, system: Any, tokenizer: Tokenizer) -> None:
    rank = await system.add("decode-a")
    thinking(rank, tokenizer, system)
    await ask(turns, await session(turns), "one")
    await asyncio.sleep(0.1)
    assert rank.prepared == []


async def test_what_was_prepared_stands_in_the_receipt_and_in_the_sum(
    turns: Turns, system: Any, tokenizer: Tokenizer
) -> None:
    rank = await system.add("decode-a")
    thinking(rank, tokenizer, system)

    async def prepared(request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResponse:
        return worker_pb2.ReserveResponse(reservation_id="r", cached_len=9, num_prepared_tokens=7)

    rank.on_reserve = prepared
    session_id = await session(turns)
    for text in ("one", "two"):
        await ask(turns, session_id, text)
    view = await turns.sessions.get(ALICE, session_id)
    assert view.session.totals.num_prepared_tokens == 14
