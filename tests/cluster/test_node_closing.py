"""``seamount drain``: a request in Redis, and a fleet that answers or does not."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seamount.cluster import node_closing
from seamount.cluster.cli import main
from seamount.cluster.fleet_state import connect
from seamount.cluster.node_closing import empty_node
from seamount.cluster.node_drain import DrainPhase, DrainRequests, DrainStatus
from seamount.cluster.redis_server import RedisServer
from seamount.wire.errors import DeadlineExceeded, InvalidArgument, Unavailable


@pytest.fixture
def cluster_name() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def drains(redis_url: str, cluster_name: str) -> DrainRequests:
    return DrainRequests(connect(redis_url, timeout_s=1.0), cluster_name)


@contextmanager
def answering(drains: DrainRequests, *statuses: DrainStatus) -> Iterator[None]:
    """A fleet that tells these statuses, one after the other, of the node that is asked for."""

    def answer() -> None:
        for _ in range(400):
            asked = {request.node for request in drains.requests()}
            if {status.node for status in statuses} & asked:
                break
            time.sleep(0.02)
        for status in statuses:
            drains.tell(status)
            time.sleep(0.4)

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    thread.join()


def draining(node: str, *gangs: str) -> DrainStatus:
    return DrainStatus(node=node, phase=DrainPhase.DRAINING, node_id="ab12", gangs=gangs, detail="moving sessions")


def empty(node: str) -> DrainStatus:
    return DrainStatus(node=node, phase=DrainPhase.EMPTY, node_id="ab12")


def test_it_waits_until_the_fleet_says_empty(drains: DrainRequests) -> None:
    seen: list[DrainStatus] = []
    with answering(drains, draining("n1", "decode-0", "decode-1"), draining("n1", "decode-1"), empty("n1")):
        status = empty_node(drains, "n1", deadline_s=30.0, cause="a test", on_status=seen.append)
    assert (status.phase, status.node_id) == (DrainPhase.EMPTY, "ab12")
    assert {len(one.gangs) for one in seen} == {2, 1, 0}
    assert [request.cause for request in drains.requests()] == ["a test"]


def test_without_a_fleet_it_says_so_soon(drains: DrainRequests) -> None:
    with pytest.raises(Unavailable, match="no fleet knows the node n1") as caught:
        empty_node(drains, "n1", deadline_s=30.0, cause="a test", taken_up_s=0.3)
    assert caught.value.reason == "NO_FLEET"


def test_a_fleet_that_falls_silent_is_not_waited_for(drains: DrainRequests) -> None:
    with answering(drains, draining("n1", "decode-0")), pytest.raises(Unavailable, match="has said nothing") as caught:
        empty_node(drains, "n1", deadline_s=30.0, cause="a test", gone_s=0.6)
    assert caught.value.reason == "NO_FLEET"


def test_what_an_earlier_fleet_told_is_not_the_silence_of_this_one(drains: DrainRequests) -> None:
    drains.request_drain("n1", deadline_s=60.0)
    drains.tell(draining("n1", "decode-0"))
    time.sleep(0.8)
    threading.Timer(0.3, drains.tell, [empty("n1")]).start()
    assert empty_node(drains, "n1", deadline_s=30.0, cause="a test", gone_s=0.7).phase is DrainPhase.EMPTY


def test_at_the_deadline_it_names_what_is_left(drains: DrainRequests) -> None:
    with answering(drains, draining("n1", "decode-7")), pytest.raises(DeadlineExceeded, match="decode-7"):
        empty_node(drains, "n1", deadline_s=1.0, cause="a test")


def test_a_cancelled_drain_ends_the_wait(drains: DrainRequests) -> None:
    threading.Timer(0.3, drains.cancel_drain, ["n1"]).start()
    with pytest.raises(Unavailable) as caught:
        empty_node(drains, "n1", deadline_s=30.0, cause="a test")
    assert caught.value.reason == "DRAIN_CANCELLED"


def test_a_redis_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    with RedisServer() as server:
        drains = DrainRequests(connect(server.start(tmp_path), timeout_s=0.2), "test")
        drains.request_drain("n1", deadline_s=30.0)
        drains.tell(empty("n1"))
        server.stop()
        threading.Timer(0.5, server.start, [tmp_path]).start()
        assert empty_node(drains, "n1", deadline_s=30.0, cause="a test").phase is DrainPhase.EMPTY
        server.stop()
        with pytest.raises(Unavailable) as caught:
            empty_node(drains, "n1", deadline_s=30.0, cause="a test", taken_up_s=0.3)
        assert caught.value.reason == "STORE_UNAVAILABLE"


# ---- the command


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str, cluster_name: str
) -> Callable[..., tuple[int, list[str]]]:
    """The exit code of ``seamount drain ...``, and the nodes that Ray was asked to close."""
    closed: list[str] = []
    config = tmp_path / "serving.yaml"
    config.write_text(f"cluster_name: {cluster_name}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEAMOUNT_REDIS_URL", redis_url)
    monkeypatch.setattr(node_closing, "close_node", lambda node_id, **options: closed.append(node_id))

    def call(*arguments: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as caught:
            main(["drain", "--config", str(config), *arguments])
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), closed

    return call


def test_drain_empties_then_closes(
    run: Callable[..., tuple[int, list[str]]], drains: DrainRequests, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(drains, draining("10.0.0.7", "decode-0"), empty("10.0.0.7")):
        assert run("10.0.0.7", "--json") == (0, ["ab12"])
    told = capsys.readouterr()
    assert json.loads(told.out) == {"node": "10.0.0.7", "node_id": "ab12", "phase": "empty"}
    assert "10.0.0.7 0/1" in told.err
    assert "10.0.0.7 1/1" in told.err


def test_this_node_is_the_one_of_its_host_name(
    run: Callable[..., tuple[int, list[str]]], drains: DrainRequests
) -> None:
    with answering(drains, empty(socket.gethostname())):
        assert run("--this-node") == (0, ["ab12"])


def test_a_pod_ends_at_once_where_no_fleet_answers_and_an_operator_is_told(
    run: Callable[..., tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--this-node", "--deadline", "0.3") == (0, [])
    assert "not drained" in capsys.readouterr().err
    assert run("10.0.0.9", "--deadline", "0.3") == (1, [])
    assert "no fleet knows the node 10.0.0.9" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("n1", "--this-node")])
def test_one_node_is_to_be_named(run: Callable[..., tuple[int, list[str]]], arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == (2, [])


def test_without_a_redis_the_variable_is_named(
    run: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SEAMOUNT_REDIS_URL")
    assert run("n1") == (1, [])
    assert "SEAMOUNT_REDIS_URL" in capsys.readouterr().err


def test_a_deadline_out_of_range_is_refused(drains: DrainRequests) -> None:
    with pytest.raises(InvalidArgument):
        empty_node(drains, "n1", deadline_s=0.0, cause="a test")
