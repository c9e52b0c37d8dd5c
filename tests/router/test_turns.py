"""Who may start, attach, cancel and stop, at the moments when they meet: a real store, a rank that a test dictates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from seamount.router.running_index import RELEASED
from seamount.router.store import Store
from seamount.router.tokenizer import Tokenizer
from seamount.router.turns import Turns
from seamount.v1 import common_pb2, events_pb2, session_pb2
from seamount.wire.errors import Aborted, SeamountError, Unavailable
from seamount.wire.ids import SessionId, TenantId

ALICE = TenantId("alice")


async def session(turns: Turns, *, key: str = "", **defaults: Any) -> SessionId:
    request = session_pb2.CreateSessionRequest(
        idempotency_key=key, defaults=common_pb2.SamplingParameters(**{"max_output_tokens": 5, **defaults})
    )
    made = await turns.sessions.create(ALICE, request, model="m")
    turns.admission.remember(ALICE, made)
    return SessionId(made.id)


def request(session_id: str, key: str = "k", text: str = "hi") -> session_pb2.RunTurnRequest:
    made = session_pb2.RunTurnRequest(session_id=session_id, idempotency_key=key)
    made.messages.add(role=common_pb2.ROLE_USER, content=text)
    return made


async def events(turns: Turns, asked: session_pb2.RunTurnRequest) -> list[events_pb2.TurnEvent]:
    stream = await turns.open(ALICE, asked)
    async with asyncio.timeout(10):
        told = [event async for batch in stream.follow() for event in batch]
    assert [event.sequence for event in told] == list(range(1, len(told) + 1)), "no number is left out or used twice"
    return told


def last(told: list[events_pb2.TurnEvent]) -> str:
    event = told[-1]
    if event.WhichOneof("event") == "failed":
        return common_pb2.Status.FromString(event.failed.status.SerializeToString()).message
    return common_pb2.FinishReason.Name(event.finished.reason)


async def endless(asked: Any) -> AsyncIterator[Any]:
    from seamount.v1 import worker_pb2

    while True:
        yield worker_pb2.WorkerServiceGenerateResponse(progress=worker_pb2.GenerateProgress())
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("same_key", [True, False])
async def test_turns_that_begin_together_never_take_the_session_from_each_other(
    turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch, same_key: bool
) -> None:
    """The store knows the first one's turn a while before this router does: it is not one without an owner."""
    rank = await system.add("decode-a")
    begin = turns.sessions.begin_turn

    async def late(*args: Any, **options: Any) -> Any:
        begun = await begin(*args, **options)
        await asyncio.sleep(0.05)
        return begun

    monkeypatch.setattr(turns.sessions, "begin_turn", late)
    session_id = await session(turns)
    keys = ["k" if same_key else f"k{number}" for number in range(5)]
    outcomes = await asyncio.gather(*(events(turns, request(session_id, key)) for key in keys), return_exceptions=True)
    told = [outcome for outcome in outcomes if isinstance(outcome, list)]
    refused = [outcome for outcome in outcomes if not isinstance(outcome, list)]
    assert all(isinstance(error, Aborted) for error in refused), refused
    assert all(last(one) == "FINISH_REASON_LENGTH" for one in told), [last(one) for one in told]
    if same_key:
        assert not refused
        assert all(one == told[0] for one in told)
        assert len(rank.generated) == 1
    view = await turns.sessions.get(ALICE, session_id)
    assert view.session.head == len(rank.generated), "no turn ran in vain"


async def test_a_turn_that_begins_while_the_router_leaves_is_given_back(
    turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.add("decode-a")
    begin, reached = turns.sessions.begin_turn, asyncio.Event()

    async def late(*args: Any, **options: Any) -> Any:
        begun = await begin(*args, **options)
        reached.set()
        await asyncio.sleep(0.1)
        return begun

    monkeypatch.setattr(turns.sessions, "begin_turn", late)
    session_id = await session(turns)
    opening = asyncio.create_task(turns.open(ALICE, request(session_id)))
    await reached.wait()
    await turns.stop(0.0)
    with pytest.raises(Unavailable) as caught:
        await opening
    assert caught.value.reason == "ROUTER_LEAVING"
    assert turns.num_running == 0
    assert (await turns.sessions.get(ALICE, session_id)).running is None


async def test_stop_hands_turns_over_and_tells_the_clients(turns: Turns, system: Any) -> None:
    rank = await system.add("decode-a")
    rank.on_generate = endless
    session_id = await session(turns)
    following = asyncio.create_task(events(turns, request(session_id)))
    await system.until(lambda: rank.generated)
    await turns.stop(0.1)
    with pytest.raises(Unavailable) as caught:
        await following
    assert caught.value.reason == "ROUTER_LEAVING"
    assert await turns.sessions.index.owners() == [RELEASED]
    assert (await turns.sessions.get(ALICE, session_id)).running is not None
    assert len(rank.released) == 1


@pytest.mark.parametrize("came_through", [True, False])
async def test_a_commit_without_an_answer_has_one_outcome(
    turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch, came_through: bool
) -> None:
    await system.add("decode-a")
    commit = turns.sessions.commit_turn

    async def unanswered(*args: Any, **options: Any) -> Any:
        if came_through:
            await commit(*args, **options)
        raise Unavailable("no answer", reason="STORE_UNAVAILABLE", retry_after_s=1.0)

    monkeypatch.setattr(turns.sessions, "commit_turn", unanswered)
    session_id = await session(turns)
    told = await events(turns, request(session_id))
    head = (await turns.sessions.get(ALICE, session_id)).session.head
    assert (last(told), head) == (("FINISH_REASON_LENGTH", 1) if came_through else ("no answer", 0))
    monkeypatch.undo()
    again = await events(turns, request(session_id))
    assert last(again) == "FINISH_REASON_LENGTH"
    if came_through:
        assert again == told
    assert (await turns.sessions.get(ALICE, session_id)).session.head == 1


@pytest.mark.parametrize("mode", [common_pb2.THINKING_MODE_CHAT, common_pb2.THINKING_MODE_THINKING])
async def test_the_rank_hears_what_the_next_question_cuts(
    turns: Turns, system: Any, mode: common_pb2.ThinkingMode
) -> None:
    rank = await system.add("decode-a")
    made = session_pb2.CreateSessionRequest(
        thinking_mode=mode, defaults=common_pb2.SamplingParameters(max_output_tokens=5)
    )
    session_id = SessionId((await turns.sessions.create(ALICE, made, model="m")).id)
    await events(turns, request(session_id))
    await system.until(lambda: rank.released)
    released = rank.released[-1]
    await events(turns, request(session_id, "again"))
    first, second = (list(one.token_ids) for one in rank.reserved)
    fed = [*first, *range(rank.TOKENS, rank.TOKENS + 5)]
    same = next((i for i, one in enumerate(fed) if one != second[i]), len(fed))
    assert (released.keep_len, released.reuse_len) == (len(fed), same)
    assert (same < len(first)) == (mode == common_pb2.THINKING_MODE_THINKING), "reasoning is cut with its tag"


async def test_where_the_store_says_nothing_the_client_is_told_to_retry(
    turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.add("decode-a")

    async def silent(*args: Any, **options: Any) -> Any:
        raise Unavailable("no answer", reason="STORE_UNAVAILABLE", retry_after_s=1.0)

    monkeypatch.setattr(turns.sessions, "commit_turn", silent)
    monkeypatch.setattr(turns.sessions, "fail_turn", silent)
    with pytest.raises(Unavailable) as caught:
        await events(turns, request(await session(turns)))
    assert caught.value.reason == "OUTCOME_UNKNOWN"


async def test_a_deadline_in_mid_commit_does_not_deny_the_commit(
    turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.add("decode-a")
    commit = turns.sessions.commit_turn

    async def slow(*args: Any, **options: Any) -> Any:
        await commit(*args, **options)
        await asyncio.sleep(30)

    monkeypatch.setattr(turns.sessions, "commit_turn", slow)
    asked = request(await session(turns))
    asked.deadline.FromMilliseconds(700)
    assert last(await events(turns, asked)) == "FINISH_REASON_LENGTH"


async def test_a_deadline_passes(turns: Turns, system: Any) -> None:
    rank = await system.add("decode-a")
    rank.on_generate = endless
    session_id = await session(turns)
    asked = request(session_id)
    asked.deadline.FromMilliseconds(400)
    told = await events(turns, asked)
    assert "deadline" in last(told)
    view = await turns.sessions.get(ALICE, session_id)
    assert (view.running, view.session.head) == (None, 0)


async def test_to_cancel_a_turn_that_is_being_stored_is_too_late(
    turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.add("decode-a")
    commit, reached = turns.sessions.commit_turn, asyncio.Event()

    async def slow(*args: Any, **options: Any) -> Any:
        reached.set()
        await asyncio.sleep(0.2)
        return await commit(*args, **options)

    monkeypatch.setattr(turns.sessions, "commit_turn", slow)
    session_id = await session(turns)
    following = asyncio.create_task(events(turns, request(session_id)))
    await reached.wait()
    assert await turns.cancel(ALICE, session_id, "") is False
    assert last(await following) == "FINISH_REASON_LENGTH"


async def test_to_cancel_twice_ends_the_stream_once(turns: Turns, system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one meets a turn whose end is being stored."""
    rank = await system.add("decode-a")
    rank.on_generate = endless
    fail = turns.sessions.fail_turn

    async def slow(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(0.2)
        return await fail(*args, **options)

    monkeypatch.setattr(turns.sessions, "fail_turn", slow)
    session_id = await session(turns)
    following = asyncio.create_task(events(turns, request(session_id)))
    await system.until(lambda: rank.generated)
    cancelled = await asyncio.gather(*(turns.cancel(ALICE, session_id, "") for _ in range(2)))
    assert cancelled[0] is True
    assert last(await following) == "FINISH_REASON_CANCELLED"
    assert len(rank.released) == 1


async def test_delete_while_running_ends_the_turn(turns: Turns, system: Any) -> None:
    rank = await system.add("decode-a")
    rank.on_generate = endless
    session_id = await session(turns)
    following = asyncio.create_task(events(turns, request(session_id)))
    await system.until(lambda: rank.generated)
    await turns.delete(ALICE, session_id)
    assert last(await following) == "FINISH_REASON_CANCELLED"
    assert len(rank.released) == 1
    with pytest.raises(SeamountError):
        await turns.sessions.get(ALICE, session_id)


async def test_cancel_of_another_routers_turn_that_was_committed_meanwhile(
    turns: Turns, system: Any, store: Store, tokenizer: Tokenizer, make_turns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.add("decode-a")
    other = make_turns(store, system, tokenizer, "router-b")
    fail, session_id = other.sessions.fail_turn, await session(turns)
    commit, go_on = turns.sessions.commit_turn, asyncio.Event()

    async def waits(*args: Any, **options: Any) -> Any:
        await go_on.wait()
        return await commit(*args, **options)

    monkeypatch.setattr(turns.sessions, "commit_turn", waits)
    following = asyncio.create_task(events(turns, request(session_id)))

    async def late(*args: Any, **options: Any) -> Any:
        go_on.set()
        await following
        return await fail(*args, **options)

    monkeypatch.setattr(other.sessions, "fail_turn", late)
    await system.until(lambda: turns.num_running and next(iter(turns._running.values())).turn.is_ending)
    assert await other.cancel(ALICE, session_id, "") is False
    assert last(await following) == "FINISH_REASON_LENGTH"


async def test_defaults_of_a_session_made_anew_elsewhere(
    turns: Turns, system: Any, store: Store, tokenizer: Tokenizer, make_turns: Any
) -> None:
    """Under its old key it has its old id, too: what this router remembers is another session's."""
    rank = await system.add("decode-a")
    session_id = await session(turns, key="same", max_output_tokens=5)
    await events(turns, request(session_id, "one"))
    other = make_turns(store, system, tokenizer, "router-b")
    await other.delete(ALICE, session_id)
    assert await session(other, key="same", max_output_tokens=2) == session_id
    told = await events(turns, request(session_id, "two"))
    assert told[-2].usage.num_output_tokens == 2
    assert rank.generated[-1].sampling.max_output_tokens == 2
    assert (await turns.sessions.get(ALICE, session_id)).session.head == 1
