"""A router dies, or falls silent, at any step of a turn: another one goes on with it, and what the first one says when
it wakes is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
import pytest

from harness.listener import Reached
from harness.points import points, sample
from harness.recording import RecordingClient
from harness.recoveries import Promise
from harness.redis_proxy import Command
from harness.requests import LONG, NUM_TOKENS, SEEDED, request
from harness.system import CHUNK_TOKENS, Answer, FaultSystem, Request
from seamount.router.client import user
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import session_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire.errors import NotFound

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.cluster]

STEPS = [
    ("router.begun", 0),
    *(("router.append", num_tokens) for num_tokens in range(0, NUM_TOKENS, 3)),
    *(("router.appended", num_tokens) for num_tokens in range(0, NUM_TOKENS, 3)),
    ("router.commit", NUM_TOKENS),
    ("router.committed", NUM_TOKENS),
]
WRITES = [step for step in STEPS if step[0] in ("router.append", "router.commit")]
"""Where something was read and is about to be written."""
ENDED = ("router.commit", 1, "tool call")
"""Of an answer that has ended with an EOS: whoever takes it over has nothing left to sample."""


def reaches(num_tokens: int) -> Callable[[Reached], bool]:
    """At a log entry up to so many tokens, or more; where there is no log entry, at once."""
    return lambda reached: "-" not in reached.at or int(reached.at.partition("-")[0]) >= num_tokens


def refused(system: FaultSystem, answer: Answer) -> list[Command]:
    """Writes to the answer's session that Redis refused as another epoch's."""
    session_id = answer.session.id.encode()
    return [
        command
        for proxy in system.proxies.values()
        for command in proxy.seen
        if command.reply == b"STALE" and any(session_id in part for part in command.arguments)
    ]


@points("point,num_tokens", STEPS, seeded=2)
async def test_killed_at_a_step(system: FaultSystem, point: str, num_tokens: int) -> None:
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        trap = system.listener.stop_at(point, reaches(num_tokens))
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        before = await system.num_computed()
        assert (await system.kill(paused.pid)) == "router-0"
        killed_at = time.monotonic()
        await answer.task
        system.recoveries.note(Promise.ROUTER_KILLED, client.told.silence_s(killed_at))
        if num_tokens:  # the decode rank lives, and has all of it but what was not logged
            assert await system.num_computed_since(before) <= 2 * NUM_TOKENS
        await system.check(answer, asked)


@points("num_tokens", sample(range(NUM_TOKENS), 6), seeded=1)
async def test_killed_with_its_client(system: FaultSystem, num_tokens: int) -> None:
    """Whoever asks later hears all of it."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        trap = system.listener.stop_at("router.appended", reaches(num_tokens))
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        answer.task.cancel()
        await system.kill(paused.pid)
    (begun,) = [command for command in system.proxies["router-0"].seen if command.name == "begin_turn"]
    turn_id = begun.arguments[_TURN].decode()
    async with RecordingClient(system.addresses(1)) as later:
        assert [event.sequence async for event in later.resume_turn(answer.session.id, turn_id)]
        answer.client = later
        await system.check(answer, asked)


_TURN = 13
"""Of begin_turn's arguments."""
_DEAD_EPOCH = 11
"""Of take_over_turn's."""


@points("point,num_tokens,name", [*((*step, "seeded") for step in sample(WRITES, 6)), ENDED], seeded=1)
async def test_stopped_before_a_write_and_continued(
    system: FaultSystem, tokenizer: Tokenizer, point: str, num_tokens: int, name: str
) -> None:
    asked = await system.afresh(request(name, tokenizer))
    async with (
        RecordingClient(system.addresses(), forced=asked.forced) as client,
        RecordingClient(system.addresses(1)) as other,
    ):
        trap = system.listener.stop_at(point, reaches(num_tokens))
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        async with system.stopped(paused.pid):
            stopped_at = time.monotonic()
            elsewhere = other.resume_turn(answer.session.id, await turn_id_of(system, answer))
            assert [event async for event in elsewhere][-1].finished.receipt.num_retries >= 1
            system.recoveries.note(Promise.ROUTER_HUNG, other.told.silence_s(stopped_at))
            await answer.task  # its router says nothing any more; the client finds the other one
            if num_tokens:
                system.recoveries.note(Promise.ROUTER_HUNG_OWN, client.told.silence_s(stopped_at))
            await refused_by_ranks(system, answer, asked)
        paused.go_on()
        async with asyncio.timeout(10):
            while not refused(system, answer):  # noqa: ASYNC110 - of a process that just woke
                await asyncio.sleep(0.02)
        await system.check(answer, asked)


async def turn_id_of(system: FaultSystem, answer: Answer) -> str:
    """Also of a turn whose client has heard nothing yet."""
    return argument(system, answer, "begin_turn", _TURN)


def argument(system: FaultSystem, answer: Answer, name: str, place: int) -> str:
    """Of the first such command about the answer's session."""
    session_id = answer.session.id.encode()
    found = [c for p in system.proxies.values() for c in p.seen if c.name == name and session_id in c.arguments]
    return found[0].arguments[place].decode()


async def refused_by_ranks(system: FaultSystem, answer: Answer, asked: Request) -> None:
    """The epoch that was taken over from reserves nothing any more at the rank that serves the turn."""
    rank = answer.client.told.events[-1].finished.receipt.decode_rank
    (address,) = [record.address for record, _ in (await system.directory.read()).values() if record.peer_id == rank]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        stale = worker_pb2.ReserveRequest(
            session_id=answer.session.id,
            turn_id=answer.turn_id,
            epoch=int(argument(system, answer, "take_over_turn", _DEAD_EPOCH)),
            attempt=9,
            cache_salt=bytes(32),
            token_ids=[1],
        )
        stale.time_to_live.FromSeconds(1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Reserve(stale, timeout=5)
        assert caught.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.faults
async def test_stopped_between_looking_at_a_turn_and_taking_it(system: FaultSystem) -> None:
    """Two routers find a turn without a router; the slower one is refused when it comes to take it."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        begun = system.listener.stop_at("router.appended", reaches(5))
        taking = system.listener.stop_at("router.take_over")
        answer = await system.begin(client, asked)
        await system.kill((await begun.wait()).pid)
        slow = await taking.wait()
        async with system.stopped(slow.pid):
            await system.cluster.start_router(0)
            system.forget_killed("router-0")
            async with RecordingClient(system.addresses(0)) as other:
                elsewhere = other.resume_turn(answer.session.id, await turn_id_of(system, answer))
                assert [event async for event in elsewhere][-1].HasField("finished")
        slow.go_on()
        await answer.task
        async with asyncio.timeout(10):
            while not refused(system, answer):  # noqa: ASYNC110 - of a process that just woke
                await asyncio.sleep(0.02)
        assert [command.name for command in refused(system, answer)] == ["take_over_turn"]
        await system.check(answer, asked)


@pytest.mark.faults
async def test_killed_after_taking_a_turn(system: FaultSystem) -> None:
    """Taken under a new epoch, and nobody works on it: the next router finds it all the same."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses()) as client:
        begun = system.listener.stop_at("router.appended", reaches(5))
        taken = system.listener.stop_at("router.taken")
        answer = await system.begin(client, asked)
        await system.kill((await begun.wait()).pid)
        await system.kill((await taken.wait()).pid)
        answer.task.cancel()
        turn_id = await turn_id_of(system, answer)
        await system.restore()
    async with RecordingClient(system.addresses(0)) as later:
        assert [event async for event in later.resume_turn(answer.session.id, turn_id)]
        answer.client = later
        await system.check(answer, asked)


@pytest.mark.faults
async def test_a_cancellation_that_comes_too_late(system: FaultSystem) -> None:
    """Read as running, ended by its own router before the cancellation is written: it was not cancelled."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses(0)) as client, RecordingClient(system.addresses(1)) as other:
        running = system.listener.stop_at("router.appended", reaches(20))
        ending = system.listener.stop_at("router.end_read")
        answer = await system.begin(client, asked)
        held = await running.wait()
        cancelling = asyncio.create_task(other.cancel_turn(answer.session.id, answer.turn_id))
        late = await ending.wait()
        held.go_on()
        await answer.task
        late.go_on()
        assert not await cancelling
        await system.check(answer, asked)


@pytest.mark.faults
async def test_a_cancellation_elsewhere_ends_the_turn_at_its_router(system: FaultSystem) -> None:
    """Of two ends that race one is stored, and all who listen hear that one."""
    asked = LONG
    async with (
        RecordingClient(system.addresses(0), forced=asked.forced) as client,
        RecordingClient(system.addresses(1)) as other,
    ):
        running = system.listener.stop_at("router.append", reaches(20))
        answer = await system.begin(client, asked)
        held = await running.wait()
        assert await other.cancel_turn(answer.session.id, answer.turn_id)
        held.go_on()
        await answer.task
        told = client.told.events
        assert [event async for event in other.resume_turn(answer.session.id, answer.turn_id)] == told
        assert (await other.get_session(answer.session.id)).head == 0
        assert (await other.get_session(answer.session.id)).state == session_pb2.SESSION_STATE_IDLE


@pytest.mark.faults
async def test_a_client_that_leaves_frees_its_pages(system: FaultSystem) -> None:
    async with RecordingClient(system.addresses(), forced=LONG.forced) as client:
        session = await client.create_session()
        stream = client.run_turn(session.id, [user("go")], sampling=LONG.sampling, cancel_on_disconnect=True)
        for _ in range(5):
            await anext(stream)
        await stream.aclose()
        left_at = time.monotonic()
        await system.check_caches()
        system.recoveries.note(Promise.CLIENT_GONE, time.monotonic() - left_at)


@pytest.mark.faults
@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_an_end_elsewhere_frees_what_stands_still(system: FaultSystem, end: str) -> None:
    """The turn is in its prefill, its router has nothing to log, and so nothing to be refused for."""
    asked = await system.afresh(SEEDED)
    async with RecordingClient(system.addresses(0)) as client, RecordingClient(system.addresses(1)) as other:
        trap = system.listener.stop_at("rank.frame", lambda reached: reached.at == f"0:{CHUNK_TOKENS}")
        answer = await system.begin(client, asked)
        paused = await trap.wait()
        await asyncio.sleep(0.2)
        ended_at = time.monotonic()
        if end == "cancel":
            assert await other.cancel_turn(answer.session.id, await turn_id_of(system, answer))
        else:
            await other.delete_session(answer.session.id)
        await asyncio.wait({answer.task})
        assert answer.task.exception() is None or isinstance(answer.task.exception(), NotFound)
        paused.go_on()
        await system.check_caches()
        system.recoveries.note(Promise.CLIENT_GONE, time.monotonic() - ended_at)
