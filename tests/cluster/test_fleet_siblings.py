"""Ray clusters of one name beside each other: who is alive, and how the older one's gangs go over, one for one."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest
from prometheus_client import CollectorRegistry

from harness.fleet_samples import Clock, ServeInMemory, gang, rank, states
from seamount.cluster import fleet
from seamount.cluster.fleet import FleetParts, Reconciler
from seamount.cluster.fleet_look import gangs_elsewhere, progress, ranks_elsewhere
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_plan import Cause, Circumstances, Delete, Phase, RunningGang, Start, WantedPool, plan
from seamount.cluster.fleet_siblings import SIBLING_DEAD_AFTER_S, Family, Siblings, left_here, needed_to_serve
from seamount.cluster.fleet_state import STATE_TTL_S, FleetState, Progress, connect
from seamount.cluster.fleet_view import View
from seamount.cluster.settings import validate
from seamount.wire.errors import Aborted
from seamount.wire.metrics import new_registry
from seamount.workers.spec import PoolName


def wants(decode: int, prefill: int = 0, *, version: str = "v") -> list[WantedPool]:
    return [
        WantedPool(pool="decode", num_gangs=decode, expert_parallel=2, version=version),
        WantedPool(pool="prefill", num_gangs=prefill, expert_parallel=1, version=version),
    ]


def counts(pools: Collection[WantedPool]) -> list[int]:
    return [pool.num_gangs for pool in pools]


def told(ready: int, wanted: int) -> dict[PoolName, Progress]:
    return {"decode": Progress(num_ready=ready, num_wanted=wanted), "prefill": Progress(num_ready=0, num_wanted=0)}


# ---- who is there


def test_an_older_ray_cluster_gives_way_to_a_younger_one_that_lives_and_has_come_up(redis_url: str) -> None:
    old, young = states(redis_url, "first", "second")
    assert (old.number, young.number) == (1, 2)
    clock = Clock()
    of_old, of_young = Siblings(old, clock), Siblings(young, clock)
    old.tell_siblings(is_serving=True, progress=told(4, 4))
    young.tell_siblings(is_serving=False, progress=told(0, 4))
    assert of_old.look() == Family()
    for num_ready in (1, 2):
        clock.now_s += 1.0
        old.tell_siblings(is_serving=True, progress=told(4, 4))
        young.tell_siblings(is_serving=False, progress=told(num_ready, 4))
        assert of_old.look() == Family(ready={"decode": num_ready, "prefill": 0})
        assert of_young.look() == (Family(knows_elders=False) if num_ready == 1 else Family(elder="first"))
    clock.now_s += 1.0
    young.tell_siblings(is_serving=True, progress=told(4, 4))
    assert of_old.look().is_outlived
    assert not of_young.look().is_outlived
    clock.now_s += SIBLING_DEAD_AFTER_S  # the younger one is gone again, and the older one does not beat either
    assert of_old.look() == of_young.look() == Family()
    old.claim()  # its next fleet is still of the same Ray cluster
    assert old.number == 1
    young.forget()
    assert old.siblings() == []
    old.forget()


def test_a_younger_release_that_tells_no_progress_takes_over_all_at_once(redis_url: str) -> None:
    old, young = states(redis_url, "first", "second")
    siblings = Siblings(old, clock := Clock())
    client = connect(redis_url, timeout_s=1.0)
    for beat, serving, expected in ((1, 0, Family()), (2, 0, Family()), (3, 1, Family(is_outlived=True))):
        client.hset(young._siblings_key, "beat:second", f"{beat}:{serving}")
        clock.now_s += 1.0
        assert siblings.look() == expected
    for state in (old, young):
        state.forget()


def test_a_fleet_that_begins_anew_finds_out_first_whether_an_older_cluster_lives(redis_url: str) -> None:
    old, young = states(redis_url, "first", "second")
    siblings = Siblings(young, clock := Clock())
    old.tell_siblings(is_serving=True, progress=told(4, 4))
    assert siblings.look() == Family(knows_elders=False)
    clock.now_s += SIBLING_DEAD_AFTER_S - 0.1
    assert siblings.look() == Family(knows_elders=False)
    clock.now_s += 0.1
    assert siblings.look() == Family()  # it is dead
    for state in (old, young):
        state.forget()


def test_having_come_up_is_kept_whatever_becomes_of_the_gangs(redis_url: str) -> None:
    (state,) = states(redis_url, "served")
    assert not state.has_served()
    assert state.progress() == {}
    state.note_served()
    state.tell_siblings(is_serving=True, progress=told(0, 3))
    state.claim()  # another fleet
    assert state.has_served()
    assert state.progress() == told(0, 3)
    state.forget()


def test_a_ray_cluster_that_was_not_seen_for_a_week_is_forgotten(redis_url: str) -> None:
    gone, silent, alive = states(redis_url, "gone", "silent: never beat", "alive")
    for state in (gone, alive):
        state.tell_siblings(is_serving=True, progress=told(4, 4))
    client = connect(redis_url, timeout_s=1.0)
    for state in (gone, silent, alive):
        assert STATE_TTL_S - 60 < client.ttl(state._key) <= STATE_TTL_S
    gone.claim()
    assert len(client.hkeys(gone._siblings_key)) == 1 + 3 + 1 + 3, "all were seen lately"
    for state in (gone, silent):
        client.expire(state._key, 0)  # the week is over
    new = FleetState(client, cluster_name=gone._cluster_name, ray_session="new")
    new.claim()
    assert {sibling.ray_session: sibling.number for sibling in new.siblings()} == {"alive": 3}
    assert sorted(client.hkeys(gone._siblings_key)) == [
        b"beat:alive",
        b"last",
        b"number:alive",
        b"number:new",
        b"progress:alive",
    ]
    with pytest.raises(Aborted):
        gone.admit_delete()
    gone.claim()
    assert (new.number, gone.number) == (4, 5), "numbers are not reused"
    for state in (gone, alive, new):
        state.forget()


# ---- how many are left here


@pytest.mark.parametrize(
    ("family", "decode", "prefill"),
    [
        (Family(), 4, 1),
        (Family(elder="older"), 4, 1),
        (Family(ready={"decode": 0, "prefill": 0}), 4, 1),
        (Family(ready={"decode": 1, "prefill": 0}), 3, 1),
        (Family(ready={"decode": 3, "prefill": 1}), 1, 0),
        (Family(ready={"decode": 9, "prefill": 9}), 0, 0),
        (Family(is_outlived=True), 0, 0),
        (Family(is_outlived=True, ready={"decode": 1}), 0, 0),
    ],
)
def test_each_gang_that_is_ready_in_a_younger_cluster_is_one_less_here(
    family: Family, decode: int, prefill: int
) -> None:
    assert counts(left_here(wants(4, 1), family)) == [decode, prefill]


@pytest.mark.parametrize(
    ("elder", "wanted", "needed"),
    [
        ("older", (4, 1), [4, 1]),
        ("older", (1, 0), [1, 0]),
        (None, (1, 1), [1, 1]),
        (None, (4, 1), [1, 1]),  # load came while it was starting: there may be no room for more
        (None, (1, 0), [1, 0]),  # a prefill gang that nobody needs any more
    ],
)
def test_what_must_be_ready_before_a_cluster_has_come_up(
    elder: str | None, wanted: tuple[int, int], needed: list[int]
) -> None:
    assert counts(needed_to_serve(wants(*wanted), wants(1, 1), Family(elder=elder))) == needed


def test_progress_counts_what_is_ready_and_stays() -> None:
    running = [gang(0), gang(1), gang(2, phase=Phase.STARTING), gang(3, version="older"), gang(4, phase=Phase.FAILED)]
    assert progress(wants(5, 1), running, ["decode-1"]) == {
        "decode": Progress(num_ready=2, num_wanted=5),
        "prefill": Progress(num_ready=0, num_wanted=1),
    }
    assert progress(wants(1), running, ())["decode"] == Progress(num_ready=1, num_wanted=1)


def test_gangs_of_other_clusters_are_told_by_their_ranks() -> None:
    ranks = [
        rank("decode-0-abc.0", node_id="here"),
        rank("decode-0-def.0", node_id="there"),
        rank("decode-0-def.1", node_id="there"),
        rank("decode-7-ghi.0", node_id="there"),
        rank("decode-7-ghi.1", node_id="there", draining=True),
    ]
    elsewhere = ranks_elsewhere(View(ranks=tuple(ranks)), {"here"})
    assert len(elsewhere) == 4
    assert [one.name for one in gangs_elsewhere(elsewhere)] == ["decode-0"]


def test_capacity_never_falls_while_gangs_go_over_one_for_one() -> None:
    """Two clusters, as their fleets plan, and room for one gang more than are wanted; which come up is drawn by lot."""
    print(f"seed {(seed := random.SystemRandom().randrange(1 << 31))}")
    draw = random.Random(seed)
    for _ in range(300):
        total = draw.randrange(1, 6)
        room = total + 1
        old = {number: gang(number) for number in range(total)}
        young: dict[int, RunningGang] = {}
        for _ in range(200):
            ready = sum(one.phase is Phase.READY for one in young.values())
            here = left_here(wants(total), Family(ready={"decode": ready}))
            for action in plan(here, old.values(), Circumstances(surplus=Cause.VERSION)):
                assert isinstance(action, Delete)
                assert action.cause is Cause.VERSION
                del old[int(action.name.rpartition("-")[2])]
            for action in plan(wants(total, version="w"), young.values()):
                if isinstance(action, Start):
                    number = max(young, default=-1) + 1
                    young[number] = gang(number, phase=Phase.STARTING, version="w")
                else:
                    del young[int(action.name.rpartition("-")[2])]
            for number, one in young.items():
                has_room = len(old) + sum(other.phase is Phase.READY for other in young.values()) < room
                if one.phase is Phase.STARTING and has_room and draw.random() < 0.5:
                    phase = draw.choice([Phase.READY, Phase.READY, Phase.FAILED])
                    young[number] = gang(number, phase=phase, version="w")
            assert len(old) + sum(one.phase is Phase.READY for one in young.values()) >= total
            if not old:
                break
        assert not old
        assert sum(one.phase is Phase.READY for one in young.values()) == total


# ---- two fleets


def a_fleet(redis_url: str, state: FleetState, serve: ServeInMemory, registry: CollectorRegistry) -> Reconciler:
    settings = validate({"cluster_name": "test", "redis_url": redis_url})
    parts = FleetParts.of(settings, connect(redis_url, timeout_s=1.0))
    return Reconciler(wants(3), state, serve, FleetMetrics(registry), parts)


def test_an_older_fleet_gives_up_as_many_gangs_as_a_younger_one_has(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "BLIND_S", 0.0)  # these gangs have no ranks to be seen
    old_state, young_state = states(redis_url, "old", "young")
    old_serve, young_serve = ServeInMemory(Phase.STARTING), ServeInMemory(Phase.STARTING)
    registry = new_registry()
    old = a_fleet(redis_url, old_state, old_serve, registry)
    young = a_fleet(redis_url, young_state, young_serve, new_registry())
    old.reconcile()
    old_serve.come_up(3)
    for num_up, left in ((0, 3), (1, 2), (0, 2), (1, 1)):
        young_serve.come_up(num_up)
        for _ in range(3):
            young.reconcile()
            old.reconcile()
            assert old_serve.ready() + young_serve.ready() >= 3
        assert old_serve.ready() == left
        assert not young_state.has_served()
    young_serve.delete("decode-0")  # dead, and one that starts again beside the older ones
    for _ in range(3):
        young.reconcile()
        old.reconcile()
    assert (len(old_serve.gangs), old_serve.ready(), young_serve.ready()) == (2, 1, 1)
    young_serve.come_up(3)
    for _ in range(3):
        young.reconcile()
        old.reconcile()
    assert young_state.has_served()
    assert (old_serve.gangs, young_serve.ready()) == ({}, 3)
    ended = {"cause": "version", "outcome": "empty"}
    assert registry.get_sample_value("seamount_fleet_drain_seconds_count", ended) == 3
    young_serve.gangs.clear()  # whatever becomes of it: the older one is over while it lives
    for _ in range(3):
        young.reconcile()
        old.reconcile()
    assert old_serve.gangs == {}
    for state in (old_state, young_state):
        state.forget()
