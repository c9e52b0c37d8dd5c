"""Work ahead of time at one rank: a real engine and its caches."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from seamount.v1 import worker_pb2
from seamount.wire.errors import ResourceExhausted
from seamount.workers.ahead import Ahead
from seamount.workers.requests import SamplingParams

SALT = bytes(range(32))
MakeRank = Callable[..., Any]


@pytest.fixture
async def make_ahead(make_rank: MakeRank) -> AsyncIterator[Callable[..., tuple[Any, Ahead]]]:
    made: list[Ahead] = []

    def make(**settings: Any) -> tuple[Any, Ahead]:
        rank = make_rank(**settings)
        ahead = Ahead(reservations=rank.reservations, engine=rank.engine)
        rank.reservations.on_abort = rank.engine.abort
        ahead.start()
        made.append(ahead)
        return rank, ahead

    yield make
    for ahead in made:
        await ahead.stop()


def request(token_ids: list[int], *, session: str = "s", epoch: int = 1) -> worker_pb2.PrepareRequest:
    return worker_pb2.PrepareRequest(session_id=session, turn_id="t", epoch=epoch, cache_salt=SALT, token_ids=token_ids)


def reserve(rank: Any, token_ids: list[int], *, session: str = "s", epoch: int = 2) -> Any:
    return rank.reservations.reserve(
        session_id=session,
        turn_id=f"turn {epoch}",
        epoch=epoch,
        attempt=1,
        salt=SALT,
        token_ids=token_ids,
        time_to_live_s=30.0,
    )


def leave(rank: Any, token_ids: list[int], *, session: str = "s") -> None:
    """The session's first turn computed these."""
    reservation = reserve(rank, token_ids, session=session, epoch=1)
    rank.reservations.advance(reservation.id, len(token_ids))
    rank.reservations.release(reservation.id, len(token_ids))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.002)


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(131) for _ in range(count)]


async def test_the_next_turn_finds_what_was_prepared(make_ahead: Any, rng: random.Random) -> None:
    rank, ahead = make_ahead(chunk=32)
    settled = ids(rng, 250)
    leave(rank, [*settled[:100], *ids(rng, 90)])  # with the thoughts that are cut
    ahead.want(request(settled))
    await until(lambda: not ahead._wanted)
    turn = reserve(rank, [*settled, 5, 6, 7])
    assert turn.cached_len == 250
    assert ahead.came("s") == rank.engine.state().num_background_tokens == 250 - 64, "a page was shared"
    assert ahead.came("s") == 0, "told once"
    rank.reservations.release(turn.id)
    expected = rank.generate([*settled, 5, 6, 7], SamplingParams(max_output_tokens=6, temperature=0.0))
    client = rank.ask([*settled, 5, 6, 7], SamplingParams(max_output_tokens=6, temperature=0.0))
    client.finished()
    assert client.token_ids == expected
    rank.reservations.release(client.reservation.id)


async def test_other_work_comes_first_and_the_rest_is_taken_up_after_it(make_ahead: Any, rng: random.Random) -> None:
    rank, ahead = make_ahead(chunk=16, num_pages=200)
    settled = ids(rng, 3000)
    ahead.want(request(settled))
    await until(lambda: rank.engine.state().num_background_tokens > 100)
    client = rank.ask(ids(rng, 10), SamplingParams(max_output_tokens=30))
    assert await asyncio.to_thread(client.done.wait, 20)
    rank.reservations.release(client.reservation.id)
    await until(lambda: not ahead._wanted)
    assert rank.engine.state().num_background_tokens == 3000, "nothing of it twice"
    assert rank.engine.state().num_computed_tokens == 10


async def test_the_sessions_own_turn_ends_it_and_takes_what_is_there(make_ahead: Any, rng: random.Random) -> None:
    rank, ahead = make_ahead(chunk=16, num_pages=200)
    settled = ids(rng, 3000)
    ahead.want(request(settled))
    await until(lambda: rank.engine.state().num_background_tokens > 100)
    turn = reserve(rank, [*settled, 1])
    num_prepared = ahead.came("s")
    assert 64 <= turn.cached_len < 3000
    assert num_prepared > 100
    await until(lambda: ahead._current is None)
    assert not ahead._wanted
    rank.reservations.release(turn.id)


async def test_a_reserve_that_finds_too_few_pages_gets_those_of_work_ahead(make_ahead: Any, rng: random.Random) -> None:
    rank, ahead = make_ahead(chunk=16, num_pages=40)
    ahead.want(request(ids(rng, 39 * 64)))
    await until(lambda: rank.engine.state().num_background_tokens > 0)
    with pytest.raises(ResourceExhausted):
        reserve(rank, ids(rng, 300), session="other")
    assert await ahead.yield_pages()
    turn = reserve(rank, ids(rng, 300), session="other")
    assert not await ahead.yield_pages()
    rank.reservations.release(turn.id)


async def test_stale_and_impossible_requests_are_dropped(make_ahead: Any, rng: random.Random) -> None:
    rank, ahead = make_ahead(num_pages=20)
    turn = reserve(rank, ids(rng, 10), epoch=5)
    rank.reservations.release(turn.id)
    leave(rank, ids(rng, 17 * 64), session="hot")
    for asked in (
        request(ids(rng, 50), epoch=4),
        request(ids(rng, 500), session="no room"),
        request([200], session="no such token"),
    ):
        ahead.want(asked)
    await until(lambda: not ahead._wanted)
    assert rank.engine.state().num_background_tokens == 0


async def test_a_turn_that_is_not_released_yet_is_waited_for(make_ahead: Any, rng: random.Random) -> None:
    rank, ahead = make_ahead()
    settled = ids(rng, 100)
    turn = reserve(rank, settled[:50], epoch=1)
    ahead.want(request(settled))
    await asyncio.sleep(0.1)
    assert rank.engine.state().num_background_tokens == 0
    rank.reservations.release(turn.id)
    await until(lambda: not ahead._wanted)
    assert rank.engine.state().num_background_tokens == 100
