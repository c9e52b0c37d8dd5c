"""Scaling inside the fleet: what it wants from one look to the next, and what outlives it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from harness.fleet_samples import Clock, gang, rank, routers, states
from seamount.cluster.autoscaling import AutoscalingSettings
from seamount.cluster.fleet_meter import SeenRank
from seamount.cluster.fleet_plan import Phase, RunningGang, WantedPool
from seamount.cluster.fleet_scaling import Scaler
from seamount.cluster.fleet_siblings import Family
from seamount.cluster.fleet_view import View
from seamount.workers.spec import PoolName

POOLS = [
    WantedPool(pool="decode", num_gangs=2, expert_parallel=2, version="v"),
    WantedPool(pool="prefill", num_gangs=0, expert_parallel=1, version="p"),
]
ON = AutoscalingSettings.model_validate(
    {"enabled": True, "decode": {"max_gangs": 4}, "prefill": {"max_gangs": 0}, "grow_after_s": 2, "shrink_after_s": 5}
    | {"start_s": 1}
)
ALONE = Family()
FULL = {"num_free_pages": 5, "num_running": 1, "prefill_tokens_per_s": 100.0}


def numbers(
    scaler: Scaler,
    running: list[RunningGang],
    view: View,
    leaving: Collection[str] = (),
    *,
    elsewhere: Sequence[SeenRank] = (),
    family: Family = ALONE,
    follows: bool = False,
    given_up: Collection[PoolName] = (),
) -> list[int]:
    wanted = scaler.wanted(
        running, view, leaving, elsewhere=elsewhere, family=family, follows=follows, given_up=given_up
    )
    return [pool.num_gangs for pool in wanted.pools]


def test_without_scaling_the_numbers_are_those_of_the_settings(redis_url: str) -> None:
    (state,) = states(redis_url, "fixed")
    scaler = Scaler(AutoscalingSettings(), POOLS, state, Clock())
    view = View(ranks=(rank("decode-0-a.0", **FULL), rank("decode-1-b.0", num_free_pages=100)))
    wanted = scaler.wanted([gang(0), gang(1)], view, ())
    assert [pool.num_gangs for pool in wanted.pools] == [2, 0]
    assert wanted.routers is None
    assert wanted.cheapest == ("decode-1", "decode-0")
    state.forget()


def test_what_was_wanted_outlives_the_fleet_and_a_gang_that_leaves_is_not_fewer_wanted(redis_url: str) -> None:
    (state,) = states(redis_url, "scaled")
    scaler = Scaler(ON, POOLS, state, clock := Clock())
    running = [gang(0), gang(1)]
    full = View(ranks=(rank("decode-0-a.0", **FULL), rank("decode-1-b.0", **FULL)), routers=routers("n1").routers)
    assert numbers(scaler, running, View()) == [2, 0]  # nothing is seen yet
    for _ in range(4):
        clock.now_s += 1.0
        wanted = numbers(scaler, running, full)
    assert wanted == [3, 0]
    after = Scaler(ON, POOLS, state, clock)
    assert numbers(after, running, full) == [3, 0]
    assert numbers(after, running, full, leaving={"decode-0"}) == [3, 0]
    state.forget()


def test_load_is_followed_while_gangs_of_an_older_version_stand(redis_url: str) -> None:
    (state,) = states(redis_url, "changing")
    scaler = Scaler(ON, POOLS, state, clock := Clock())
    older = [gang(0, version="u"), gang(1, version="u"), gang(2, phase=Phase.STARTING)]
    full = View(ranks=(rank("decode-0-a.0", **FULL), rank("decode-1-b.0", **FULL)), routers=routers("n1").routers)
    calm = View(
        ranks=(rank("decode-0-a.0", num_free_pages=100), rank("decode-1-b.0", num_free_pages=100)),
        routers=routers("n1").routers,
    )
    for _ in range(4):
        clock.now_s += 1.0
        wanted = numbers(scaler, older, full)
    assert wanted == [3, 0]
    for _ in range(14):
        clock.now_s += 1.0
        wanted = numbers(scaler, older, calm)
    assert wanted == [1, 0]
    state.forget()


def test_old_gangs_that_could_not_be_started_again_stay_while_routers_and_other_pools_scale(redis_url: str) -> None:
    (state,) = states(redis_url, "stuck")
    scaler = Scaler(ON, POOLS, state, clock := Clock())
    older = [gang(0, version="u"), gang(1, version="u"), gang(2, phase=Phase.FAILED)]
    calm = View(
        ranks=(rank("decode-0-a.0", num_free_pages=100), rank("decode-1-b.0", num_free_pages=100)),
        routers=routers("n1", "n2").routers,
    )
    for _ in range(14):
        clock.now_s += 1.0
        wanted = scaler.wanted(older, calm, (), given_up={"decode"})
    assert [pool.num_gangs for pool in wanted.pools] == [2, 0]
    assert wanted.routers == 1
    for _ in range(8):  # no older one stands: this is scaling as ever
        clock.now_s += 1.0
        now = numbers(scaler, [gang(0), gang(1)], calm, given_up={"decode"})
    assert now == [1, 0]
    state.forget()


# ---- two Ray clusters of one name


def test_a_younger_ray_cluster_begins_with_as_many_as_the_older_one_wants(redis_url: str) -> None:
    old, young = states(redis_url, "loaded", "upgraded")
    clock = Clock()
    of_old, of_young = Scaler(ON, POOLS, old, clock), Scaler(ON, POOLS, young, clock)
    elder = Family(elder="loaded")
    running = [gang(0), gang(1)]
    full = View(ranks=(rank("decode-0-a.0", **FULL), rank("decode-1-b.0", **FULL)), routers=routers("n1").routers)
    calm = View(ranks=(rank("decode-0-c.0", num_free_pages=100),), routers=routers("n1").routers)
    assert numbers(of_young, [gang(0)], calm, family=elder, follows=True) == [2, 0]  # nothing is known of it yet
    for _ in range(5):
        clock.now_s += 1.0
        wanted = numbers(of_old, running, full)
    assert wanted == [3, 0]
    for _ in range(10):  # its own gangs have nothing to do
        clock.now_s += 1.0
        followed = of_young.wanted([gang(0)], calm, (), family=elder, follows=True)
        assert ([pool.num_gangs for pool in followed.pools], followed.routers) == ([3, 0], 1)
    crowd = View(ranks=(rank("decode-0-c.0", **FULL),), routers=routers("n1").routers)
    for _ in range(10):
        clock.now_s += 1.0
        assert [pool.num_gangs for pool in of_young.wanted([gang(0)], crowd, (), rests=True).pools] == [3, 0]
    assert numbers(of_young, [gang(0)], calm, family=elder) == [3, 0]  # from here on it decides: shrinking takes time
    assert numbers(Scaler(ON, POOLS, young, clock), [gang(0)], View()) == [3, 0]  # and so does the fleet after it
    for state in (old, young):
        state.forget()


def test_fixed_numbers_are_followed_too(redis_url: str) -> None:
    old, young = states(redis_url, "fixed", "scales")
    Scaler(AutoscalingSettings(), POOLS, old, Clock()).wanted([], View(), ())
    fewer = [WantedPool(pool="decode", num_gangs=1, expert_parallel=2, version="w"), POOLS[1]]
    scaler = Scaler(ON, fewer, young, Clock())
    assert numbers(scaler, [], View(), family=Family(elder="fixed"), follows=True) == [2, 0]
    for state in (old, young):
        state.forget()


def test_load_that_goes_over_to_a_younger_cluster_is_load_all_the_same(redis_url: str) -> None:
    (state,) = states(redis_url, "older")
    scaler = Scaler(ON, POOLS, state, clock := Clock())
    busy = {"num_free_pages": 30, "num_running": 1, "prefill_tokens_per_s": 100.0}
    here = View(ranks=(rank("decode-0-a.0", **busy),), routers=routers("n1").routers)
    there = [rank("decode-0-x.0", node_id="n9", **busy)]
    for _ in range(14):  # one of two gangs has gone over, each of them is as full as two should be
        clock.now_s += 1.0
        wanted = numbers(scaler, [gang(0)], here, elsewhere=there, family=Family(ready={"decode": 1}))
    assert wanted == [2, 0]
    for _ in range(14):  # both are idle
        clock.now_s += 1.0
        calm = View(ranks=(rank("decode-0-a.0", num_free_pages=100),), routers=routers("n1").routers)
        idle = [rank("decode-0-x.0", node_id="n9", num_free_pages=100)]
        wanted = numbers(scaler, [gang(0)], calm, elsewhere=idle, family=Family(ready={"decode": 1}))
    assert wanted == [1, 0]
    state.forget()


def test_what_is_wanted_does_not_fall_while_a_younger_clusters_load_is_not_seen(redis_url: str) -> None:
    (state,) = states(redis_url, "older")
    scaler = Scaler(ON, POOLS, state, clock := Clock())
    calm = View(ranks=(rank("decode-0-a.0", num_free_pages=100),), routers=routers("n1").routers)
    for _ in range(14):
        clock.now_s += 1.0
        wanted = numbers(scaler, [gang(0)], calm, family=Family(ready={"decode": 1}))
    assert wanted == [2, 0]
    full = View(ranks=(rank("decode-0-a.0", **FULL), rank("decode-1-b.0", **FULL)), routers=routers("n1").routers)
    for _ in range(4):
        clock.now_s += 1.0
        wanted = numbers(scaler, [gang(0), gang(1)], full, family=Family(ready={"decode": 1}))
    assert wanted == [3, 0]
    state.forget()


def test_how_long_gangs_take_to_start_is_measured_and_kept(redis_url: str) -> None:
    (state,) = states(redis_url, "starts")
    scaler = Scaler(ON, POOLS, state, Clock())
    scaler.started("decode", 40.0)
    scaler.started("decode", 60.0)
    assert state.recall("start_s:decode") == 50.0
    assert state.recall("start_s:prefill") is None
    state.forget()
