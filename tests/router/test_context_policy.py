"""What a context policy leaves out of prompts: against the conversation that is left, and through whole turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router.context_policy import (
    DISCARDED_RESULT,
    NOTHING,
    ContextPolicy,
    Discards,
    context_policy_from_proto,
    discards_of,
    next_discards,
)
from seamount.router.encoding import RunEncoder
from seamount.router.history import History
from seamount.router.messages import ASKING_ROLES, Message, Role, ThinkingMode, ToolCall, message_to_proto
from seamount.router.store import Store
from seamount.router.tokenizer import Tokenizer
from seamount.router.turns import Turns
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2
from seamount.wire.errors import Aborted, InvalidArgument
from seamount.wire.ids import SessionId, TenantId

ALICE = TenantId("alice")
CONTEXT = 1_000
ALL, RESULTS = ContextPolicy.DISCARD_ALL, ContextPolicy.DISCARD_TOOL_RESULTS
CALL = ToolCall(id="c", name="f", arguments_json="{}")
QUESTION, SYSTEM = Message(role=Role.USER, content="q"), Message(role=Role.SYSTEM, content="s")
CALLING = Message(role=Role.ASSISTANT, tool_calls=(CALL,))
RESULT = Message(role=Role.TOOL, tool_call_id="c", content="r")
ANSWER = Message(role=Role.ASSISTANT, content="a")


def recorded(messages: Sequence[Message], pending: Sequence[ToolCall] = ()) -> record_pb2.TurnRecord:
    """A turn that only recorded messages."""
    calls = [common_pb2.ToolCall(id=c.id, name=c.name, arguments_json=c.arguments_json) for c in pending]
    return record_pb2.TurnRecord(input=[message_to_proto(one) for one in messages], pending_tool_calls=calls)


@st.composite
def divided(draw: st.DrawFn, messages: Sequence[Message]) -> tuple[list[record_pb2.TurnRecord], list[Message]]:
    """Recorded turns that end in an assistant's message each, and what comes after them."""
    records, new = list[record_pb2.TurnRecord](), list[Message]()
    for message in messages:
        new.append(message)
        if message.role is Role.ASSISTANT and draw(st.booleans()):
            records.append(recorded(new, message.tool_calls))
            new = []
    return records, new


def without_tools(messages: Sequence[Message]) -> list[Message]:
    return [one for one in messages if one.role is not Role.TOOL and not one.tool_calls]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(ThinkingMode)))
def test_prompts_are_those_of_the_conversation_that_is_left(
    data: st.DataObject, mode: ThinkingMode, strategies: Any, tokenizer: Tokenizer
) -> None:
    messages: Sequence[Message] = data.draw(strategies.hostile_conversations)
    records, new = data.draw(divided(messages))
    history, encoder = History(tokenizer, "here", max_cached_ids=300), RunEncoder(tokenizer)
    old = messages[: len(messages) - len(new)]
    thin = [replace(one, content=DISCARDED_RESULT) if one.role is Role.TOOL else one for one in old]
    left = without_tools(messages)
    for policy, expected in ((RESULTS, [*thin, *new]), (ALL, left)):
        discards = next_discards(policy, records, new)
        if discards is None:
            assert (not records) if policy is RESULTS else (not left or left[-1].role not in ASKING_ROLES)
            continue
        prompt = history.prompt(records, new, mode, discards=discards).token_ids
        assert prompt == encoder.encode_messages(expected, mode)
        # Stored with the next turn, it leaves out the same for ever.
        after = recorded([*new, ANSWER])
        after.discards.CopyFrom(discards.to_proto())
        assert discards_of([*records, after]) == discards
        later = history.prompt([*records, after], [QUESTION], mode).token_ids
        assert later == encoder.encode_messages([*expected, ANSWER, QUESTION], mode)
    assert history.prompt(records, new, mode).token_ids == encoder.encode_messages(messages, mode), "nothing is lost"


@pytest.mark.parametrize(
    ("policy", "records", "new", "expected"),
    [
        (ContextPolicy.ERROR, [[QUESTION, CALLING]], [RESULT], None),
        (RESULTS, [], [QUESTION], None),
        (RESULTS, [[QUESTION, CALLING], [RESULT, ANSWER]], [QUESTION], Discards(num_turns_without_results=2)),
        (ALL, [], [QUESTION], Discards(num_reset_inputs=1)),
        (ALL, [[QUESTION, CALLING]], [RESULT], Discards(num_reset_inputs=2)),
        (ALL, [[SYSTEM, CALLING]], [RESULT], None),  # nobody has asked
        (ALL, [[QUESTION, ANSWER, CALLING]], [RESULT], None),  # what was asked has been answered
        (ALL, [[QUESTION, SYSTEM, CALLING]], [RESULT], None),
        (ALL, [[QUESTION, CALLING], [RESULT, ANSWER]], [QUESTION], Discards(num_reset_inputs=3)),
    ],
)
def test_how_far_each_policy_discards(
    policy: ContextPolicy, records: list[list[Message]], new: list[Message], expected: Discards | None
) -> None:
    turns = [recorded(one, one[-1].tool_calls) for one in records]
    discards = next_discards(policy, turns, new)
    assert discards == expected
    if discards is not None:
        assert discards.of_turn(len(turns)).results is False, "this turn's own results are news"


def test_discards_add_up() -> None:
    before = recorded([QUESTION, CALLING])
    before.discards.CopyFrom(Discards(num_reset_inputs=1).to_proto())
    assert next_discards(RESULTS, [before], [RESULT]) == Discards(num_turns_without_results=1, num_reset_inputs=1)
    assert discards_of([]) == NOTHING


def test_an_unknown_policy_is_refused() -> None:
    assert context_policy_from_proto(0) is ContextPolicy.ERROR
    with pytest.raises(InvalidArgument, match="discard all"):
        context_policy_from_proto(9)


# ---- through whole turns, at a router with a small context


@pytest.fixture
async def turns(store: Store, system: Any, tokenizer: Tokenizer, make_turns: Any) -> AsyncIterator[Turns]:
    made = make_turns(store, system, tokenizer, "router-a", max_context_tokens=CONTEXT)
    yield made
    await made.stop(0.0)
    await made.sessions.close()
    made.rendering.close()


async def session(turns: Turns, policy: ContextPolicy) -> SessionId:
    request = session_pb2.CreateSessionRequest(
        thinking_mode=common_pb2.THINKING_MODE_CHAT,  # no reasoning: the discards are the first difference
        defaults=common_pb2.SamplingParameters(max_output_tokens=5),
        context_policy=policy.to_proto(),
    )
    return SessionId((await turns.sessions.create(ALICE, request, model="m")).id)


async def run(turns: Turns, session_id: str, key: str, *messages: Message) -> events_pb2.TurnFinished:
    request = session_pb2.RunTurnRequest(
        session_id=session_id, idempotency_key=key, messages=[message_to_proto(one) for one in messages]
    )
    stream = await turns.open(ALICE, request)
    async with asyncio.timeout(10):
        told = [event async for batch in stream.follow() for event in batch]
    assert told[-1].HasField("finished"), told[-1]
    return told[-1].finished


@pytest.mark.parametrize("policy", [RESULTS, ALL])
async def test_a_long_prompt_is_cut_and_the_receipt_says_so(turns: Turns, system: Any, policy: ContextPolicy) -> None:
    rank = await system.add("decode-a")
    session_id = await session(turns, policy)
    await run(turns, session_id, "1", QUESTION, CALLING)
    short = await run(turns, session_id, "2", replace(RESULT, content="x" * 500))
    before = list(rank.reserved[-1].token_ids)
    assert short.receipt.num_discarded_tokens == 0

    async def found(asked: Any) -> Any:
        from seamount.v1 import worker_pb2

        same = next(i for i, one in enumerate(asked.token_ids) if one != before[i])
        return worker_pb2.ReserveResponse(reservation_id="r", cached_len=same, common_len=same, left_len=len(before))

    rank.on_reserve = found
    await run(turns, session_id, "3", QUESTION, CALLING)  # records only: nothing is discarded for it
    assert not (await turns.sessions.read(ALICE, session_id))[1].records[-1].HasField("discards")
    finished = await run(turns, session_id, "4", replace(RESULT, content="y" * 150))
    receipt = finished.receipt
    prompt = turns.model.tokenizer.decode(list(rank.reserved[-1].token_ids))
    assert receipt.num_discarded_tokens > 0
    assert receipt.miss_cause == events_pb2.MISS_CAUSE_CONTEXT_DISCARDED
    assert receipt.num_prompt_tokens == len(rank.reserved[-1].token_ids) <= CONTEXT
    assert ("y" * 150 in prompt, DISCARDED_RESULT in prompt, "x" * 500 in prompt) == (
        (policy is RESULTS),
        (policy is RESULTS),
        False,
    )
    view, history = await turns.sessions.read(ALICE, session_id)
    assert history.records[-1].discards == next_discards(policy, history.records[:-1], [RESULT]).to_proto()  # type: ignore[union-attr]
    assert "x" * 500 in [message.content for record in history.records for message in record.input], "it is kept"
    assert view.session.num_context_tokens < receipt.num_prompt_tokens + 10
    rank.on_reserve = None
    again = await run(turns, session_id, "5", QUESTION)
    assert again.receipt.num_discarded_tokens == 0


async def test_without_a_policy_a_full_context_is_an_error_and_an_update_helps(turns: Turns, system: Any) -> None:
    await system.add("decode-a")
    session_id = await session(turns, ContextPolicy.ERROR)
    await run(turns, session_id, "1", QUESTION, CALLING)
    await run(turns, session_id, "2", replace(RESULT, content="x" * 500))
    long = replace(QUESTION, content="y" * 500)
    with pytest.raises(InvalidArgument, match="context policy"):
        await run(turns, session_id, "3", long)
    update = session_pb2.UpdateSessionRequest(session_id=session_id, idempotency_key="u", context_policy=ALL.to_proto())
    assert (await turns.sessions.update(ALICE, update)).context_policy == ALL.value
    finished = await run(turns, session_id, "4", long)
    assert finished.receipt.num_discarded_tokens > 500


async def test_an_update_waits_for_the_running_turn(turns: Turns, system: Any) -> None:
    rank = await system.add("decode-a")
    go_on = asyncio.Event()

    async def paused(asked: Any) -> AsyncIterator[Any]:
        await go_on.wait()
        async for frame in rank.tokens(asked):
            yield frame

    rank.on_generate = paused
    session_id = await session(turns, ContextPolicy.ERROR)
    running = asyncio.create_task(run(turns, session_id, "1", QUESTION))
    await system.until(lambda: rank.generated)
    update = session_pb2.UpdateSessionRequest(session_id=session_id, idempotency_key="u", context_policy=ALL.to_proto())
    with pytest.raises(Aborted) as caught:
        await turns.sessions.update(ALICE, update)
    assert caught.value.reason == "TURN_IN_PROGRESS"
    assert caught.value.retry_after_s is not None
    go_on.set()
    await running
    assert (await turns.sessions.update(ALICE, update)).context_policy == ALL.value
