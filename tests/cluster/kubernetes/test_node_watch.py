"""Cordons, taints and terminating pods become drain requests in Redis; what stays after all is taken back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from seamount.cluster.fleet_state import connect
from seamount.cluster.kubernetes.api import KubernetesApi
from seamount.cluster.kubernetes.node_watch import NodeWatch, to_ask, to_cancel
from seamount.cluster.kubernetes.objects import (
    LEAVING_TAINTS,
    SIGTERM_MARGIN_S,
    NodeView,
    PodView,
    Taint,
    WantedDrain,
    wanted_drains,
)
from seamount.cluster.node_drain import DrainPhase, DrainRequest, DrainRequests, DrainStatus
from seamount.wire.errors import Unavailable

from .api_server import ApiServer, Fault, node, pod

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
CLUSTER = "release-raycluster"
DEADLINE_S = 120.0


def until(condition: Callable[[], object]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("it never came true")


def seen_node(
    name: str = "n1", *, taints: tuple[str, ...] = (), schedulable: bool = True, deleted: bool = False
) -> NodeView:
    return NodeView(
        name=name,
        is_ready=True,
        is_schedulable=schedulable,
        is_deleted=deleted,
        taints=tuple(Taint(key=key, value="", effect="NoSchedule") for key in taints),
        labels={},
        allocatable={},
    )


def seen_pod(
    ip: str, *, on: str = "n1", ends_in_s: float | None = None, head: bool = False, phase: str = "Running"
) -> PodView:
    return PodView(
        name=f"pod-{ip}",
        namespace="models",
        uid=ip,
        node=on,
        ip=ip,
        phase=phase,
        is_ready=True,
        ends_at=None if ends_in_s is None else NOW + timedelta(seconds=ends_in_s),
        group="decode",
        is_head=head,
        ray_cluster=CLUSTER,
    )


def drains_of(nodes: list[NodeView], pods: list[PodView]) -> dict[str, float]:
    return {d.address: d.deadline_s for d in wanted_drains(nodes, pods, deadline_s=DEADLINE_S, now=NOW)}


@pytest.mark.parametrize("taint", LEAVING_TAINTS)
def test_every_taint_of_a_node_that_goes_empties_its_ray_nodes(taint: str) -> None:
    pods = [seen_pod("10.0.0.1"), seen_pod("10.0.0.2"), seen_pod("10.0.0.3", on="n2")]
    assert drains_of([seen_node(taints=(taint,)), seen_node("n2")], pods) == {
        "10.0.0.1": DEADLINE_S,
        "10.0.0.2": DEADLINE_S,
    }


def test_other_taints_mean_nothing() -> None:
    taints = ("nvidia.com/gpu", "node.kubernetes.io/not-ready", "DeletionCandidateOfClusterAutoscaler")
    assert drains_of([seen_node(taints=taints)], [seen_pod("10.0.0.1")]) == {}


def test_cordoned_and_deleted_nodes_go_and_heads_dead_pods_and_those_without_address_are_left_out() -> None:
    pods = [seen_pod("10.0.0.1"), seen_pod("10.0.0.2", head=True), seen_pod("10.0.0.3", phase="Failed"), seen_pod("")]
    assert drains_of([seen_node(schedulable=False)], pods) == {"10.0.0.1": DEADLINE_S}
    assert drains_of([seen_node(deleted=True)], pods) == {"10.0.0.1": DEADLINE_S}


def test_a_terminating_pod_has_what_is_left_of_its_grace_period() -> None:
    pods = [
        seen_pod("10.0.0.1", ends_in_s=50.0),
        seen_pod("10.0.0.2", ends_in_s=3.0),
        seen_pod("10.0.0.3", ends_in_s=900.0),
    ]
    assert drains_of([seen_node()], pods) == {
        "10.0.0.1": 50.0 - SIGTERM_MARGIN_S,
        "10.0.0.2": 1.0,
        "10.0.0.3": DEADLINE_S,
    }


def test_asked_once_unless_there_is_less_time_now() -> None:
    drain = WantedDrain(address="a", deadline_s=100.0, cause="c")
    asked = DrainRequest(node="a", cause="c", asked_at=1000.0, deadline_at=1100.0)
    assert to_ask([drain], [], now_s=1000.0) == [drain]
    assert to_ask([drain], [asked], now_s=1000.0) == to_ask([drain], [asked], now_s=1050.0) == []
    shorter = WantedDrain(address="a", deadline_s=20.0, cause="c")
    assert to_ask([shorter], [asked], now_s=1050.0) == [shorter]
    assert to_ask([shorter], [asked], now_s=1090.0) == []


def test_what_is_not_wanted_any_more_is_taken_back_unless_its_node_is_out_of_sight() -> None:
    drain = WantedDrain(address="a", deadline_s=100.0, cause="c")
    assert to_cancel([drain], ["a", "b", "c"], present=()) == ["b", "c"]
    assert to_cancel([drain], ["a", "b", "c"], present=["b", "d"]) == ["c"]


class Watched:
    """A node watch, what it closed and what it told of restarts."""

    def __init__(self, api: KubernetesApi, drains: DrainRequests, *, watches_nodes: bool = True) -> None:
        self.drains, self.closed, self.restarts = drains, list[str](), list[tuple[str, str]]()
        self.watch = NodeWatch(
            api,
            drains,
            namespace="models",
            ray_cluster=CLUSTER,
            deadline_s=DEADLINE_S,
            watches_nodes=watches_nodes,
            on_restart=lambda resource, cause: self.restarts.append((resource, cause)),
            close_node=self._close,
            max_pause_s=0.2,
        )
        self.failures: list[Exception] = []
        self.watch.start()

    def _close(self, node_id: str) -> None:
        if self.failures:
            raise self.failures.pop()
        self.closed.append(node_id)

    @property
    def asked(self) -> dict[str, str]:
        return {request.node: request.cause for request in self.drains.requests()}


@pytest.fixture
def drains(redis_url: str) -> DrainRequests:
    return DrainRequests(connect(redis_url, timeout_s=1.0), f"test-{secrets.token_hex(4)}")


@pytest.fixture
def watched(server: ApiServer, api: KubernetesApi, drains: DrainRequests) -> Iterator[Watched]:
    server.put("nodes", node("n1"))
    server.put("nodes", node("n2"))
    server.put("pods", pod("decode-a", "n1", "10.0.0.1"))
    server.put("pods", pod("decode-b", "n2", "10.0.0.2"))
    server.put("pods", pod("head", "n1", "10.0.0.9", head=True))
    server.put("pods", pod("stranger", "n1", "10.0.0.7", cluster="another"))
    started = Watched(api, drains)
    until(lambda: len(server.watches) == 2)
    yield started
    started.watch.stop()


def test_a_cordon_empties_and_closes_and_an_uncordon_takes_it_back(server: ApiServer, watched: Watched) -> None:
    server.put("nodes", node("n1", cordoned=True))
    until(lambda: watched.asked == {"10.0.0.1": f"kubernetes {CLUSTER}: node n1: it is cordoned"})
    server.put("nodes", node("n2", cordoned=True))
    until(lambda: set(watched.asked) == {"10.0.0.1", "10.0.0.2"})
    server.put("nodes", node("n2"))
    until(lambda: set(watched.asked) == {"10.0.0.1"})
    assert watched.closed == []
    watched.drains.tell(DrainStatus(node="10.0.0.1", phase=DrainPhase.DRAINING, node_id="ab", gangs=("decode-0",)))
    time.sleep(0.3)
    assert watched.closed == []
    watched.drains.tell(DrainStatus(node="10.0.0.1", phase=DrainPhase.EMPTY, node_id="ab"))
    until(lambda: watched.closed == ["ab"])
    server.remove("pods", "decode-a", "models")
    until(lambda: watched.asked == {})  # the next pod may get its address
    assert watched.closed == ["ab"]


def test_a_node_that_cannot_be_closed_is_tried_again_and_holds_up_no_other(server: ApiServer, watched: Watched) -> None:
    watched.failures = [ValueError("not a typed error"), Unavailable("Ray is busy", reason="NOT_CLOSED")]
    for name, address in (("n1", "10.0.0.1"), ("n2", "10.0.0.2")):
        watched.drains.tell(DrainStatus(node=address, phase=DrainPhase.EMPTY, node_id=f"of {name}"))
        server.put("nodes", node(name, cordoned=True))
    until(lambda: sorted(watched.closed) == ["of n1", "of n2"])


def test_a_pod_that_terminates_is_drained_within_its_grace_period(server: ApiServer, watched: Watched) -> None:
    server.put("nodes", node("n2", taints=("karpenter.sh/disrupted",)))
    until(lambda: set(watched.asked) == {"10.0.0.2"})
    server.terminate("decode-b", "models", grace_s=60.0)
    until(lambda: "terminates" in watched.asked["10.0.0.2"])
    status = watched.drains.drain_status("10.0.0.2")
    assert status is not None
    assert 30.0 < status.remaining_s <= 60.0 - SIGTERM_MARGIN_S


def test_a_cordon_while_the_watch_is_broken_is_found_and_nothing_is_taken_back_meanwhile(
    server: ApiServer, watched: Watched
) -> None:
    server.put("nodes", node("n1", cordoned=True))
    until(lambda: set(watched.asked) == {"10.0.0.1"})
    server.faults.append(Fault("GET", 503, times=100_000))
    server.drop_watches()
    until(lambda: ("nodes", "dropped") in watched.restarts and ("pods", "dropped") in watched.restarts)
    server.put("nodes", node("n1"))
    server.put("nodes", node("n2", cordoned=True))
    server.forget()
    time.sleep(0.3)
    assert set(watched.asked) == {"10.0.0.1"}
    server.faults.clear()
    until(lambda: set(watched.asked) == {"10.0.0.2"})
    assert ("nodes", "gone") in watched.restarts


def test_a_watch_that_starts_anew_takes_back_what_the_one_before_asked_for_and_leaves_others_alone(
    server: ApiServer, api: KubernetesApi, drains: DrainRequests
) -> None:
    server.put("nodes", node("n1"))
    server.put("pods", pod("decode-a", "n1", "10.0.0.1"))
    drains.request_drain("10.0.0.1", deadline_s=60.0, cause=f"kubernetes {CLUSTER}: node n1: it is cordoned")
    drains.request_drain("10.0.0.5", deadline_s=60.0, cause="kubernetes other-raycluster: node n5: it is cordoned")
    drains.request_drain("a-host", deadline_s=60.0, cause="an operator")
    watched = Watched(api, drains)
    try:
        until(lambda: set(watched.asked) == {"10.0.0.5", "a-host"})
    finally:
        watched.watch.stop()


def test_without_the_right_to_read_nodes_pods_are_watched_all_the_same(
    server: ApiServer, api: KubernetesApi, drains: DrainRequests
) -> None:
    server.put("nodes", node("n1", cordoned=True))
    server.put("pods", pod("decode-a", "n1", "10.0.0.1"))
    server.put("pods", pod("decode-b", "n1", "10.0.0.2"))
    server.forbidden.update({"list nodes", "watch nodes"})
    watched = Watched(api, drains)
    try:
        server.terminate("decode-b", "models")
        until(lambda: set(watched.asked) == {"10.0.0.2"})
        until(lambda: ("nodes", "refused") in watched.restarts)
        server.remove("pods", "decode-b", "models")
        until(lambda: watched.asked == {})
        server.terminate("decode-a", "models")
        until(lambda: set(watched.asked) == {"10.0.0.1"})
    finally:
        watched.watch.stop()
    server.forbidden.clear()
    only_pods = Watched(api, drains, watches_nodes=False)
    try:
        before = server.count("/nodes")
        server.put("pods", pod("decode-c", "n1", "10.0.0.3"))
        server.terminate("decode-c", "models")
        until(lambda: set(only_pods.asked) == {"10.0.0.1", "10.0.0.3"})
        assert server.count("/nodes") == before
    finally:
        only_pods.watch.stop()
