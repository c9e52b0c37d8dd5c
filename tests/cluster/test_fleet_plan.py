from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from harness.fleet_samples import ServeInMemory
from seamount.cluster import fleet
from seamount.cluster.fleet import FleetParts, Reconciler
from seamount.cluster.fleet_acts import MAX_FAILURES
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_plan import (
    Action,
    Cause,
    Circumstances,
    Delete,
    Phase,
    RunningGang,
    Start,
    WantedPool,
    plan,
    running_gangs,
)
from seamount.cluster.fleet_state import FleetState, connect
from seamount.cluster.redis_server import RedisServer
from seamount.cluster.settings import validate
from seamount.wire.errors import Aborted
from seamount.wire.metrics import new_registry
from seamount.workers.spec import PoolName

READY, STARTING, FAILED, LEAVING = Phase.READY, Phase.STARTING, Phase.FAILED, Phase.LEAVING


def wants(num_gangs: int, *, pool: PoolName = "decode", version: str = "v2", expert_parallel: int = 2) -> WantedPool:
    return WantedPool(pool=pool, num_gangs=num_gangs, expert_parallel=expert_parallel, version=version)


def reconciler(url: str, pools: list[WantedPool], state: FleetState, serve: ServeInMemory) -> Reconciler:
    settings = validate({"cluster_name": "test", "redis_url": url})
    return Reconciler(pools, state, serve, told(), FleetParts.of(settings, connect(url, timeout_s=1.0)))


def told() -> FleetMetrics:
    return FleetMetrics(new_registry())


def gang(number: int, phase: Phase = READY, *, pool: PoolName = "decode", version: str = "v2") -> RunningGang:
    return RunningGang(pool=pool, number=number, version=version, phase=phase)


def old(number: int, phase: Phase = READY) -> RunningGang:
    return gang(number, phase, version="v1")


@pytest.mark.parametrize(
    ("num_gangs", "running", "starts", "deletes"),
    [
        pytest.param(0, [], 0, [], id="nothing wanted, nothing there"),
        pytest.param(2, [], 2, [], id="cold start"),
        pytest.param(2, [gang(0), gang(1)], 0, [], id="as wanted"),
        pytest.param(2, [gang(0), gang(7, STARTING)], 0, [], id="one on its way counts"),
        pytest.param(3, [gang(0)], 2, [], id="scale up leaves the present ones alone"),
        pytest.param(1, [gang(0), gang(1), gang(2)], 0, ["decode-2", "decode-1"], id="scale down takes the newest"),
        pytest.param(1, [gang(0, STARTING), gang(1)], 0, ["decode-0"], id="scale down takes the unready first"),
        pytest.param(0, [gang(3)], 0, ["decode-3"], id="scale to nothing"),
        pytest.param(1, [gang(0, LEAVING)], 1, [], id="a leaving one no longer counts"),
        pytest.param(1, [gang(0), gang(1, LEAVING)], 0, [], id="a leaving one is not deleted twice"),
        pytest.param(2, [gang(0), gang(1, FAILED)], 1, ["decode-1"], id="a failed one is replaced"),
        pytest.param(2, [old(0), old(1)], 2, [], id="update: the new ones come first"),
        pytest.param(2, [old(0), old(1), gang(2, STARTING), gang(3)], 0, ["decode-0"], id="update: one for one"),
        pytest.param(2, [old(0), old(1), gang(2), gang(3)], 0, ["decode-0", "decode-1"], id="update: done"),
        pytest.param(2, [old(0, STARTING), old(1), gang(2)], 1, ["decode-0"], id="update: the unready old one goes"),
        pytest.param(1, [old(0), gang(1, FAILED)], 1, ["decode-1"], id="update: a failing one keeps the old"),
        pytest.param(0, [old(0)], 0, ["decode-0"], id="update to nothing"),
    ],
)
def test_plan_of_one_pool(num_gangs: int, running: list[RunningGang], starts: int, deletes: list[str]) -> None:
    actions = plan([wants(num_gangs)], running)
    assert sum(isinstance(action, Start) for action in actions) == starts
    assert [action.name for action in actions if isinstance(action, Delete)] == deletes


def test_a_pool_given_up_keeps_its_failed_gang_to_be_seen() -> None:
    running = [gang(0), gang(4, FAILED)]
    assert plan([wants(2)], running, Circumstances(given_up=frozenset({"decode"}))) == []
    assert plan([wants(2)], running, Circumstances(given_up=frozenset({"prefill"}))) != []
    shrunk = plan([wants(1)], running, Circumstances(given_up=frozenset({"decode"})))
    assert [action.name for action in shrunk if isinstance(action, Delete)] == ["decode-4"]


def test_of_those_that_are_too_many_the_cheapest_to_lose_goes() -> None:
    running = [gang(0), gang(1), gang(2), gang(3, STARTING)]
    mind = Circumstances(cheapest=("decode-1", "decode-2", "decode-0"))
    assert names(plan([wants(2)], running, mind)) == ["decode-3", "decode-1"]
    assert names(plan([wants(1)], running, mind)) == ["decode-3", "decode-1", "decode-2"]


def test_gangs_on_a_node_that_is_to_be_emptied_wait_for_others_in_their_place() -> None:
    condemned = Circumstances(condemned=frozenset({"decode-0"}))
    (start,) = plan([wants(2)], [gang(0), gang(1)], condemned)
    assert isinstance(start, Start)
    assert plan([wants(2)], [gang(0), gang(1), gang(2, STARTING)], condemned) == []
    (delete,) = plan([wants(2)], [gang(0), gang(1), gang(2)], condemned)
    assert isinstance(delete, Delete)
    assert (delete.name, delete.cause, delete.is_ready) == ("decode-0", Cause.NODE, True)
    overdue = Circumstances(condemned=condemned.condemned, overdue=condemned.condemned)
    actions = plan([wants(2)], [gang(0), gang(1)], overdue)
    assert [type(action) for action in actions] == [Start, Delete]
    assert names(actions) == ["decode-0"]


def names(actions: Sequence[Action]) -> list[str]:
    return [action.name for action in actions if isinstance(action, Delete)]


def test_pools_do_not_mix_and_unwanted_ones_are_emptied() -> None:
    running = [gang(0), gang(0, pool="prefill"), gang(1, FAILED, pool="prefill"), gang(2, LEAVING, pool="prefill")]
    assert [a.name for a in plan([wants(1)], running) if isinstance(a, Delete)] == ["prefill-0", "prefill-1"]
    both = [wants(1), wants(3, pool="prefill", version="p", expert_parallel=1)]
    actions = plan(both, running)
    assert [a.wanted.pool for a in actions if isinstance(a, Start)] == ["prefill"] * 3


def test_plan_converges_without_ever_having_fewer_ready_gangs_than_an_update_allows() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(300):
        target = draw.randrange(5)
        present = {number: old(number, draw.choice([READY, STARTING, FAILED])) for number in range(draw.randrange(5))}
        floor = min(target, sum(g.phase is READY for g in present.values()))
        number = len(present)
        for _ in range(12):
            actions = plan([wants(target)], present.values())
            for action in actions:
                if isinstance(action, Delete):
                    del present[int(action.name.rpartition("-")[2])]
                else:
                    present[number] = gang(number, STARTING)
                    number += 1
            assert sum(g.phase is READY for g in present.values()) >= floor
            if not actions and not any(g.phase is STARTING for g in present.values()):
                break
            for n, g in present.items():
                if g.phase is STARTING and draw.random() < 0.7:
                    present[n] = gang(n, draw.choice([READY, READY, FAILED]), version=g.version)
        for n, g in present.items():  # the weather clears
            present[n] = gang(n, READY, version=g.version)
        for _ in range(4):
            for action in plan([wants(target)], present.values()):
                if isinstance(action, Delete):
                    del present[int(action.name.rpartition("-")[2])]
                else:
                    present[number] = gang(number)
                    number += 1
        assert [g.version for g in present.values()] == ["v2"] * target


def test_running_gangs_reads_serves_report() -> None:
    def application(status: str, *deployments: str) -> SimpleNamespace:
        return SimpleNamespace(status=SimpleNamespace(value=status), deployments=dict.fromkeys(deployments))

    report = {
        "router": application("RUNNING", "Router"),
        "fleet": application("RUNNING", "Fleet"),
        "decode-12": application("RUNNING", "abc"),
        "prefill-0": application("UNHEALTHY", "def"),
        "decode-3": application("DEPLOY_FAILED", "abc"),
        "decode-4": application("DELETING"),
        "decode-x": application("RUNNING", "abc"),
    }
    assert running_gangs(report) == [
        gang(12, READY, version="abc"),
        gang(0, STARTING, pool="prefill", version="def"),
        gang(3, FAILED, version="abc"),
        gang(4, LEAVING, version=""),
    ]


def fleet_state(redis_url: str, session: str) -> FleetState:
    return FleetState(connect(redis_url, timeout_s=1.0), cluster_name="test", ray_session=session)


def test_an_older_fleet_is_refused_once_a_newer_one_has_claimed(redis_url: str) -> None:
    first, second = fleet_state(redis_url, "fence"), fleet_state(redis_url, "fence")
    elsewhere = fleet_state(redis_url, "another ray cluster")
    for state in (first, elsewhere):
        state.claim()
    assert first.admit_start("decode", lowest=0) == 0
    assert first.count_failure("decode", "v1") == 1
    second.claim()
    for refused in (
        first.admit_delete,
        lambda: first.admit_start("decode", lowest=0),
        lambda: first.count_failure("decode", "v1"),
    ):
        with pytest.raises(Aborted, match="another fleet"):
            refused()
    assert second.num_failures("decode", "v1") == 1
    assert second.num_failures("decode", "v2") == 0
    elsewhere.admit_delete()
    second.admit_delete()
    second.forget()


def test_a_gangs_number_is_never_drawn_twice(redis_url: str) -> None:
    state = fleet_state(redis_url, "numbers")
    state.claim()
    assert [state.admit_start("decode", lowest=0) for _ in range(3)] == [0, 1, 2]
    assert state.admit_start("prefill", lowest=0) == 0
    assert state.admit_start("decode", lowest=9) == 9  # Redis had lost the count, Serve still runs decode-8
    state.claim()
    assert state.admit_start("decode", lowest=0) == 10
    state.forget()


def test_reconciling_starts_what_is_wanted_and_a_successor_adopts_it(redis_url: str) -> None:
    serve = ServeInMemory(READY)
    pools = [wants(2), wants(1, pool="prefill", expert_parallel=1)]
    first = reconciler(redis_url, pools, fleet_state(redis_url, "adopt"), serve)
    first.start()
    wait_until(lambda: len(serve.gangs) == 3)
    second = reconciler(redis_url, pools, fleet_state(redis_url, "adopt"), serve)
    second.start()
    time.sleep(1.2)  # two passes of both
    assert serve.started == ["decode-0", "decode-1", "prefill-0"]
    del serve.gangs["decode-1"]  # now both would act: only the younger may
    wait_until(lambda: len(serve.gangs) == 3 and not first.healthy())
    assert serve.started[3:] == ["decode-2"]
    assert second.healthy()
    second.stop(5)
    assert not second.healthy()
    assert len(serve.gangs) == 3


def test_a_fleet_that_has_just_begun_lets_no_gang_go_whose_ranks_it_has_not_seen(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, state = ServeInMemory(READY), fleet_state(redis_url, "blind")
    state.claim()
    serve.gangs = {one.name: one for one in (gang(0), gang(1))}
    begun = reconciler(redis_url, [wants(1)], state, serve)
    begun.reconcile()
    assert len(serve.gangs) == 2
    monkeypatch.setattr(fleet, "BLIND_S", 0.0)
    begun.reconcile()
    assert len(serve.gangs) == 1
    state.forget()


def test_a_pool_that_cannot_come_up_is_tried_a_bounded_number_of_times(redis_url: str) -> None:
    serve = ServeInMemory(FAILED)
    state = fleet_state(redis_url, "bounded")
    state.claim()
    for _ in range(10):
        # A new one each time: the count survives it, the pause does not.
        fleet = reconciler(redis_url, [wants(1)], state, serve)
        fleet.reconcile()
        fleet.reconcile()
    assert serve.started == [f"decode-{n}" for n in range(MAX_FAILURES)]
    assert [g.phase for g in serve.gangs.values()] == [FAILED]
    fixed = reconciler(redis_url, [wants(1, version="v3")], state, ServeInMemory(READY))
    fixed.reconcile()
    state.forget()


def test_failures_count_while_none_comes_up_between_them(redis_url: str) -> None:
    serve, state = ServeInMemory(FAILED), fleet_state(redis_url, "in a row")
    state.claim()
    for comes_up in (False, False, True):
        serve.phase = READY if comes_up else FAILED
        begun = reconciler(redis_url, [wants(1)], state, serve)  # a new one: the pause is over
        begun.reconcile()
        begun.reconcile()
        assert state.num_failures("decode", "v2") == (0 if comes_up else len(serve.started))
    assert list(serve.gangs) == ["decode-2"]
    state.forget()


def test_after_a_failure_the_fleet_pauses(redis_url: str) -> None:
    serve = ServeInMemory(FAILED)
    state = fleet_state(redis_url, "pause")
    state.claim()
    fleet = reconciler(redis_url, [wants(1)], state, serve)
    for _ in range(5):
        fleet.reconcile()
    assert serve.started == ["decode-0"]
    state.forget()


def test_without_redis_the_fleet_waits_and_does_nothing(tmp_path: Path) -> None:
    serve = ServeInMemory(READY)
    server = RedisServer()
    url = server.start(tmp_path)
    server.stop()
    fleet = reconciler(url, [wants(1)], fleet_state(url, "away"), serve)
    fleet.start()
    time.sleep(0.5)
    assert serve.started == []
    assert fleet.healthy()
    with pytest.raises(redis.RedisError):
        fleet_state(url, "away").claim()
    server.start(tmp_path)
    wait_until(lambda: serve.started == ["decode-0"])
    fleet.stop(5)
    server.stop()


def wait_until(true: object, timeout_s: float = 8.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)
