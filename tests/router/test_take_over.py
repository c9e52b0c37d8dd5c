"""A turn told by two routers: resumed anywhere, taken over under way, with the same events in every place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from harness.requests import CALL, forced
from seamount.router.directory import Beat, Liveness, PeerRecord, Role
from seamount.router.running_index import IndexedTurn
from seamount.router.store import Store
from seamount.router.take_over import OwnerJudge, TakeOver
from seamount.router.tokenizer import Tokenizer
from seamount.router.turns import Turns
from seamount.router.watcher import DirectoryWatcher
from seamount.v1 import common_pb2, events_pb2, session_pb2, worker_pb2
from seamount.wire.errors import NotFound, OutOfRange, SeamountError, Unavailable
from seamount.wire.ids import RouterId, SessionId, TenantId, TurnId

ALICE = TenantId("alice")
NUM_TOKENS = 12
MakeTurns = Callable[[str], Turns]


@pytest.fixture
async def make(store: Store, system: Any, tokenizer: Tokenizer, make_turns: Any) -> AsyncIterator[MakeTurns]:
    made: list[Turns] = []

    def one(name: str, **changes: Any) -> Turns:
        made.append(make_turns(store, system, tokenizer, name, **changes))
        return made[-1]

    yield one
    for turns in made:
        await turns.stop(0.0)
        await turns.sessions.close()
        turns.rendering.close()


class Pausing:
    """A rank that gives some tokens to the first call and then only shows that it lives, until it may go on."""

    def __init__(self, rank: Any, num_tokens: int) -> None:
        self._rank = rank
        self._num_tokens = num_tokens
        self.go_on = asyncio.Event()
        rank.on_generate = self.generate

    async def generate(self, asked: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        num_sent = 0
        is_first = len(self._rank.generated) == 1
        async for frame in self._rank.tokens(asked):
            while is_first and num_sent >= self._num_tokens and not self.go_on.is_set():
                yield worker_pb2.WorkerServiceGenerateResponse(progress=worker_pb2.GenerateProgress())
                await asyncio.sleep(0.02)
            num_sent += 1
            yield frame


async def session(turns: Turns, **sampling: Any) -> SessionId:
    request = session_pb2.CreateSessionRequest()
    request.defaults.max_output_tokens = NUM_TOKENS
    made = await turns.sessions.create(ALICE, request, model="m")
    return SessionId(made.id)


def request(session_id: SessionId, **fields: Any) -> session_pb2.RunTurnRequest:
    made = session_pb2.RunTurnRequest(session_id=session_id, idempotency_key="k", **fields)
    made.messages.add(role=common_pb2.ROLE_USER, content="hi")
    return made


async def follow(stream: Any, after: int = 0) -> list[events_pb2.TurnEvent]:
    async with asyncio.timeout(10):
        told = [event async for batch in stream.follow(after) for event in batch]
    assert [event.sequence for event in told] == list(range(after + 1, after + 1 + len(told)))
    return told


def text(told: list[events_pb2.TurnEvent]) -> str:
    return "".join(event.reasoning_delta.text + event.content_delta.text for event in told)


async def running_turn(turns: Turns, session_id: SessionId) -> IndexedTurn:
    running = (await turns.sessions.get(ALICE, session_id)).running
    assert running is not None
    return IndexedTurn(owner=running.owner, tenant=ALICE, session_id=session_id, turn_id=running.turn_id)


async def undisturbed(turns: Turns) -> str:
    return text(await follow(await turns.open(ALICE, request(await session(turns)))))


async def test_another_router_tells_a_running_turn_live_and_from_any_event(make: MakeTurns, system: Any) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    pausing, session_id = Pausing(rank, 5), await session(a)
    stream = await a.open(ALICE, request(session_id))
    await system.until(lambda: stream.last_sequence == 6)  # started, five tokens
    turn = await running_turn(a, session_id)
    elsewhere = await b.resume(ALICE, session_id, turn.turn_id)
    attached = await b.open(ALICE, request(session_id))
    assert attached is elsewhere, "a turn is followed once, whoever listens"
    following = [asyncio.create_task(follow(elsewhere, after)) for after in (0, 3)]
    await system.until(lambda: elsewhere.last_sequence == 6)
    pausing.go_on.set()
    told = await follow(stream)
    assert await asyncio.gather(*following) == [told, told[3:]]
    assert told[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("num_before", range(NUM_TOKENS + 1))
async def test_a_turn_goes_on_at_the_router_that_takes_it_over(make: MakeTurns, system: Any, num_before: int) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    expected = await undisturbed(a)
    rank.generated.clear()
    pausing, session_id = Pausing(rank, num_before), await session(a)
    stream = await a.open(ALICE, request(session_id))
    await system.until(lambda: rank.generated and stream.last_sequence == num_before + 1)
    at_old_owner = asyncio.create_task(follow(stream))
    assert await b.take_over(await running_turn(a, session_id))
    told = await follow(await b.resume(ALICE, session_id, (await first_turn(b, session_id))))
    assert text(told) == expected
    if num_before < NUM_TOKENS:
        assert rank.generated[-1].sampling.first_output_index == num_before, "nothing is sampled twice"
    assert rank.reserved[-1].epoch == rank.reserved[-2].epoch + 1, "the rank refuses the old owner, too"
    pausing.go_on.set()  # the old owner wakes, is refused, and tells its clients what the new one says
    assert await at_old_owner == told
    view, history = await b.sessions.read(ALICE, session_id)
    assert (view.session.head, view.running) == (1, None)
    assert history.records[0].receipt.num_retries == 1
    await b.sessions.close()
    await system.until(lambda: a.num_running == 0)


class HeldCommit:
    """A router that has logged a whole answer stands still before its commit, until it may go on."""

    def __init__(self, turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.go_on = asyncio.Event(), asyncio.Event()
        self._commit = turns.sessions.commit_turn
        monkeypatch.setattr(turns.sessions, "commit_turn", self._held)

    async def _held(self, *args: Any, **options: Any) -> Any:
        self.is_reached.set()
        await self.go_on.wait()
        return await self._commit(*args, **options)


def answers(rank: Any, token_ids: list[int], system: Any) -> None:
    """The rank says these from now on."""

    async def generate(asked: worker_pb2.WorkerServiceGenerateRequest) -> AsyncIterator[Any]:
        for index in range(asked.sampling.first_output_index, len(token_ids)):
            yield system.token_frame(token_ids[index], index)
        yield system.finished_frame(common_pb2.FINISH_REASON_STOP)

    rank.on_generate = generate


async def test_an_answer_that_was_over_keeps_its_rank_and_gets_its_lease(
    make: MakeTurns, system: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool call, logged up to its EOS: nothing is left to sample, and the caches are where they were."""
    said = [*forced(CALL, tokenizer), tokenizer.eos_token_id]
    ranks = {name: await system.add(name) for name in ("decode-a", "decode-b")}
    for rank in ranks.values():
        answers(rank, said, system)
    a, b = make("router-a"), make("router-b")
    held, session_id = HeldCommit(a, monkeypatch), await session(a)
    asked = request(session_id)
    asked.sampling.max_output_tokens = 2 * len(said)
    at_old_owner = asyncio.create_task(follow(await a.open(ALICE, asked)))
    await held.is_reached.wait()
    (home,) = [rank for rank in ranks.values() if rank.generated]
    home.retained.clear()
    assert await b.take_over(await running_turn(a, session_id))
    told = await follow(await b.resume(ALICE, session_id, await first_turn(b, session_id)))
    assert told[-1].finished.reason == common_pb2.FINISH_REASON_TOOL_CALLS
    assert told[-1].finished.receipt.decode_rank == home.rank_id
    assert len(home.generated) == 1, "nothing is sampled again"
    assert home.reserved[-1].epoch == home.reserved[0].epoch + 1, "the rank refuses the old owner, too"
    view, history = await b.sessions.read(ALICE, session_id)
    assert view.last_rank == home.rank_id
    assert [lease.epoch for lease in home.retained] == [view.epoch]
    assert view.lease is not None
    await system.until(lambda: home.released)
    assert home.released[0].keep_len == history.records[0].num_prompt_tokens + len(said)
    held.go_on.set()
    assert await at_old_owner == told


@pytest.mark.parametrize("ends", ["by EOS", "by its length"])
async def test_an_answer_that_was_over_needs_no_rank(
    make: MakeTurns, system: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    rank = await system.add("decode-a")
    said = [*tokenizer.encode("well"), tokenizer.eos_token_id] if ends == "by EOS" else [ord("w")] * NUM_TOKENS
    answers(rank, said, system)
    a, b = make("router-a"), make("router-b")
    held, session_id = HeldCommit(a, monkeypatch), await session(a)
    at_old_owner = asyncio.create_task(follow(await a.open(ALICE, request(session_id))))
    await held.is_reached.wait()
    rank.die()
    await system.until(lambda: system.ranks.load("decode-a") is None)
    assert await b.take_over(await running_turn(a, session_id))
    told = await follow(await b.resume(ALICE, session_id, await first_turn(b, session_id)))
    reason = common_pb2.FINISH_REASON_STOP if ends == "by EOS" else common_pb2.FINISH_REASON_LENGTH
    assert told[-1].finished.reason == reason
    view, history = await b.sessions.read(ALICE, session_id)
    assert list(history.records[0].output.token_ids) == said
    assert view.last_rank == "decode-a", "where the caches were: what the next turn misses was lost with that rank"
    held.go_on.set()
    assert await at_old_owner == told


async def first_turn(turns: Turns, session_id: SessionId) -> TurnId:
    """Of a session with one turn, wherever that stands."""
    view, history = await turns.sessions.read(ALICE, session_id)
    if history.records:
        return TurnId(history.records[0].turn_id)
    assert view.running is not None
    return view.running.turn_id


async def test_a_committed_turn_is_resumed_from_its_log_and_then_from_the_history(
    make: Any, system: Any, store: Store
) -> None:
    await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    session_id = await session(a)
    told = await follow(await a.open(ALICE, request(session_id)))
    turn_id = await first_turn(b, session_id)
    for _ in range(2):
        for after in (0, 4, len(told)):
            assert await follow(await b.resume(ALICE, session_id, turn_id), after) == told[after:]
        with pytest.raises(OutOfRange):
            await follow(await b.resume(ALICE, session_id, turn_id), len(told) + 1)
        (log,) = await store.command("KEYS", store.key("*:log:*")) or [b""]
        await store.command("DEL", log or b"none")
    with pytest.raises(NotFound):
        await b.resume(ALICE, session_id, TurnId("turn_unknown"))
    with pytest.raises(NotFound):
        await b.resume(TenantId("bob"), session_id, turn_id)


async def test_a_turn_cancelled_elsewhere_ends_alike_everywhere(make: MakeTurns, system: Any) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    pausing, session_id = Pausing(rank, 5), await session(a)
    stream = await a.open(ALICE, request(session_id))
    await system.until(lambda: stream.last_sequence == 6)
    turn = await running_turn(a, session_id)
    elsewhere = asyncio.create_task(follow(await b.resume(ALICE, session_id, turn.turn_id)))
    assert await b.cancel(ALICE, session_id, turn.turn_id)
    pausing.go_on.set()
    told = await follow(stream)
    assert told[-1].finished.reason == common_pb2.FINISH_REASON_CANCELLED
    assert await elsewhere == told
    assert await follow(await b.resume(ALICE, session_id, turn.turn_id), 2) == told[2:]
    assert await follow(await b.open(ALICE, request(session_id))) == told


async def test_a_deleted_session_ends_what_follows_it(make: MakeTurns, system: Any) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    Pausing(rank, 5)
    session_id = await session(a)
    stream = await a.open(ALICE, request(session_id))
    await system.until(lambda: stream.last_sequence == 6)
    turn = await running_turn(a, session_id)
    elsewhere = asyncio.create_task(follow(await b.resume(ALICE, session_id, turn.turn_id)))
    await asyncio.sleep(0.1)
    await a.delete(ALICE, session_id)
    with pytest.raises(NotFound):
        await elsewhere


@pytest.mark.parametrize("policy", ["DISCONNECT_POLICY_FINISH", "DISCONNECT_POLICY_CANCEL"])
async def test_what_becomes_of_a_turn_whose_client_goes_away(make: MakeTurns, system: Any, policy: Any) -> None:
    rank = await system.add("decode-a")
    turns = make("router-a")
    pausing, session_id = Pausing(rank, 5), await session(turns)
    stream = await turns.open(ALICE, request(session_id, on_disconnect=policy))
    followers = [asyncio.create_task(follow(stream)) for _ in range(2)]
    await system.until(lambda: stream.last_sequence == 6)
    followers[0].cancel()
    await asyncio.sleep(0.05)
    assert turns.num_running == 1, "one client is left"
    followers[1].cancel()
    if policy == "DISCONNECT_POLICY_CANCEL":
        await system.until(lambda: turns.num_running == 0)
        assert len(rank.released) == 1
    pausing.go_on.set()
    await system.until(lambda: turns.num_running == 0)
    told = await follow(await turns.open(ALICE, request(session_id, on_disconnect=policy)))
    reason = "CANCELLED" if policy == "DISCONNECT_POLICY_CANCEL" else "LENGTH"
    assert common_pb2.FinishReason.Name(told[-1].finished.reason) == f"FINISH_REASON_{reason}"


async def test_a_turn_whose_deadline_passed_with_its_router_fails_for_good(
    make: MakeTurns, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    Pausing(rank, 3)
    session_id = await session(a)
    asked = request(session_id)
    asked.deadline.FromMilliseconds(600)
    stream = await a.open(ALICE, asked)
    await system.until(lambda: stream.last_sequence == 4)
    turn = await running_turn(a, session_id)

    async def silent(*args: Any, **options: Any) -> Any:
        raise Unavailable("no answer", reason="STORE_UNAVAILABLE", retry_after_s=1.0)

    monkeypatch.setattr(a.sessions, "fail_turn", silent)
    with pytest.raises(Unavailable):
        await follow(stream)
    assert await b.take_over(turn)
    told = await follow(await b.resume(ALICE, session_id, turn.turn_id))
    assert "deadline" in told[-1].failed.status.message


async def test_the_look_out_takes_the_turns_of_the_dead_alone(make: MakeTurns, system: Any) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    Pausing(rank, 2)
    dead, living = await session(a), await session(b)
    stream = await a.open(ALICE, request(dead))
    await system.until(lambda: stream.last_sequence == 3)
    await follow(await b.open(ALICE, request(living)))
    look_out = TakeOver(
        router_id=RouterId("router-b"),
        index=b.sessions.index,
        turns=b,
        watcher=system.watcher,
        judge=OwnerJudge(absent_after_s=0.3),
    )
    assert await look_out.scan() == 0, "who has just left the directory may be about to come"
    await asyncio.sleep(0.4)
    turn = await running_turn(a, dead)
    assert await look_out.scan() == 1
    (taken,) = b.metrics.take_overs.collect()
    assert [sample.value for sample in taken.samples] == [1.0]
    told = await follow(await b.resume(ALICE, dead, turn.turn_id))
    assert told[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH
    await b.sessions.close()
    assert await look_out.scan() == 0
    assert await b.sessions.index.owners() == [], "what the dead left in the index is gone"


async def test_what_a_router_begins_when_it_wakes_is_its_own(make: MakeTurns, system: Any) -> None:
    rank = await system.add("decode-a")
    a, b, now = make("router-a"), make("router-b"), 0.0
    await system.directory.register(
        PeerRecord(peer_id="router-a", role=Role.ROUTER, address="127.0.0.1:1", version="0", process_id=1, instance="i")
    )
    watcher = DirectoryWatcher(system.directory, dead_after_s=3.0, poll_interval_s=3600.0, clock=lambda: now)
    await watcher.start()
    look_out = TakeOver(
        router_id=RouterId("router-b"),
        index=b.sessions.index,
        turns=b,
        watcher=watcher,
        judge=OwnerJudge(absent_after_s=60.0),
    )
    for _ in range(4):
        assert watcher.liveness("router-a") is Liveness.ALIVE
        now += 0.9
        assert await watcher.look()
    assert watcher.liveness("router-a") is Liveness.DEAD
    pausing, session_id = Pausing(rank, 2), await session(a)
    stream = await a.open(ALICE, request(session_id))
    await system.until(lambda: stream.last_sequence == 3)
    assert await system.directory.beat("router-a", Beat(instance="i", counter=1))
    assert await look_out.scan() == 0, "it has beaten since the last poll"
    pausing.go_on.set()
    assert (await follow(stream))[-1].finished.receipt.num_retries == 0
    await watcher.stop()


async def test_the_look_out_finds_turns_of_its_own_router_that_nobody_works_on(make: MakeTurns, system: Any) -> None:
    rank = await system.add("decode-a")
    a = make("router-a")
    session_id = await session(a)
    checked = await a.admission.check(request(session_id), ())
    await a.admission.begin(ALICE, checked)  # and its answer is lost
    turn = await running_turn(a, session_id)
    pausing, working = Pausing(rank, 2), await session(a)
    stream = await a.open(ALICE, request(working))
    await system.until(lambda: stream.last_sequence == 3)
    look_out = TakeOver(
        router_id=RouterId("router-a"),
        index=a.sessions.index,
        turns=a,
        watcher=system.watcher,
        judge=OwnerJudge(absent_after_s=60.0),
    )
    assert await look_out.scan() == 0, "it may be about to run"
    assert await look_out.scan() == 1
    told = await follow(await a.resume(ALICE, session_id, turn.turn_id))
    assert told[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH
    await a.sessions.close()
    assert await look_out.scan() == 0
    (left,) = await a.sessions.index.turns_of(RouterId("router-a"))
    assert left.session_id == working, "who works on stays to be found"
    pausing.go_on.set()
    await follow(stream)


def test_owners_are_gone_when_dead_or_absent_for_long() -> None:
    now = 0.0
    judge = OwnerJudge(absent_after_s=3.0, clock=lambda: now)
    owner = RouterId("r")
    assert judge.is_gone(owner, Liveness.DEAD)
    assert not judge.is_gone(owner, Liveness.UNKNOWN)
    assert not judge.is_gone(owner, Liveness.ABSENT)
    now = 2.9
    assert not judge.is_gone(owner, Liveness.ABSENT)
    assert not judge.is_gone(owner, Liveness.ALIVE)
    now = 4.0
    assert not judge.is_gone(owner, Liveness.ABSENT), "counted from the last time it was there"
    now = 7.0
    assert judge.is_gone(owner, Liveness.ABSENT)


async def test_what_cannot_go_on_fails(make: MakeTurns, system: Any, store: Store) -> None:
    rank = await system.add("decode-a")
    a, b = make("router-a"), make("router-b")
    Pausing(rank, 3)
    session_id = await session(a)
    stream = await a.open(ALICE, request(session_id))
    await system.until(lambda: stream.last_sequence == 4)
    turn = await running_turn(a, session_id)
    await store.command("XADD", store.key(f"{{alice/{session_id}}}", "log", turn.turn_id), "3-9", "nonsense", b"x")
    with pytest.raises(SeamountError):
        await b.take_over(turn)
    assert (await b.sessions.get(ALICE, session_id)).running is None
