"""Turns of a minute whose gang is drained under them, on three simulated Ray nodes: they end elsewhere, on the stream
that they began on.

One deployment serves the whole file; the tests run in order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from harness.long_turns import AIM_S, LONG_S, Leaving, LongTurn, lasting, num_tokens_in
from harness.ray_nodes import node_of, replica_pids, wait_for
from harness.scaling import Load, ScalingSystem, gang_of, home_at, large_session_at, scaling_system
from seamount.cluster.node_closing import close_node, empty_node
from seamount.router.client import Client
from seamount.v1 import worker_pb2
from seamount.wire.errors import Unavailable

pytestmark = [pytest.mark.scaling, pytest.mark.cluster, pytest.mark.figures, pytest.mark.timeout(900)]
DECODE = worker_pb2.POOL_DECODE
NODES = [("head", {"router": 1}), ("a", {"decode": 4}), ("b", {"decode": 4})]
"""The router is on a node that stays: a stream that broke would be told twice."""


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScalingSystem]:
    ranges = {"decode": {"min_gangs": 1, "max_gangs": 2}, "prefill": {"min_gangs": 0, "max_gangs": 0}}
    with scaling_system(redis_url, tmp_path_factory.mktemp("long"), ranges, nodes=NODES) as running:
        yield running


@pytest.fixture
def client(system: ScalingSystem) -> Iterator[Client]:
    with system.client() as client:
        yield client


def long_turn(system: ScalingSystem, session_id: str, num_tokens: int) -> LongTurn:
    return LongTurn(address=system.deployment.router_address, session_id=session_id, num_tokens=num_tokens)


def test_a_long_turn_on_the_cheapest_gang_goes_on_when_the_fleet_shrinks(system: ScalingSystem, client: Client) -> None:
    """The older gang has one of three turns, the newer two, and a large session."""
    wait_for("one gang", lambda: len(system.gangs(DECODE)) == 1)

    def scene(num_tokens: int) -> tuple[LongTurn, Leaving]:
        (older,) = system.gangs(DECODE)
        load = Load(system=system)
        load.start(12)
        wait_for("grown to two gangs", lambda: len(system.gangs(DECODE)) == 2, 240.0)
        (newer,) = set(system.gangs(DECODE)) - {older}
        large = large_session_at(client, newer)
        turn = long_turn(system, home_at(client, older), num_tokens)
        dearer = [long_turn(system, home_at(client, newer), num_tokens // 2) for _ in range(2)]
        load.stop()
        for one in (turn, *dearer):
            one.start()
        assert load.failures == []
        for session_id in load.acknowledged:
            client.delete_session(session_id)
        wait_for("three long turns run", lambda: all(one.is_running() for one in (turn, *dearer)))
        wait_for("a gang begins to leave", lambda: len(system.gangs(DECODE)) == 1, 120.0)
        began_at = time.monotonic()
        assert system.gangs(DECODE) == [newer]
        wait_for("it is gone", lambda: not replica_pids(older), 120.0)
        leaving = Leaving(began_at=began_at, gone_at=time.monotonic())
        for one in (turn, *dearer):
            assert gang_of(one.result().decode_rank) == newer
            assert len(client.get_history(one.session_id).messages) == 4
        assert all(one.result().num_retries == 0 for one in dearer)
        client.delete_session(large)
        return turn, leaving

    lasting(num_tokens_in(AIM_S, system.deployment.router_address, client), scene)


def test_a_long_turn_leaves_a_node_that_is_to_be_emptied(system: ScalingSystem, client: Client) -> None:
    wait_for("one gang", lambda: len(system.gangs(DECODE)) == 1)
    emptied = ""

    def scene(num_tokens: int) -> tuple[LongTurn, Leaving]:
        nonlocal emptied
        if emptied:
            system.drains.cancel_drain(emptied)
        (old,) = system.gangs(DECODE)
        (pid, *_) = [rank.state.process_id for rank in system.ranks(DECODE)]
        node = next(node for node in system.nodes if node.name == node_of(system.nodes, pid))
        turn = long_turn(system, client.create_session().id, num_tokens)
        turn.start()
        wait_for("the long turn runs", turn.is_running)
        time.sleep(LONG_S / 4)

        emptied, began_at = node.node_id, time.monotonic()
        assert empty_node(system.drains, node.node_id, deadline_s=120.0, cause="test").node_id == node.node_id
        leaving = Leaving(began_at=began_at, gone_at=time.monotonic())
        assert not replica_pids(old)
        (new,) = system.gangs(DECODE)
        homes = {node_of(system.nodes, rank.state.process_id) for rank in system.ranks(DECODE)}
        assert homes == {"a", "b"} - {node.name}
        assert gang_of(turn.result().decode_rank) == new != old
        assert len(client.get_history(turn.session_id).messages) == 2
        return turn, leaving

    lasting(num_tokens_in(AIM_S, system.deployment.router_address, client), scene)

    import ray  # reads how to authenticate when it is first imported

    (gang,) = system.gangs(DECODE)
    gcs_address = ray.get_runtime_context().gcs_address
    close_node(emptied, message="test", address=gcs_address)
    wait_for("Ray has closed the node", lambda: emptied not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}, 40.0)
    assert system.gangs(DECODE) == [gang]
    with pytest.raises(Unavailable, match="hex"):
        close_node("ab12", message="test", address=gcs_address)
    system.drains.cancel_drain(emptied)
