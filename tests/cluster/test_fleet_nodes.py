"""Nodes that are to be emptied: what concerns the fleet, what those who asked are told, which routers go."""

from __future__ import annotations

import secrets

import pytest

from harness.fleet_samples import gang, rank, routers, states
from seamount.cluster.fleet_look import half_drained, homeless, needlessly_homeless
from seamount.cluster.fleet_nodes import HOOKS_S, Node, NodeRequests, NodeWork, emptying, node_work, statuses
from seamount.cluster.fleet_plan import Phase
from seamount.cluster.fleet_routers import RouterCare
from seamount.cluster.fleet_state import connect
from seamount.cluster.fleet_view import View
from seamount.cluster.leaving import LeavingRouters
from seamount.cluster.node_drain import DrainPhase, DrainRequest, DrainRequests

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
