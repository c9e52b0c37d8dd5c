"""The fleet's parts by themselves: what it measures, how it empties gangs and nodes, how Ray clusters give way."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection
from concurrent.futures import Future

import pytest

from seamount.cluster.autoscaling import AutoscalingSettings
from seamount.cluster.fleet_draining import GangDrains
from seamount.cluster.fleet_look import half_drained, homeless, needlessly_homeless
from seamount.cluster.fleet_meter import Meter, SeenRank, router_load
from seamount.cluster.fleet_nodes import HOOKS_S, Node, NodeRequests, NodeWork, emptying, node_work, statuses
from seamount.cluster.fleet_plan import Cause, Phase, RunningGang, WantedPool
from seamount.cluster.fleet_routers import RouterCare
from seamount.cluster.fleet_scaling import Scaler
from seamount.cluster.fleet_siblings import SIBLING_DEAD_AFTER_S, Siblings
from seamount.cluster.fleet_state import FleetState, connect
from seamount.cluster.fleet_view import View
from seamount.cluster.leaving import LeavingRouters
from seamount.cluster.load import RouterLoad
from seamount.cluster.node_drain import DrainPhase, DrainRequest, DrainRequests
from seamount.router.directory import PeerRecord, Role
from seamount.v1 import admin_pb2, worker_pb2
from seamount.wire.errors import FailedPrecondition, NotFound
from seamount.wire.ids import RankId


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def peer(peer_id: str, role: Role = Role.DECODE, *, node_id: str = "n1") -> PeerRecord:
    gang_id = "" if role is Role.ROUTER else peer_id.rpartition(".")[0]
    return PeerRecord(
        peer_id=peer_id,
        role=role,
        address="10.0.0.1:5000",
        version="1",
        process_id=1,
        instance=f"i{peer_id.replace(':', '')}",
        gang_id=gang_id,
        node_id=node_id,
    )


def rank(peer_id: str, *, node_id: str = "n1", role: Role = Role.DECODE, **state: float) -> SeenRank:
    return SeenRank(record=peer(peer_id, role, node_id=node_id), state=worker_pb2.RankState(num_pages=100, **state))


def gang(number: int, *nodes: str, phase: Phase = Phase.READY, version: str = "v") -> RunningGang:
    return RunningGang(pool="decode", number=number, version=version, phase=phase, nodes=frozenset(nodes))


# ---- Meter


def test_a_gangs_load_is_the_sum_of_its_ranks() -> None:
    ranks = [
        rank("decode-3-abc.0", num_free_pages=40, num_cached_pages=30, num_leased_pages=10, prefill_tokens_per_s=500.0),
        rank("decode-3-abc.1", num_free_pages=100, num_running=2, num_places=8, prefill_tokens_per_s=700.0),
    ]
    (load, starting) = Meter(Clock()).gangs(
        [gang(3), gang(4, phase=Phase.STARTING), gang(5, phase=Phase.LEAVING)], ranks
    )
    assert (load.name, load.is_ready, load.num_ranks, load.num_pages) == ("decode-3", True, 2, 200)
    assert (load.num_held_pages, load.num_cached_pages) == (40, 20)
    assert (load.num_running, load.num_places, load.prompt_tokens_per_s) == (2, 8, 1200.0)
    assert (starting.name, starting.is_ready) == ("decode-4", False)


def test_prompt_tokens_count_as_they_come_whether_computed_or_queued() -> None:
    meter = Meter(clock := Clock())
    for computed, queued in ((1000, 0), (1000, 500), (1400, 300), (1700, 0)):
        meter.gangs([gang(0)], [rank("decode-0-a.0", num_computed_tokens=computed, num_queued_prefill_tokens=queued)])
        clock.now_s += 1.0
    assert meter.num_prompt_tokens == 700
    meter.gangs([gang(0)], [rank("decode-0-b.0", num_computed_tokens=50)])  # a rank anew: nothing has come by that
    assert meter.num_prompt_tokens == 700


def test_the_time_between_tokens_is_measured_while_no_prompt_is_computed() -> None:
    meter = Meter(clock := Clock())

    def seen(sampled: int, *, running: int = 4, queued: int = 0) -> float:
        state = {"num_sampled_tokens": sampled, "num_running": running, "num_queued_prefill_tokens": queued}
        (load,) = meter.gangs([gang(0)], [rank("decode-0-a.0", **state)])
        clock.now_s += 1.0
        return load.inter_token_s

    assert seen(0) == 0.0
    assert seen(100) == pytest.approx(0.04)  # 4 answers, 100 tokens a second
    assert seen(110, queued=900) == pytest.approx(0.04)
    assert seen(120) == pytest.approx(0.04)  # a prompt was under way at the look before
    assert seen(320) == pytest.approx(0.04 + 0.3 * (0.02 - 0.04))


def test_a_router_of_another_release_may_say_nothing() -> None:
    record = peer("router-1", Role.ROUTER)
    said = admin_pb2.RouterState(num_streams=7, cores=0.5).SerializeToString()
    assert router_load(record, said) == RouterLoad(name="router-1", num_streams=7, cores=0.5)
    assert router_load(record, b"") == RouterLoad(name="router-1")
    assert router_load(record, b"\xff\xff") == RouterLoad(name="router-1")


# ---- GangDrains


class Ranks:
    """Answers drains as a test wants it; ``asked``: rank, seconds for turns, excluded."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, frozenset[RankId]]] = []
        self.answers: dict[str, list[admin_pb2.DrainRankResponse | Exception]] = {}
        self.told = threading.Event()

    def drain(
        self, rank_id: RankId, *, deadline_s: float, turns_s: float, excluded: Collection[RankId]
    ) -> Future[admin_pb2.DrainRankResponse]:
        self.asked.append((rank_id, turns_s, frozenset(excluded)))
        answers = self.answers.get(rank_id, [])
        answer = answers.pop(0) if answers else admin_pb2.DrainRankResponse(is_empty=True)
        told: Future[admin_pb2.DrainRankResponse] = Future()
        if isinstance(answer, Exception):
            told.set_exception(answer)
        else:
            told.set_result(answer)
        return told


RANKS = [rank("decode-0-a.0"), rank("decode-0-a.1"), rank("decode-1-b.0"), rank("decode-2-c.0")]


def begin(drains: GangDrains, name: str, *, timeout_s: float = 60.0) -> None:
    drains.begin(name, Cause.SCALE_DOWN, RANKS, turns_s=5.0, timeout_s=timeout_s, excluded_gangs={"decode-2"})


def test_every_rank_of_a_gang_is_drained_to_those_that_stay() -> None:
    ranks = Ranks()
    drains = GangDrains(ranks, clock := Clock())
    nobody = FailedPrecondition("nobody is there", reason="NO_OTHER_RANK")
    defect, gone = ValueError("not a typed error"), NotFound("gone", reason="RANK_NOT_FOUND")
    ranks.answers["decode-0-a.1"] = [nobody, defect, admin_pb2.DrainRankResponse(), gone]
    begin(drains, "decode-0")
    begin(drains, "decode-0")
    ended = until_ended(drains)
    assert [(one.name, one.is_empty) for one in ended] == [("decode-0", True)]
    asked = [rank_id for rank_id, _, _ in ranks.asked]
    assert (asked.count("decode-0-a.0"), asked.count("decode-0-a.1")) == (1, 4)
    assert all(excluded == {"decode-0-a.0", "decode-0-a.1", "decode-2-c.0"} for _, _, excluded in ranks.asked)
    assert "decode-0" in drains
    drains.forget("decode-0")
    assert "decode-0" not in drains
    assert clock.now_s == 100.0
    drains.stop()


def test_a_gang_that_cannot_be_emptied_goes_when_its_time_is_over() -> None:
    ranks = Ranks()
    drains = GangDrains(ranks, clock := Clock())
    ranks.answers["decode-1-b.0"] = [FailedPrecondition("nobody is there", reason="NO_OTHER_RANK")] * 1000
    begin(drains, "decode-1", timeout_s=50.0)
    assert drains.ended() == []
    drains.hasten("decode-1", timeout_s=20.0)
    clock.now_s += 21.0
    (ended,) = drains.ended()
    assert (ended.is_empty, ended.cause, ended.took_s) == (False, Cause.SCALE_DOWN, 21.0)
    drains.stop()


def until_ended(drains: GangDrains) -> list:
    waited = threading.Event()
    for _ in range(200):
        if ended := drains.ended():
            return ended
        waited.wait(0.05)
    raise AssertionError("not ended")


# ---- nodes


NODES = [
    Node(node_id="n1", names=frozenset({"n1", "10.0.0.1", "pod-a"})),
    Node(node_id="n2", names=frozenset({"n2", "10.0.0.2", "pod-b"})),
]


def request(node: str, *, asked_at: float = 1000.0, deadline_s: float = 100.0) -> DrainRequest:
    return DrainRequest(node=node, cause="", asked_at=asked_at, deadline_at=asked_at + deadline_s)


@pytest.mark.parametrize("name", ["n1", "10.0.0.1", "pod-a"])
def test_a_node_is_known_by_id_address_and_host_name(name: str) -> None:
    (found,) = emptying([request(name), request("elsewhere")], NODES, now=1010.0, replacement_s=30.0)
    assert (found.node_id, found.left_s, found.is_overdue) == ("n1", 90.0 - HOOKS_S, False)


@pytest.mark.parametrize(("deadline_s", "overdue_at"), [(100.0, 1030.0), (20.0, 1010.0)])
def test_replacements_are_waited_for_but_not_for_more_than_half_of_the_time(
    deadline_s: float, overdue_at: float
) -> None:
    asked = [request("n1", deadline_s=deadline_s)]
    assert not emptying(asked, NODES, now=overdue_at - 0.1, replacement_s=30.0)[0].is_overdue
    assert emptying(asked, NODES, now=overdue_at, replacement_s=30.0)[0].is_overdue


def routers(*nodes: str) -> View:
    found = [peer(f"router-{number}", Role.ROUTER, node_id=node) for number, node in enumerate(nodes)]
    return View(routers=tuple((record, RouterLoad(name=record.peer_id)) for record in found))


def test_what_a_request_concerns_and_what_those_who_asked_are_told() -> None:
    concerned = emptying([request("pod-a")], NODES, now=1000.0, replacement_s=30.0)
    running = [gang(0, "n1"), gang(1, "n2"), gang(2, "n1", "n2"), gang(3, "n1", phase=Phase.LEAVING)]
    work = node_work(concerned, running, routers("n1", "n2"))
    assert work.gangs.keys() == {"decode-0", "decode-2"}
    assert (work.overdue, work.avoided, work.routers) == (frozenset(), {"n1"}, {"router-0"})
    (told,) = statuses(work, running, routers("n1", "n2"))
    assert (told.phase, told.node_id) == (DrainPhase.DRAINING, "n1")
    assert (told.gangs, told.routers) == (("decode-0", "decode-2", "decode-3"), ("router-0",))
    (told,) = statuses(work, [gang(1, "n2")], routers("n2"))
    assert (told.phase, told.node, told.gangs) == (DrainPhase.EMPTY, "pod-a", ())


def test_the_last_router_leaves_only_when_it_is_overdue() -> None:
    early, late = (emptying([request("n1")], NODES, now=now, replacement_s=30.0) for now in (1000.0, 1030.0))
    assert node_work(early, [], routers("n1")).routers == frozenset()
    assert node_work(late, [], routers("n1")).routers == {"router-0"}


def test_a_gang_that_finds_no_node_for_avoiding_one_that_is_back_is_started_anew(redis_url: str) -> None:
    (state,) = states(redis_url, "avoids")
    state.note_avoided("decode-1", ["n1", "n2"])
    running = [
        gang(0, phase=Phase.STARTING),
        gang(1, phase=Phase.STARTING),
        gang(2, "n1", phase=Phase.STARTING),
        gang(3),
    ]
    assert homeless(running) == ["decode-0", "decode-1"]
    avoided = {name: state.avoided_by(name) for name in homeless(running)}
    assert avoided == {"decode-0": frozenset(), "decode-1": {"n1", "n2"}}
    assert needlessly_homeless(avoided, {"n3"}) == []
    assert needlessly_homeless(avoided, {"n2", "n3"}) == ["decode-1"]
    state.forget()


def test_a_gang_with_a_rank_that_drains_is_on_its_way_out() -> None:
    view = View(ranks=(rank("decode-0-a.0"), rank("decode-0-a.1", draining=True), rank("decode-1-b.0", draining=True)))
    assert half_drained(view, ()) == ["decode-0", "decode-1"]
    assert half_drained(view, ("decode-1",)) == ["decode-0"]


def test_a_request_ends_with_the_node_that_it_was_for(redis_url: str) -> None:
    drains = DrainRequests(connect(redis_url, timeout_s=1.0), f"test-{secrets.token_hex(4)}")
    drains.request_drain("pod-a", deadline_s=60.0)
    requests = NodeRequests(drains, 10.0)
    for _ in range(2):
        assert requests.work([], NODES, View()).avoided == {"n1"}
    back = [Node(node_id="n3", names=frozenset({"n3", "10.0.0.1", "pod-a"})), NODES[1]]
    assert requests.work([], back, View()).avoided == set()
    assert drains.drain_status("pod-a") is None
    drains.request_drain("pod-a", deadline_s=60.0)
    assert requests.work([], back, View()).avoided == {"n3"}


class Replicas:
    """The number of routers as Serve keeps it."""

    def __init__(self) -> None:
        self.number: int | None = 2
        self.scaled: list[int] = []

    def num_routers(self) -> int | None:
        return self.number

    def scale_routers(self, number: int) -> None:
        self.number = number
        self.scaled.append(number)


def test_a_node_that_is_emptied_has_a_router_more_elsewhere_until_it_is_closed_or_has_its_own_back(
    redis_url: str,
) -> None:
    leaving = LeavingRouters(connect(redis_url, timeout_s=1.0), f"test-{secrets.token_hex(4)}")
    serve = Replicas()
    care, scaled = RouterCare(leaving, serve), serve.scaled
    both = ["n1", "n2"]
    care.mind(1, routers("n1"), NodeWork(), both)
    care.mind(1, routers("n1"), NodeWork(avoided=frozenset({"n1"})), both)
    assert scaled == [1, 2]  # the only one stays until another one serves
    assert not leaving.is_asked("router-0")
    going = NodeWork(avoided=frozenset({"n1"}), routers=frozenset({"router-0"}))
    care.mind(1, routers("n1", "n2"), going, both)
    assert leaving.is_asked("router-0")
    gone = View(routers=routers("n1", "n2").routers[1:])
    care.mind(1, gone, NodeWork(avoided=frozenset({"n1"})), both)
    assert scaled == [1, 2]
    care.mind(1, gone, NodeWork(), both)  # the node stays after all
    assert not leaving.is_asked("router-0")
    assert scaled == [1, 2]  # were there one fewer now, Serve might take the one that serves
    care.mind(1, routers("n1", "n2"), NodeWork(), both)
    assert scaled == [1, 2, 1]
    care.mind(1, routers("n1", "n2"), going, both)
    care.mind(1, gone, NodeWork(), ["n2"])  # closed
    assert scaled == [1, 2, 1, 2, 1]


def test_the_number_of_routers_stands_when_serves_configuration_is_applied_again(redis_url: str) -> None:
    serve = Replicas()
    care = RouterCare(LeavingRouters(connect(redis_url, timeout_s=1.0), f"test-{secrets.token_hex(4)}"), serve)
    for _ in range(2):
        care.mind(3, routers("n1"), NodeWork(), ["n1"])
    assert serve.scaled == [3]
    serve.number = 2
    care.mind(3, routers("n1"), NodeWork(), ["n1"])
    assert serve.scaled == [3, 3]
    serve.number = None  # its application is built anew
    care.mind(3, routers("n1"), NodeWork(), ["n1"])
    assert serve.scaled == [3, 3]


# ---- siblings


def states(redis_url: str, *sessions: str) -> list[FleetState]:
    client = connect(redis_url, timeout_s=1.0)
    name = f"test-{secrets.token_hex(4)}"
    made = [FleetState(client, cluster_name=name, ray_session=session) for session in sessions]
    for state in made:
        state.claim()
    return made


def test_an_older_ray_cluster_gives_way_to_a_younger_one_that_lives_and_serves(redis_url: str) -> None:
    old, young = states(redis_url, "first", "second")
    assert (old.number, young.number) == (1, 2)
    clock = Clock()
    of_old, of_young = Siblings(old, clock), Siblings(young, clock)
    old.tell_siblings(is_serving=True)
    young.tell_siblings(is_serving=False)
    assert not of_old.look().is_outlived
    for _ in range(2):
        clock.now_s += 1.0
        old.tell_siblings(is_serving=True)
        young.tell_siblings(is_serving=False)
        assert not of_old.look().is_outlived
        of_young.look()
    assert of_young.look().elder == "first"
    assert of_old.look().elder is None
    clock.now_s += 1.0
    young.tell_siblings(is_serving=True)
    assert of_old.look().is_outlived
    assert (old.was_serving(), young.was_serving()) == (True, True)
    assert not of_young.look().is_outlived
    clock.now_s += SIBLING_DEAD_AFTER_S  # the younger one is gone again, and the older one does not beat either
    assert not of_old.look().is_outlived
    assert of_young.look().elder is None
    old.claim()  # its next fleet is still of the same Ray cluster
    assert old.number == 1
    young.forget()
    assert old.siblings() == []
    old.forget()


# ---- Scaler


POOLS = [
    WantedPool(pool="decode", num_gangs=2, expert_parallel=2, version="v"),
    WantedPool(pool="prefill", num_gangs=0, expert_parallel=1, version="p"),
]
ON = AutoscalingSettings.model_validate(
    {"enabled": True, "decode": {"max_gangs": 4}, "prefill": {"max_gangs": 0}, "grow_after_s": 2, "shrink_after_s": 5}
    | {"start_s": 1}
)
FULL = {"num_free_pages": 5, "num_running": 1, "prefill_tokens_per_s": 100.0}


def numbers(
    scaler: Scaler,
    running: list[RunningGang],
    view: View,
    leaving: Collection[str] = (),
    *,
    elder: str | None = None,
) -> list[int]:
    return [pool.num_gangs for pool in scaler.wanted(running, view, leaving, elder=elder).pools]


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
    older = [gang(0, version="u"), gang(1)]
    assert numbers(after, older, full) == [3, 0]  # an update goes first
    state.forget()


def test_a_younger_ray_cluster_begins_with_as_many_gangs_as_the_older_one_wants(redis_url: str) -> None:
    old, young = states(redis_url, "loaded", "upgraded")
    clock = Clock()
    of_old, of_young = Scaler(ON, POOLS, old, clock), Scaler(ON, POOLS, young, clock)
    running = [gang(0), gang(1)]
    full = View(ranks=(rank("decode-0-a.0", **FULL), rank("decode-1-b.0", **FULL)), routers=routers("n1").routers)
    calm = View(ranks=(rank("decode-0-c.0", num_free_pages=100),), routers=routers("n1").routers)
    assert numbers(of_young, [gang(0)], calm, elder="loaded") == [2, 0]  # nothing is known of it yet
    for _ in range(5):
        clock.now_s += 1.0
        wanted = numbers(of_old, running, full)
    assert wanted == [3, 0]
    for _ in range(10):  # its own gangs have nothing to do
        clock.now_s += 1.0
        assert numbers(of_young, [gang(0)], calm, elder="loaded") == [3, 0]
    assert numbers(of_young, [gang(0)], calm) == [3, 0]  # from here on it decides: shrinking takes its time
    for state in (old, young):
        state.forget()


def test_how_long_gangs_take_to_start_is_measured_and_kept(redis_url: str) -> None:
    (state,) = states(redis_url, "starts")
    scaler = Scaler(ON, POOLS, state, Clock())
    scaler.started("decode", 40.0)
    scaler.started("decode", 60.0)
    assert state.recall("start_s:decode") == 50.0
    assert state.recall("start_s:prefill") is None
    state.forget()
