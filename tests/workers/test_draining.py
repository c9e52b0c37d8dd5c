"""A leaving rank and its peers: who is asked, in which order, and what happens where one refuses or is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from seamount.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire.errors import ResourceExhausted
from seamount.wire.ids import GangId, RankId
from seamount.wire.interceptors import rank_interceptors
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Importance
from seamount.workers.draining import Draining
from seamount.workers.spec import RankSpec

SALT = b"s" * 32


class Peer(worker_pb2_grpc.WorkerServiceServicer):
    """Takes sessions over a real port; the source is told as a real one would be."""

    def __init__(self, source: Reservations) -> None:
        self.source = source
        self.refuses = False
        self.is_complete = True
        self.calls: list[Any] = []
        self.address = ""
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def Reserve(self, request: Any, context: Any) -> worker_pb2.ReserveResponse:
        self.calls.append(request)
        if self.refuses:
            raise ResourceExhausted("no pages", reason="NO_PAGES", retry_after_s=0.1)
        return worker_pb2.ReserveResponse(reservation_id=request.session_id)

    async def Migrate(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.MigrateResponse]:
        self.calls.append(request)
        yield worker_pb2.MigrateResponse(progress=worker_pb2.MigrateProgress())
        await self.goes_on.wait()
        if self.is_complete:
            self.source.handover.give_up(request.reservation_id, request.epoch)
        finished = worker_pb2.MigrateFinished(num_migrated_tokens=16, cached_len=16, is_complete=self.is_complete)
        yield worker_pb2.MigrateResponse(finished=finished)

    async def Release(self, request: Any, context: Any) -> worker_pb2.ReleaseResponse:
        self.calls.append(request)
        return worker_pb2.ReleaseResponse()

    async def Retain(self, request: Any, context: Any) -> worker_pb2.RetainResponse:
        self.calls.append(request)
        return worker_pb2.RetainResponse(outcome=common_pb2.LEASE_OUTCOME_ACCEPTED)


@pytest.fixture
def caches() -> Reservations:
    return Reservations(num_pages=64, page_size=4, fingerprint="f", layout="l")


@pytest.fixture
async def peers(caches: Reservations) -> AsyncIterator[list[Peer]]:
    async with AsyncExitStack() as stack:
        made = [Peer(caches) for _ in range(2)]
        for peer in made:
            server = grpc.aio.server(interceptors=rank_interceptors(None))
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(peer, server)
            peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, 0)
        yield made


@pytest.fixture
def draining(caches: Reservations) -> Draining:
    spec = RankSpec(
        rank_id=RankId("leaving"),
        gang_id=GangId("g"),
        pool="decode",
        gang_rank=0,
        gang_size=1,
        model_path=Path(),
        layout="l",
        dtype="float32",
        num_pages=64,
        max_batch_tokens=128,
        prefill_chunk_tokens=64,
        max_running=16,
        max_context_tokens=4096,
        step_timeout_s=5.0,
    )
    return Draining(
        spec=spec, reservations=caches, active=set(), abort=lambda _: None, metadata=(), address="127.0.0.1:1"
    )


def turn(caches: Reservations, session: str, *, epoch: int = 1) -> Any:
    first = 100 * (1 + ord(session))
    reservation = caches.reserve(
        session_id=session,
        turn_id="t",
        epoch=epoch,
        attempt=1,
        salt=SALT,
        token_ids=range(first, first + 18),
        time_to_live_s=30.0,
    )
    caches.advance(reservation.id, 18)
    return reservation


def leave(caches: Reservations, *sessions: str) -> None:
    for number, session in enumerate(sessions):
        caches.release(turn(caches, session, epoch=number + 1).id, 18)


def request(peers: list[Peer], *usable: int) -> worker_pb2.DrainRequest:
    return worker_pb2.DrainRequest(
        peers=[
            worker_pb2.DrainPeer(rank_id=f"peer{number}", address=peer.address, num_usable_pages=pages)
            for number, (peer, pages) in enumerate(zip(peers, usable, strict=True))
        ]
    )


async def moved(draining: Draining, asked: worker_pb2.DrainRequest) -> list[tuple[str, str]]:
    async with asyncio.timeout(10):
        return [(one.session_id, one.rank_id) async for one in draining.run(asked) if one.session_id]


async def test_leased_sessions_go_first_each_to_the_peer_with_most_room(
    caches: Reservations, peers: list[Peer], draining: Draining
) -> None:
    leave(caches, "a", "b", "c")
    caches.sessions.retain("a", duration_s=30.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    assert await moved(draining, request(peers, 100, 101)) == [("a", "peer1"), ("c", "peer0"), ("b", "peer1")]
    assert draining.has_begun
    assert caches.state().num_free == 64
    reserved, asked, released, retained = peers[1].calls[:4]
    assert (reserved.session_id, reserved.epoch, reserved.cache_salt, len(reserved.token_ids)) == ("a", 1, SALT, 17)
    assert (asked.source_rank_id, asked.source_address, asked.epoch) == ("leaving", "127.0.0.1:1", 1)
    assert released.keep_len == 16
    assert 0 < retained.duration.ToNanoseconds() / 1e9 <= 30


async def test_a_peer_that_refuses_is_passed_over(caches: Reservations, peers: list[Peer], draining: Draining) -> None:
    leave(caches, "a", "b")
    peers[0].refuses = True
    assert await moved(draining, request(peers, 1000, 10)) == [("b", "peer1"), ("a", "peer1")]


async def test_what_nobody_takes_whole_stays_and_the_drain_ends(
    caches: Reservations, peers: list[Peer], draining: Draining
) -> None:
    leave(caches, "a")
    peers[0].refuses = True
    peers[1].is_complete = False
    assert await moved(draining, request(peers, 10, 10)) == []
    assert [left.session_id for left in caches.handover.left_behind()] == ["a"]
    dead = worker_pb2.DrainRequest(peers=[worker_pb2.DrainPeer(rank_id="dead", address="127.0.0.1:1")])
    assert await moved(draining, dead) == []
    assert await moved(draining, worker_pb2.DrainRequest()) == []


async def test_a_turn_that_runs_is_waited_for(caches: Reservations, peers: list[Peer], draining: Draining) -> None:
    running = turn(caches, "a")
    task = asyncio.create_task(moved(draining, request(peers, 10, 10)))
    await asyncio.sleep(0.1)
    assert not task.done()
    caches.release(running.id, 18)
    assert [session for session, _ in await task] == ["a"]


async def test_turns_are_ended_when_their_time_is_over_and_their_routers_fetch_them(
    draining: Draining, caches: Reservations, peers: list[Peer]
) -> None:
    running = turn(caches, "a")
    draining.active.add(running.id)
    ended: list[str] = []

    def abort(reservation_id: str) -> None:
        ended.append(reservation_id)
        draining.active.discard(reservation_id)
        caches.release(reservation_id, 18)  # as its router does

    draining.abort = abort
    asked = request(peers, 10, 10)
    asked.turns_time.FromMilliseconds(1)  # no less than a second: routers must have heard that it leaves
    begun = asyncio.get_running_loop().time()
    task = asyncio.create_task(moved(draining, asked))
    while not ended:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - begun >= 1.0
    await asyncio.sleep(0.3)
    assert not task.done()
    assert peers[0].calls == peers[1].calls == []  # it is left to its router
    caches.handover.give_up("a", 1)  # who fetches it
    assert await task == []
    assert ended == [running.id]


async def test_what_no_router_fetches_is_handed_over_after_a_while(
    draining: Draining, caches: Reservations, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seamount.workers.draining.FETCHED_WITHIN_S", 0.3)
    draining.active.add(turn(caches, "a").id)

    def abort(reservation_id: str) -> None:
        draining.active.discard(reservation_id)
        caches.release(reservation_id, 18)

    draining.abort = abort
    asked = request(peers, 10, 20)
    asked.turns_time.FromMilliseconds(1)
    assert await moved(draining, asked) == [("a", "peer1")]


async def test_a_drain_shows_that_the_rank_is_alive_while_a_long_session_moves(
    draining: Draining, caches: Reservations, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does one that waits for another drain of the rank: routers take silence for death."""
    monkeypatch.setattr("seamount.workers.draining.KEEP_ALIVE_S", 0.01)
    leave(caches, "a")
    peers[0].goes_on.clear()
    streams = [draining.run(request(peers, 9, 8)) for _ in range(2)]
    async with asyncio.timeout(10):
        for stream in streams:
            for _ in range(3):
                assert await anext(stream) == worker_pb2.DrainResponse()
        peers[0].goes_on.set()
        told = [[response async for response in stream if response.session_id] for stream in streams]
    assert [[response.session_id for response in one] for one in told] == [["a"], []]
