"""Sessions driven by random steps of several routers, against a plain model of what they promise; a real server.

The model is a few lists: acknowledged records, one outcome a key, the turn that runs, its holder and earlier holders.
What a step draws never depends on what the server answered, so a failing run is replayed and made smaller.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from seamount.router.begun_turn import BegunTurn
from seamount.router.idempotency import body_hash
from seamount.router.messages import Message, Role, check_turn, message_to_proto, tool_calls_from_proto
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import Sessions
from seamount.router.store import Store
from seamount.router.stored import RunningTurn
from seamount.router.token_log import START_ID, TokenLog, entry_id
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2
from seamount.wire.errors import SeamountError
from seamount.wire.ids import RankId, RouterId, SessionId, TenantId

SECRET = bytes(range(32))
NUM_ROUTERS = 3
LAPSE_S = 0.003
"""Deadlines are whole milliseconds."""
CANCELLED, DEADLINE, UNAVAILABLE = 0, 4, 14
"""How a turn may end without a commit; the last one is forgotten, the others are the key's outcome."""
REFUSALS = {"missing": "MISSING_TOOL_RESULTS", "twice": "DUPLICATE_TOOL_RESULT", "unknown": "UNKNOWN_TOOL_CALL_ID"}

places = st.integers(0, 59)
"""Picks one of however many there are."""
routers = st.integers(0, NUM_ROUTERS - 1)
session_keys = st.sampled_from(["s0", "s1", "s2"])
turn_keys = st.sampled_from([None, None, None, "k0", "k1", "k2"])
"""None: one that was not used yet."""
bodies = st.sampled_from(["", "", "another"])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a key answers from now on. ``record`` None: the turn was not committed."""

    body: str
    turn_id: str
    record: record_pb2.TurnRecord | None
    event: events_pb2.TurnEvent


@dataclass(kw_only=True)
class Holder:
    """A router's hold of a turn, and how it ended: ``holds``, ``lost``, ``forgotten``, ``ended``, ``committed``."""

    session: Modelled
    turn: BegunTurn
    body: str
    messages: Sequence[Message]
    tokens: list[int]
    has_lapsed: bool = False
    fate: str = "holds"
    outcome: Outcome | None = None

    @property
    def end(self) -> str:
        return entry_id(len(self.tokens)) if self.tokens else START_ID


@dataclass(kw_only=True)
class Modelled:
    """A session as its clients know it. logs: tokens and kind of last entry by turn id, of every log that is kept."""

    id: SessionId
    request: session_pb2.CreateSessionRequest | session_pb2.ForkSessionRequest
    records: list[record_pb2.TurnRecord] = field(default_factory=list)
    epoch: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    holder: Holder | None = None
    logs: dict[str, tuple[list[int], str]] = field(default_factory=dict)

    def free_key(self) -> str:
        running = self.holder.turn.key if self.holder else ""
        return next(key for index in count() if (key := f"k{index}") not in self.outcomes and key != running)

    def answer(self, key: str, body: str, expected_head: int | None) -> str:
        """What becomes of a turn that asks to begin: the rules of ``RunTurn``, in their order."""
        running = self.holder
        if running is not None and running.turn.key == key:
            if running.body != body:
                return "KEY_REUSED"
            if not running.has_lapsed:
                return "running"
        elif key in self.outcomes:
            return "replayed" if self.outcomes[key].body == body else "KEY_REUSED"
        if running is not None and not running.has_lapsed:
            return "TURN_IN_PROGRESS"
        return "begun" if expected_head in (None, len(self.records)) else "HEAD_MOVED"


def step(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(self: SessionMachine, **drawn: Any) -> None:
        self.runner.run(function(self, **drawn))

    return run


async def said(call: Awaitable[object]) -> object:
    """The result, or the reason of the error."""
    try:
        return await call
    except SeamountError as error:
        return error.reason


def final_event(status: int, sequence: int) -> events_pb2.TurnEvent:
    event = events_pb2.TurnEvent(sequence=sequence)
    if status == CANCELLED:
        event.finished.reason = common_pb2.FINISH_REASON_CANCELLED
    else:
        event.failed.status.code = status
    return event


class SessionMachine(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, store: Store) -> None:
        super().__init__()
        self.runner = runner
        self.tenant = TenantId(uuid.uuid4().hex)
        self.routers = [
            Sessions(store, secret=SECRET, router_id=RouterId(f"router-{index}"), deadline_grace_s=0.0)
            for index in range(NUM_ROUTERS)
        ]
        self.cold = Sessions(store, secret=SECRET, router_id=RouterId("cold"), cache_bytes=0)
        self.token_logs = [TokenLog(sessions) for sessions in self.routers]
        self.sessions: dict[str, Modelled] = {}
        self.epochs: dict[SessionId, int] = {}
        self.past: list[Holder] = []
        self.num_steps = 0

    # ---- what steps share

    async def some(self, place: int) -> Modelled:
        if not self.sessions:
            await self.make("s0", "", 0)
        live = list(self.sessions.values())
        return live[place % len(live)]

    async def make(self, key: str, body: str, router: int) -> None:
        request = session_pb2.CreateSessionRequest(idempotency_key=key)
        request.defaults.top_k = 1 + len(body)
        answer = await said(self.routers[router].create(self.tenant, request, model="m"))
        await self.settle_made(key, request, [], answer)

    async def settle_made(self, key: str, request: Any, records: Sequence[record_pb2.TurnRecord], answer: Any) -> None:
        known = self.sessions.get(key)
        if known is not None and known.request != request:
            assert answer == "KEY_REUSED"
            return
        if known is None:
            known = Modelled(id=SessionId(answer.id), request=request, records=list(records))
            known.epoch = (await self.cold.get(self.tenant, known.id)).epoch
            assert known.epoch > self.epochs.get(known.id, 0), "made anew: above all epochs of the deleted one"
            self.sessions[key] = known
        assert (answer.id, answer.head) == (known.id, len(known.records)), "a retry finds the first one's session"

    async def begin(
        self, session: Modelled, router: int, key: str, body: str = "", *, ttl_s: float = 60.0, **options: Any
    ) -> object:
        asked = session_pb2.RunTurnRequest(session_id=session.id, idempotency_key=key)
        asked.messages.add(role=common_pb2.ROLE_USER, content=body)
        return await said(
            self.routers[router].begin_turn(
                self.tenant,
                session.id,
                key=key,
                body_hash=body_hash(asked),
                start=record_pb2.TurnStart(),
                time_to_live_s=ttl_s,
                **options,
            )
        )

    def hold(self, session: Modelled, turn: object, body: str = "", tokens: Sequence[int] = ()) -> Holder:
        """The turn is this holder's from now on, and nobody else's."""
        assert isinstance(turn, BegunTurn), turn
        assert turn.epoch == session.epoch + 1
        assert list(turn.records) == session.records
        if session.holder is not None:
            self.release(session, "lost")
        session.epoch = turn.epoch
        message = Message(role=Role.USER, content=body)
        session.holder = Holder(session=session, turn=turn, body=body, messages=[message], tokens=list(tokens))
        session.logs[turn.turn_id] = (list(tokens), "start" if not tokens else "tokens")
        return session.holder

    def release(self, session: Modelled, fate: str, outcome: Outcome | None = None) -> None:
        holder = session.holder
        assert holder is not None
        holder.fate, holder.outcome = fate, outcome
        self.past.append(holder)
        session.holder = None

    async def held(self, session: Modelled, router: int) -> Holder:
        """The running turn, begun now where none runs."""
        if session.holder is None:
            self.hold(session, await self.begin(session, router, session.free_key()))
        assert session.holder is not None
        return session.holder

    def settle_committed(self, session: Modelled, record: record_pb2.TurnRecord) -> None:
        assert session.holder is not None
        holder = session.holder
        session.records.append(record)
        outcome = Outcome(body=holder.body, turn_id=record.turn_id, record=record, event=record.final_event)
        session.outcomes[holder.turn.key] = outcome
        session.logs[record.turn_id] = (holder.tokens, "committed")
        self.release(session, "committed", outcome)

    def settle_failed(self, session: Modelled, status: int, event: events_pb2.TurnEvent) -> None:
        assert session.holder is not None
        holder, turn_id = session.holder, session.holder.turn.turn_id
        session.logs[turn_id] = (holder.tokens, "ended")
        if status == UNAVAILABLE:
            self.release(session, "forgotten")
            return
        outcome = Outcome(body=holder.body, turn_id=turn_id, record=None, event=event)
        session.outcomes[holder.turn.key] = outcome
        self.release(session, "ended", outcome)

    def record(self, holder: Holder, num_calls: int) -> record_pb2.TurnRecord:
        made = record_pb2.TurnRecord(turn_id=holder.turn.turn_id, input=map(message_to_proto, holder.messages))
        made.output.token_ids.extend(holder.tokens)
        made.final_event.finished.reason = common_pb2.FINISH_REASON_STOP
        for index in range(num_calls):
            made.pending_tool_calls.add(id=f"call_{index}", name="f", arguments_json="{}")
        return made

    async def commit(self, router: int, holder: Holder, record: record_pb2.TurnRecord) -> object:
        return await said(self.routers[router].commit_turn(holder.turn, record, rank="d", num_context_tokens=0))

    async def fail(self, router: int, holder: Holder, event: events_pb2.TurnEvent, log_end: str) -> object:
        return await said(
            self.routers[router].fail_turn(self.tenant, holder.turn.session_id, holder.turn, event, log_end=log_end)
        )

    async def log(self, router: int, holder: Holder, tokens: Sequence[int]) -> tuple[object, list[int]]:
        """What the log said, and the sequence numbers that were delivered."""
        told: list[int] = []
        log = self.token_logs[router].open(
            holder.turn,
            lambda events: told.extend(event.sequence for event in events),
            end=holder.end,
            num_tokens=len(holder.tokens),
        )
        log.add(tokens, (), [events_pb2.TurnEvent(sequence=1)], decode_rank=RankId("d"))
        return await said(log.is_logged()), told

    # ---- steps

    @initialize(router=routers)
    @step
    async def start(self, router: int) -> None:
        """Two turns, the last of which waits for tools."""
        await self.make("s0", "", router)
        session = self.sessions["s0"]
        for num_calls in (0, 2):
            holder = await self.held(session, router)
            record = self.record(holder, num_calls)
            await self.commit(router, holder, record)
            self.settle_committed(session, record)

    @rule(key=session_keys, body=bodies, router=routers)
    @step
    async def create(self, key: str, body: str, router: int) -> None:
        await self.make(key, body, router)

    @rule(place=places, key=session_keys, at_turn=places, router=routers)
    @step
    async def fork(self, place: int, key: str, at_turn: int, router: int) -> None:
        origin = await self.some(place)
        at_turn = len(origin.records) - at_turn % (len(origin.records) + 1)
        request = session_pb2.ForkSessionRequest(idempotency_key=key, session_id=origin.id, at_turn=at_turn)
        view, history = await self.routers[router].read(self.tenant, origin.id)
        records = history.records[:at_turn]
        answer = await said(self.routers[router].fork(self.tenant, request, view, records, num_context_tokens=0))
        await self.settle_made(key, request, origin.records[:at_turn], answer)

    @rule(
        place=places,
        key=turn_keys,
        body=bodies,
        router=routers,
        head_offset=st.sampled_from([None, None, None, 0, -1, 1]),
        lapses=st.sampled_from([False, False, True]),
    )
    @step
    async def turn(
        self, place: int, key: str | None, body: str, router: int, head_offset: int | None, lapses: bool
    ) -> None:
        """A turn asks to begin: anew, again, under another's key, with another body, at a wrong head."""
        session = await self.some(place)
        key = key or session.free_key()
        head = None if head_offset is None else max(0, len(session.records) + head_offset)
        foreseen = session.answer(key, body, head)
        answer = await self.begin(session, router, key, body, ttl_s=0.0 if lapses else 60.0, expected_head=head)
        if foreseen == "begun":
            holder = self.hold(session, answer, body)
            if lapses:
                await asyncio.sleep(LAPSE_S)
                holder.has_lapsed = True
        elif foreseen == "running":
            assert isinstance(answer, RunningTurn)
            assert session.holder is not None
            assert (answer.turn_id, answer.epoch) == (session.holder.turn.turn_id, session.epoch)
        elif foreseen == "replayed":
            self.check_replay(session.outcomes[key], answer)
        else:
            assert answer == foreseen

    @rule(place=places, router=routers, same_key=st.booleans())
    @step
    async def expire(self, place: int, router: int, same_key: bool) -> None:
        """A turn past its deadline gives way to the next one, its own key's too."""
        session = await self.some(place)
        if session.holder is not None:
            return
        key = session.free_key()
        self.hold(session, await self.begin(session, router, key, ttl_s=0.0))
        await asyncio.sleep(LAPSE_S)
        next_key = key if same_key else session.free_key()
        self.hold(session, await self.begin(session, (router + 1) % NUM_ROUTERS, next_key))

    @rule(place=places, router=routers, tokens=st.lists(st.integers(0, 129_279), min_size=1, max_size=3))
    @step
    async def log_tokens(self, place: int, router: int, tokens: list[int]) -> None:
        session = await self.some(place)
        holder = await self.held(session, router)
        assert await self.log(router, holder, tokens) == (None, [1])
        holder.tokens.extend(tokens)
        session.logs[holder.turn.turn_id] = (holder.tokens, "tokens")

    @rule(place=places, router=routers, num_calls=st.sampled_from([0, 0, 1, 3]), is_repeated=st.booleans())
    @step
    async def commit_turn(self, place: int, router: int, num_calls: int, is_repeated: bool) -> None:
        session = await self.some(place)
        holder = await self.held(session, router)
        record = self.record(holder, num_calls)
        for _ in range(1 + is_repeated):
            view: Any = await self.commit(router, holder, record)
            assert view.session.head == len(session.records) + 1
        self.settle_committed(session, record)

    @rule(
        place=places,
        router=routers,
        order=st.permutations(range(3)),
        flaw=st.sampled_from(["", "", "missing", "twice", "unknown"]),
    )
    @step
    async def tool_results(self, place: int, router: int, order: list[int], flaw: str) -> None:
        """Results in any order are one turn; an incomplete set gives the session back as it was."""
        session = await self.some(place)
        if session.holder is not None:
            return
        turn = await self.begin(session, router, session.free_key())
        holder = self.hold(session, turn)
        calls = tool_calls_from_proto(holder.turn.view.session.pending_tool_calls)
        answers = [Message(role=Role.TOOL, tool_call_id=calls[i].id, content=str(i)) for i in order if i < len(calls)]
        answers = {
            "missing": answers[1:] or [Message(role=Role.USER)],
            "twice": [*answers, *answers[:1]],
            "unknown": [*answers, Message(role=Role.TOOL, tool_call_id="another")],
        }.get(flaw, answers) or [Message(role=Role.USER)]
        if flaw == "unknown" or (flaw and calls):
            with pytest.raises(SeamountError) as caught:
                check_turn(calls, answers)
            assert caught.value.reason == REFUSALS[flaw]
            await self.routers[router].abandon_turn(holder.turn)
            assert not await self.cold.read_log(self.tenant, session.id, holder.turn.turn_id)
            del session.logs[holder.turn.turn_id]
            self.release(session, "forgotten")
            return
        assert check_turn(calls, answers).generates
        holder.messages = answers
        record = self.record(holder, 0)
        await self.commit(router, holder, record)
        self.settle_committed(session, record)

    @rule(
        place=places,
        router=routers,
        status=st.sampled_from([CANCELLED, CANCELLED, DEADLINE, UNAVAILABLE]),
        miscounts=st.booleans(),
        is_repeated=st.booleans(),
    )
    @step
    async def end_turn(self, place: int, router: int, status: int, miscounts: bool, is_repeated: bool) -> None:
        """Any router cancels or fails the turn; not by an event that counts other tokens than are logged."""
        session = await self.some(place)
        holder = await self.held(session, router)
        event = final_event(status, len(holder.tokens))
        if miscounts:
            wrong_end = entry_id(len(holder.tokens) + 1)
            assert await self.fail(router, holder, event, wrong_end) == "TOKENS_LOGGED"
        for _ in range(1 + is_repeated):
            assert await self.fail(router, holder, event, holder.end) == event
        self.settle_failed(session, status, event)

    @rule(place=places, router=routers, is_repeated=st.booleans())
    @step
    async def take_over(self, place: int, router: int, is_repeated: bool) -> None:
        """A router goes on with the turn, from the tokens that are logged."""
        session = await self.some(place)
        old = await self.held(session, router)
        running = (await self.routers[router].get(self.tenant, session.id)).running
        assert running is not None
        for _ in range(1 + is_repeated):
            turn, _ = await self.routers[router].take_over(self.tenant, session.id, running)
        slower = self.routers[(router + 1) % NUM_ROUTERS]
        assert await said(slower.take_over(self.tenant, session.id, running)) == "STALE_EPOCH"
        assert (turn.turn_id, turn.key) == (old.turn.turn_id, old.turn.key)
        holder = self.hold(session, turn, old.body, old.tokens)
        holder.has_lapsed = old.has_lapsed

    @rule(place=places, router=routers, turn=places, after=places)
    @step
    async def resume(self, place: int, router: int, turn: int, after: int) -> None:
        """Any router reads the log of any turn, from any entry on."""
        session = await self.some(place)
        await self.held(session, router)
        turn_id, (tokens, kind) = list(session.logs.items())[turn % len(session.logs)]
        entries = await self.routers[router].read_log(self.tenant, session.id, turn_id)
        found = [record_pb2.LoggedTokens.FromString(entry.value) for entry in entries if entry.kind == "tokens"]
        assert [token for part in found for token in part.token_ids] == tokens
        assert (entries[0].kind, entries[-1].kind) == ("start", kind)
        after %= len(entries)
        rest = await self.routers[router].read_log(self.tenant, session.id, turn_id, after=entries[after].id)
        assert rest == entries[after + 1 :]

    @rule(which=places, router=routers, status=st.sampled_from([CANCELLED, UNAVAILABLE]))
    @step
    async def stale(self, which: int, router: int, status: int) -> None:
        """A router that has lost its turn wakes and goes on: nothing of it counts, nothing of it is delivered."""
        if not self.past:
            return
        holder = self.past[which % len(self.past)]
        current = next((one for one in self.sessions.values() if one.id == holder.session.id), None)
        fate = holder.fate if current is holder.session else "lost"
        refusal = "STALE_EPOCH" if current else "SESSION_NOT_FOUND"
        assert await self.log(router, holder, [1]) == (refusal, [])
        record, event = self.record(holder, 1), final_event(status, 77)
        if fate == "committed":
            assert holder.outcome is not None
            assert holder.outcome.record is not None
            record = holder.outcome.record
        answer: Any = await self.commit(router, holder, record)
        if fate == "committed":
            assert answer.session.head == len(holder.session.records)
        else:
            assert answer == refusal
        answer = await self.fail(router, holder, event, holder.end)
        if fate == "committed":
            assert answer == "TURN_COMMITTED"
        elif fate == "ended":
            assert holder.outcome is not None
            assert answer == holder.outcome.event
        elif current and current.holder is None and current.epoch == holder.turn.epoch:
            assert isinstance(answer, events_pb2.TurnEvent), "ended before, and forgotten"
        else:
            assert answer == refusal

    @rule(place=places, keys=st.lists(turn_keys, min_size=2, max_size=NUM_ROUTERS))
    @step
    async def begin_together(self, place: int, keys: list[str | None]) -> None:
        """Of several that ask at once, one gets the session."""
        session = await self.some(place)
        asked = [key or session.free_key() for key in keys]
        foreseen = [session.answer(key, "", None) for key in asked]
        answers = await asyncio.gather(*(self.begin(session, router, key) for router, key in enumerate(asked)))
        begun = [answer for answer in answers if isinstance(answer, BegunTurn)]
        assert len(begun) == ("begun" in foreseen)
        if begun:
            self.hold(session, begun[0])
        for key, was, answer in zip(asked, foreseen, answers, strict=True):
            if was == "replayed":
                self.check_replay(session.outcomes[key], answer)
            elif was == "begun" and answer is not begun[0]:
                same = key == begun[0].key
                assert isinstance(answer, RunningTurn) if same else answer == "TURN_IN_PROGRESS"

    @rule(place=places, router=routers, order=st.permutations(range(3)))
    @step
    async def end_together(self, place: int, router: int, order: list[int]) -> None:
        """One commits, one cancels, one takes over, at once: exactly one of them does."""
        session = await self.some(place)
        holder = await self.held(session, router)
        running = (await self.cold.get(self.tenant, session.id)).running
        assert running is not None
        record, event = self.record(holder, 0), final_event(CANCELLED, len(holder.tokens))
        calls = [
            self.commit(0, holder, record),
            self.fail(1, holder, event, holder.end),
            said(self.routers[2].take_over(self.tenant, session.id, running)),
        ]
        tasks = {index: asyncio.ensure_future(calls[index]) for index in order}
        committed, cancelled, taken = [await tasks[index] for index in range(3)]
        refused = [answer for answer in (committed, cancelled, taken) if isinstance(answer, str)]
        assert len(refused) == 2, refused
        assert set(refused) <= {"STALE_EPOCH", "TURN_COMMITTED"}
        if isinstance(taken, tuple):
            self.hold(session, taken[0], holder.body, holder.tokens).has_lapsed = holder.has_lapsed
        elif cancelled == event:
            self.settle_failed(session, CANCELLED, event)
        else:
            self.settle_committed(session, record)

    @rule(key=st.sampled_from(["s0", "s1", "s2", *["none"] * 6]), router=routers, is_repeated=st.booleans())
    @step
    async def delete(self, key: str, router: int, is_repeated: bool) -> None:
        """Not too often: histories have to grow."""
        session = self.sessions.pop(key, None)
        if session is None:
            return
        self.epochs[session.id] = session.epoch
        if session.holder is not None:
            self.release(session, "lost")
        for _ in range(1 + is_repeated):
            await self.routers[router].delete(self.tenant, session.id)
        for sessions in (*self.routers, self.cold):
            assert await said(sessions.get(self.tenant, session.id)) == "SESSION_NOT_FOUND"

    # ---- what holds after each of them

    def check_replay(self, outcome: Outcome, answer: object) -> None:
        assert isinstance(answer, ReplayedTurn), answer
        assert (answer.turn_id, answer.record, answer.final_event) == (outcome.turn_id, outcome.record, outcome.event)

    @invariant()
    @step
    async def every_session_is_as_acknowledged(self) -> None:
        """Also for a router that has cached earlier states of it."""
        self.num_steps += 1
        readers = (self.cold, self.routers[self.num_steps % NUM_ROUTERS])
        for session in self.sessions.values():
            for reader in readers:
                view, history = await reader.read(self.tenant, session.id)
                assert list(history.records) == session.records
                assert (view.session.head, view.epoch) == (len(session.records), session.epoch)
                running = session.holder.turn.turn_id if session.holder else ""
                assert view.session.running_turn_id == running
                pending = session.records[-1].pending_tool_calls if session.records else []
                assert list(view.session.pending_tool_calls) == list(pending)
        listed, _ = await self.cold.list(self.tenant)
        assert {one.id for one in listed} == {session.id for session in self.sessions.values()}

    @step
    async def teardown(self) -> None:
        """At the end of a run: every key still has the outcome that it had first."""
        for session in self.sessions.values():
            for key, outcome in session.outcomes.items():
                self.check_replay(outcome, await self.begin(session, 0, key, outcome.body))
        for sessions, token_log in zip(self.routers, self.token_logs, strict=True):
            await token_log.close()
            await sessions.close()


def test_sessions_agree_with_their_model(redis_url: str, namespace: str) -> None:
    with asyncio.Runner() as runner:
        store = runner.run(Store.open(redis_url, namespace=namespace))
        run_state_machine_as_test(
            lambda: SessionMachine(runner, store),
            settings=settings(
                max_examples=45, stateful_step_count=40, deadline=None, derandomize=True, database=None, print_blob=True
            ),
        )
        runner.run(store.close())
