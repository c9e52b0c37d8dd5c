"""Logged first, delivered then; one flush at a time, and what waits goes with the next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from seamount.router.begun_turn import BegunTurn
from seamount.router.sessions import Sessions
from seamount.router.store import Store
from seamount.router.token_log import ASK_EVERY_S, MAX_WAITING_TOKENS, START_ID, TokenLog, TurnLog, entry_id
from seamount.v1 import events_pb2, record_pb2, session_pb2
from seamount.wire.errors import Aborted, SeamountError, Unavailable
from seamount.wire.ids import RankId, RouterId, SessionId, TenantId

ALICE = TenantId("alice")


class Slow:
    """``Sessions.append_tokens``, held until the test lets it go; ``sent``: turns of each flush."""

    def __init__(self, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[list[str]] = []
        self.gate = asyncio.Event()
        self.failures: list[SeamountError] = []
        self._append = sessions.append_tokens
        monkeypatch.setattr(sessions, "append_tokens", self)

    async def __call__(self, appends: Sequence[Any]) -> Any:
        self.sent.append([one.turn_id for one in appends])
        await self.gate.wait()
        answers = await self._append(appends)
        if self.failures:
            raise self.failures.pop(0)
        return answers


@pytest.fixture
def sessions(store: Store) -> Sessions:
    return Sessions(store, secret=bytes(32), router_id=RouterId("router-1"))


async def begun(sessions: Sessions) -> BegunTurn:
    made = await sessions.create(ALICE, session_pb2.CreateSessionRequest(), model="m")
    turn = await sessions.begin_turn(
        ALICE,
        SessionId(made.id),
        key="k",
        body_hash=bytes(32),
        start=record_pb2.TurnStart(),
        time_to_live_s=60.0,
    )
    assert isinstance(turn, BegunTurn)
    return turn


def event(sequence: int) -> events_pb2.TurnEvent:
    return events_pb2.TurnEvent(sequence=sequence)


def add(log: TurnLog, *token_ids: int, sequence: int) -> None:
    log.add(token_ids, (), [event(sequence)], decode_rank=RankId("decode-0.0"))


async def logged(sessions: Sessions, turn: BegunTurn) -> list[tuple[str, list[int]]]:
    entries = await sessions.read_log(ALICE, turn.session_id, turn.turn_id)
    return [
        (entry.id, list(record_pb2.LoggedTokens.FromString(entry.value).token_ids))
        for entry in entries
        if entry.kind == "tokens"
    ]


async def test_what_arrives_during_a_flush_goes_with_the_next(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, token_log = Slow(sessions, monkeypatch), TokenLog(sessions)
    told: list[int] = []
    turns = [await begun(sessions) for _ in range(3)]
    logs = [token_log.open(turn, lambda events: told.extend(one.sequence for one in events)) for turn in turns]
    logs[0].add_prompt(5, [event(1)])
    await asyncio.sleep(0.01)
    for sequence in (2, 3, 4):
        add(logs[0], sequence, sequence + 10, sequence=sequence)
    add(logs[1], 7, sequence=50)
    add(logs[2], 8, sequence=60)
    await asyncio.sleep(0.01)
    assert (slow.sent, told) == ([[turns[0].turn_id]], []), "one flush is in flight, and nothing is told before it is"
    slow.gate.set()
    for log in logs:
        await log.is_logged()
    assert len(slow.sent) == 2
    assert sorted(slow.sent[1]) == sorted(turn.turn_id for turn in turns)
    assert [sequence for sequence in told if sequence < 50] == [1, 2, 3, 4]
    assert await logged(sessions, turns[0]) == [("0-2", []), ("6-0", [2, 12, 3, 13, 4, 14])]
    assert logs[0].end == entry_id(6)


async def test_an_entry_without_an_answer_is_sent_again_and_logged_once(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, token_log = Slow(sessions, monkeypatch), TokenLog(sessions)
    slow.gate.set()
    slow.failures = [Unavailable("no answer", reason="STORE_UNAVAILABLE", retry_after_s=1.0)] * 3
    turn, told = await begun(sessions), []
    log = token_log.open(turn, told.extend)
    add(log, 1, 2, sequence=1)
    await asyncio.sleep(0.02)
    add(log, 3, sequence=2)
    await log.is_logged()
    assert told == [event(1), event(2)]
    assert await logged(sessions, turn) == [("2-0", [1, 2]), ("3-0", [3])]


async def test_a_refused_turn_learns_why_and_the_others_go_on(sessions: Sessions, store: Store) -> None:
    token_log = TokenLog(sessions)
    lost, kept = await begun(sessions), await begun(sessions)
    other = Sessions(store, secret=bytes(32), router_id=RouterId("router-2"))
    running = (await other.get(ALICE, lost.session_id)).running
    assert running is not None
    await other.take_over(ALICE, lost.session_id, running)
    told: list[events_pb2.TurnEvent] = []
    logs = [token_log.open(turn, told.extend) for turn in (lost, kept)]
    add(logs[0], 1, sequence=1)
    add(logs[1], 2, sequence=2)
    await logs[1].is_logged()
    with pytest.raises(Aborted) as caught:
        await logs[0].is_logged()
    assert caught.value.reason == "STALE_EPOCH"
    assert told == [event(2)]
    with pytest.raises(Aborted):
        await logs[0].has_room()


async def test_a_dropped_turn_delivers_nothing_more(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, token_log = Slow(sessions, monkeypatch), TokenLog(sessions)
    turn, told = await begun(sessions), []
    log = token_log.open(turn, told.extend)
    add(log, 1, sequence=1)
    await asyncio.sleep(0.01)
    log.drop()
    slow.gate.set()
    await asyncio.sleep(0.05)
    assert (told, log.end) == ([], START_ID)
    assert not log.note_end(entry_id(1))


async def test_what_came_through_without_an_answer_is_delivered_when_the_log_says_so(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, token_log = Slow(sessions, monkeypatch), TokenLog(sessions)
    turn, told = await begun(sessions), []
    log = token_log.open(turn, told.extend)
    add(log, 1, sequence=1)
    await asyncio.sleep(0.01)
    assert not log.note_end(START_ID)
    assert log.note_end(entry_id(1))
    assert told == [event(1)]
    slow.gate.set()
    await log.is_logged()
    assert told == [event(1)]


async def test_a_turn_waits_where_too_much_of_it_waits(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, token_log = Slow(sessions, monkeypatch), TokenLog(sessions)
    log = token_log.open(await begun(sessions), lambda events: None)
    add(log, 1, sequence=1)
    await asyncio.sleep(0.01)
    add(log, *range(MAX_WAITING_TOKENS), sequence=2)
    await log.has_room()
    add(log, 1, sequence=3)
    waiting = asyncio.create_task(log.has_room())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    slow.gate.set()
    await waiting
    await token_log.close()


async def test_a_turn_that_stands_still_hears_that_it_was_ended_elsewhere(sessions: Sessions, store: Store) -> None:
    token_log, turn = TokenLog(sessions), await begun(sessions)
    refused = asyncio.Event()
    log = token_log.open(turn, lambda events: None)
    log.on_refused = refused.set
    log.add_prompt(3, [event(1)])
    await log.is_logged()
    await asyncio.sleep(2.5 * ASK_EVERY_S)
    assert not refused.is_set()
    assert log.error is None
    assert await logged(sessions, turn) == [(entry_id(0), [])], "to ask writes nothing"
    elsewhere = Sessions(store, secret=bytes(32), router_id=RouterId("router-2"))
    cancelled = event(2)
    cancelled.finished.SetInParent()
    await elsewhere.fail_turn(ALICE, turn.session_id, turn, cancelled, log_end=log.end)
    async with asyncio.timeout(5):
        await refused.wait()
    assert isinstance(log.error, Aborted)
    await token_log.close()
    await asyncio.gather(sessions.close(), elsewhere.close())
