"""A list and a watch through everything that happens to them: 410, broken connections, refusals, a server away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from seamount.cluster.kubernetes.api import KubernetesApi, Selection
from seamount.cluster.kubernetes.objects import NodeView, node_view
from seamount.cluster.kubernetes.reflector import Reflector
from seamount.wire.errors import PermissionDenied, Unavailable

from .api_server import ApiServer, Fault, node


def until(condition: Callable[[], object]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("it never came true")


class Followed:
    """A reflector of all nodes, and what it told."""

    def __init__(self, api: KubernetesApi) -> None:
        self.restarts: list[str] = []
        self.changed = threading.Event()
        self.reflector: Reflector[NodeView] = Reflector(
            api,
            Selection(kind="nodes"),
            node_view,
            on_change=self.changed.set,
            on_restart=self.restarts.append,
            max_pause_s=0.2,
        )
        self.reflector.start()

    @property
    def names(self) -> set[str]:
        return {one.name for one in self.reflector.objects}

    @property
    def cordoned(self) -> set[str]:
        return {one.name for one in self.reflector.objects if one.leaving_cause}


@pytest.fixture
def followed(server: ApiServer, api: KubernetesApi) -> Iterator[Followed]:
    server.put("nodes", node("n1"))
    started = Followed(api)
    until(lambda: started.names == {"n1"} and server.watches)
    yield started
    started.reflector.stop()
    assert not started.reflector._thread.is_alive()


def num_lists(server: ApiServer) -> int:
    return server.count(r"GET /api/v1/nodes(?!.*watch)")


def test_changes_come_by_the_watch_after_one_list(server: ApiServer, followed: Followed) -> None:
    server.put("nodes", node("n2"))
    until(lambda: followed.names == {"n1", "n2"})
    server.put("nodes", node("n1", cordoned=True))
    until(lambda: followed.cordoned == {"n1"})
    server.remove("nodes", "n2")
    until(lambda: followed.names == {"n1"})
    assert num_lists(server) == 1
    assert followed.restarts == []
    assert followed.reflector.is_current


def test_a_dropped_watch_goes_on_where_it_stood(server: ApiServer, followed: Followed) -> None:
    for number in range(2, 5):
        server.drop_watches()
        server.put("nodes", node(f"n{number}"))  # while no watch stands
        until(lambda number=number: f"n{number}" in followed.names and server.watches)
    assert num_lists(server) == 1
    assert "dropped" in followed.restarts
    until(lambda: followed.reflector.is_current)


@pytest.mark.parametrize("gone_as_status", [False, True], ids=["event", "status"])
def test_gone_means_listing_again(server: ApiServer, followed: Followed, gone_as_status: bool) -> None:
    server.gone_as_status = gone_as_status
    server.faults.append(Fault("watch=True", 503, times=2))  # time for the server to forget meanwhile
    server.drop_watches()
    server.remove("nodes", "n1")
    server.put("nodes", node("n2"))
    server.forget()
    until(lambda: followed.names == {"n2"})
    assert num_lists(server) == 2
    assert "gone" in followed.restarts
    server.put("nodes", node("n3"))
    until(lambda: followed.names == {"n2", "n3"})
    assert num_lists(server) == 2


def test_a_refused_watch_tells_what_lacks_and_works_once_it_is_granted(server: ApiServer, api: KubernetesApi) -> None:
    server.put("nodes", node("n1"))
    server.forbidden.add("watch nodes")
    followed = Followed(api)
    try:
        until(lambda: isinstance(followed.reflector.error, PermissionDenied))
        assert 'verbs: ["watch"]' in str(followed.reflector.error)
        assert followed.names == {"n1"}  # what was listed stands
        assert not followed.reflector.is_current
        assert set(followed.restarts) == {"refused"}
        server.forbidden.clear()
        server.put("nodes", node("n2"))
        until(lambda: followed.names == {"n1", "n2"})
        assert followed.reflector.error is None
    finally:
        followed.reflector.stop()


def test_while_the_server_is_away_the_last_known_objects_stand(server: ApiServer, followed: Followed) -> None:
    server.faults.append(Fault("GET", 503, times=100_000))
    server.drop_watches()
    until(lambda: isinstance(followed.reflector.error, Unavailable))
    assert followed.names == {"n1"}
    before = len(server.requests)
    time.sleep(1.0)
    assert len(server.requests) - before < 60  # it pauses
    server.faults.clear()
    server.put("nodes", node("n2"))
    until(lambda: followed.names == {"n1", "n2"})


def test_it_stops_while_it_watches_and_while_it_pauses(server: ApiServer, api: KubernetesApi) -> None:
    first = Followed(api)
    until(lambda: server.watches)
    first.reflector.stop()
    server.faults.append(Fault("GET", 503, times=100_000))
    second = Followed(api)
    until(lambda: second.reflector.error is not None)
    second.reflector.stop()
    assert not any(one.reflector._thread.is_alive() for one in (first, second))
