"""A turn whose session's caches are at another rank: when they are fetched, and what happens where that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from harness.generations import answer, make_generation
from seamount.router import fetching
from seamount.router.directory import Role
from seamount.router.generation import Generation
from seamount.router.moves import Moves, drained
from seamount.router.placement import PathRules
from seamount.router.store import Store
from seamount.v1 import worker_pb2
from seamount.wire.errors import Aborted, FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from seamount.wire.ids import RankId, SessionId

PROMPT = list(range(100, 200))


def generation(
    system: Any,
    *,
    num_left: int = 90,
    prompt: Sequence[int] = PROMPT,
    rules: PathRules = PathRules(policy="local"),  # noqa: B008 - frozen
) -> Generation:
    return make_generation(
        system.ranks,
        prompt,
        rules=rules,
        epoch=3,
        max_output_tokens=3,
        preferred=RankId("home"),
        num_left=num_left,
    )


@pytest.fixture
async def home(system: Any) -> Any:
    """It is full: the turn goes elsewhere."""
    rank = await system.add("home")

    async def full(request: worker_pb2.ReserveRequest) -> None:
        raise ResourceExhausted("no pages", reason="NO_PAGES", retry_after_s=0.1)

    rank.on_reserve = full
    return rank


async def test_pages_are_fetched_from_a_home_that_is_full(system: Any, home: Any) -> None:
    other = await system.add("other")
    made = generation(system)
    assert await answer(made) == [40, 41, 42]
    (asked,) = other.migrated
    assert (asked.reservation_id, asked.epoch) == ("other/2", 3)
    assert (asked.source_rank_id, asked.source_address) == ("home", home.address)
    receipt = made.account.receipt(num_prompt=100, num_output=3)
    assert (receipt.num_cached_tokens, receipt.num_migrated_tokens) == (0, 64)
    assert made.account.num_retries == 0


@pytest.mark.parametrize(("num_left", "cached_len"), [(63, 0), (90, 30), (0, 0)])
async def test_less_than_a_page_is_not_fetched(system: Any, home: Any, num_left: int, cached_len: int) -> None:
    other = await system.add("other")
    other.cached_len = cached_len
    assert len(await answer(generation(system, num_left=num_left))) == 3
    assert other.migrated == []


async def test_a_leaving_home_is_asked_for_its_pages_and_for_nothing_else(system: Any) -> None:
    home, other = await system.add("home"), await system.add("other")
    home.state.draining = True
    await system.until(lambda: system.ranks.is_leaving(RankId("home")))
    assert system.ranks.load(RankId("home")) is None
    assert len(await answer(generation(system))) == 3
    assert (len(home.reserved), len(other.migrated)) == (0, 1)


async def test_a_dead_home_is_not_asked(system: Any) -> None:
    other = await system.add("other")
    assert len(await answer(generation(system))) == 3
    assert other.migrated == []


@pytest.mark.parametrize("error", [Unavailable("no", reason="LINK_LOST"), Aborted("no", reason="STALE_EPOCH")])
async def test_what_cannot_be_fetched_is_computed(system: Any, home: Any, error: Exception) -> None:
    other = await system.add("other")

    async def fails(request: worker_pb2.MigrateRequest) -> AsyncIterator[Any]:
        yield worker_pb2.MigrateResponse(progress=worker_pb2.MigrateProgress())
        other.cached_len = 10  # this much had arrived
        raise error

    other.on_migrate = fails
    made = generation(system)
    assert len(await answer(made)) == 3
    assert [request.attempt for request in other.reserved] == [2, 2], "asked again what has arrived"
    assert made.account.num_migrated == 10
    assert system.ranks.load(RankId("other")) is not None, "the rank that asked is not to blame"


async def test_a_move_that_gets_nowhere_is_given_up(system: Any, home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await system.add("other")
    monkeypatch.setattr(fetching, "MIGRATE_STALL_S", 0.2)

    async def stands(request: worker_pb2.MigrateRequest) -> AsyncIterator[Any]:
        while True:
            yield worker_pb2.MigrateResponse(progress=worker_pb2.MigrateProgress(num_migrated_tokens=1))
            await asyncio.sleep(0.05)

    other.on_migrate = stands
    assert len(await answer(generation(system))) == 3


async def test_a_home_that_lost_most_of_it_is_left_for_a_better_rank(system: Any) -> None:
    """Far worse than believed: the choice is repeated with what is true, once."""
    home, other = await system.add("home"), await system.add("other")
    home.state.MergeFrom(worker_pb2.RankState(prefill_tokens_per_s=1000, num_queued_prefill_tokens=2000))
    other.state.MergeFrom(worker_pb2.RankState(prefill_tokens_per_s=1000))
    home.state.pull_bytes_per_s = other.state.pull_bytes_per_s = 1.0  # to fetch would take for ever
    home.state.kv_bytes_per_token = other.state.kv_bytes_per_token = 100
    await system.until(lambda: all(rank.prefill_tokens_per_s for rank in system.ranks.loads(Role.DECODE)))
    made = generation(
        system,
        rules=PathRules(policy="local", local_append_max_tokens=16),
        prompt=PROMPT * 60,  # home would be the choice if it had 5,990 of these 6,000
        num_left=5990,
    )
    assert len(await answer(made)) == 3
    assert (len(home.reserved), len(home.released)) == (1, 1)
    assert (len(other.reserved), other.migrated) == (1, [])


async def test_where_sessions_went_is_noted_and_found(store: Store, system: Any) -> None:
    moves = Moves(store, "scripted")
    assert await moves.find(SessionId("s")) is None
    home = await system.add("home")
    with pytest.raises(FailedPrecondition):
        await drained(system.ranks, moves, RankId("home"), deadline_s=5.0)
    with pytest.raises(NotFound):
        await drained(system.ranks, moves, RankId("nobody"), deadline_s=5.0)
    other = await system.add("other")
    asked: list[worker_pb2.DrainRequest] = []

    async def hands_over(request: worker_pb2.DrainRequest) -> AsyncIterator[Any]:
        asked.append(request)
        yield worker_pb2.DrainResponse(session_id="s", rank_id="other", num_tokens=64)
        yield worker_pb2.DrainResponse()

    home.on_drain = hands_over
    answered = await drained(system.ranks, moves, RankId("home"), deadline_s=5.0)
    assert (answered.num_sessions, answered.num_tokens, answered.is_empty) == (1, 64, True)
    assert [(peer.rank_id, peer.address, peer.num_usable_pages) for peer in asked[0].peers] == [
        ("other", other.address, 100)
    ]
    assert await moves.find(SessionId("s")) == "other"
