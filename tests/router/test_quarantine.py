"""Which deaths of ranks count against a turn, and when it is refused."""

from __future__ import annotations

import pytest

from seamount.router.quarantine import GANG_WINDOW_S, NODE_WINDOW_S, Deaths, Suspicion
from seamount.wire.ids import RankId


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def died(deaths: Deaths, name: str, *, gang: str = "", host: str = "") -> RankId:
    """Without more, a gang of one on a host of its own."""
    deaths.note(RankId(name), gang_id=gang or f"gang of {name}", host=host or f"host of {name}")
    return RankId(name)


def test_two_ranks_that_die_of_a_turn_are_enough(clock: Clock) -> None:
    deaths = Deaths(clock=clock)
    turn = Suspicion(deaths=deaths)
    for number, name in enumerate(("a", "b")):
        turn.in_batch_of = RankId(name)
        turn.rank_died(died(deaths, name))
        assert turn.is_suspect
        assert (turn.may_be_proven, turn.is_proven()) == ((False, False) if number == 0 else (True, True))
        clock.now += 5


def test_only_the_last_batch_of_the_rank_itself_counts(clock: Clock) -> None:
    deaths = Deaths(clock=clock)
    turn = Suspicion(deaths=deaths)
    turn.rank_died(died(deaths, "it waited there"))
    turn.in_batch_of = RankId("where it ran")
    turn.rank_died(died(deaths, "where it did not run"))
    turn.in_batch_of = RankId("silent, never seen to die")
    turn.rank_died(RankId("silent, never seen to die"))
    assert not turn.is_suspect


def test_one_death_counts_once(clock: Clock) -> None:
    deaths = Deaths(clock=clock)
    turn = Suspicion(deaths=deaths)
    for _ in range(3):
        turn.in_batch_of = RankId("a")
        turn.rank_died(died(deaths, "a"))
    assert not turn.may_be_proven


@pytest.mark.parametrize("after_s", [-0.5, 0.5])
def test_deaths_with_the_node_do_not_count(clock: Clock, after_s: float) -> None:
    deaths = Deaths(clock=clock)
    turn = Suspicion(deaths=deaths)
    turn.in_batch_of = RankId("a")
    turn.rank_died(died(deaths, "a"))
    clock.now += 60
    others = clock.now + after_s * NODE_WINDOW_S
    for at in sorted((clock.now, others)):
        clock.now = at
        if at == others:
            died(deaths, "another gang's", host="n")
        else:
            turn.in_batch_of = RankId("b")
            turn.rank_died(died(deaths, "b", host="n"))
    assert turn.may_be_proven, "as yet the other death might not have been seen"
    assert not turn.is_proven()
    clock.now += 60
    turn.in_batch_of = RankId("c")
    turn.rank_died(died(deaths, "c", host="n"))
    assert turn.is_proven()


@pytest.mark.parametrize(("after_s", "counts"), [(0.1, False), (GANG_WINDOW_S + 1, True)])
def test_a_rank_that_follows_a_peer_of_its_gang_did_not_die_of_its_own_batch(
    clock: Clock, after_s: float, counts: bool
) -> None:
    deaths = Deaths(clock=clock)
    first, follower = Suspicion(deaths=deaths), Suspicion(deaths=deaths)
    for number in range(2):
        first.in_batch_of, follower.in_batch_of = RankId(f"{number}.0"), RankId(f"{number}.1")
        first.rank_died(died(deaths, f"{number}.0", gang=f"g{number}", host="n"))
        clock.now += after_s
        follower.rank_died(died(deaths, f"{number}.1", gang=f"g{number}", host="n"))
        clock.now += 60
    assert first.is_proven()
    assert follower.is_proven() is counts
