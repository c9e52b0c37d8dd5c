"""A fleet that scales, on three simulated Ray nodes: it grows and shrinks in whole gangs, and no turn fails for it.

One deployment serves the whole file; the tests run in order. ``make test-scaling`` runs the longer form, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from harness.ray_nodes import node_of, replica_pids, wait_for
from harness.scaling import Load, LongTurn, ScalingSystem, endless, say, scaling_system
from seamount.cluster.fleet_meter import gang_name
from seamount.cluster.node_closing import close_node, empty_node
from seamount.router.client import Client
from seamount.v1 import worker_pb2
from seamount.wire.errors import Unavailable

pytestmark = [pytest.mark.cluster, pytest.mark.figures, pytest.mark.timeout(400)]
DECODE = worker_pb2.POOL_DECODE


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScalingSystem]:
    ranges = {"decode": {"min_gangs": 1, "max_gangs": 2}, "prefill": {"min_gangs": 0, "max_gangs": 0}}
    with scaling_system(redis_url, tmp_path_factory.mktemp("scaling"), ranges) as running:
        yield running


@pytest.fixture
def client(system: ScalingSystem) -> Iterator[Client]:
    with system.client() as client:
        yield client


def gang_of(rank_id: str) -> str:
    return gang_name(rank_id.rpartition(".")[0])


def test_twelve_sessions_make_the_fleet_grow_and_one_lets_it_shrink_by_the_cheapest_gang(
    system: ScalingSystem, client: Client
) -> None:
    wait_for("the first gang is seen", lambda: system.gangs(DECODE) == ["decode-0"])
    load = Load(system=system)
    load.start(12)
    wait_for("grown to two gangs", lambda: system.gangs(DECODE) == ["decode-0", "decode-1"], 120.0)

    session_id = large_session_at(client, "decode-1")  # the newest gang is to be the dearer one
    load.stop()
    assert load.failures == []
    print(f"{load.num_turns} turns of twelve sessions, none failed")
    for small in load.sessions:
        client.delete_session(small)
    begun = time.monotonic()
    while len(system.gangs(DECODE)) == 2:
        assert time.monotonic() - begun < 120.0
        say(client, session_id, "and then?")
        time.sleep(0.3)
    print(f"shrunk {time.monotonic() - begun:.1f} s after the load had gone")
    wait_for("the other gang is gone", lambda: not replica_pids("decode-0"))
    assert system.gangs(DECODE) == ["decode-1"]
    after = say(client, session_id, "and then?")
    assert gang_of(after.decode_rank) == "decode-1"
    assert after.num_cached_tokens > 1000


def large_session_at(client: Client, gang: str) -> str:
    """One with many pages on a rank of that gang. It grows where its first few tokens are: pages that others had left
    elsewhere would make that gang dear."""
    for _ in range(40):
        session = client.create_session()
        if gang_of(say(client, session.id, "hello").decode_rank) == gang:
            receipt = say(client, session.id, "a long story about the sea " * 150)
            if gang_of(receipt.decode_rank) == gang:
                return session.id
        client.delete_session(session.id)
    raise AssertionError(f"none of forty sessions was placed on {gang}")


@pytest.mark.scaling  # on an idle machine the checkpoint's answer may be over before its gang is emptied
def test_a_long_turn_leaves_a_node_that_is_to_be_emptied_on_the_same_stream(
    system: ScalingSystem, client: Client
) -> None:
    prompt = endless(client)
    turn = LongTurn(client=client, session_id=client.create_session().id, prompt=prompt, num_tokens=4000)
    turn.start()
    wait_for("the long turn runs", turn.is_running)
    (old,) = system.gangs(DECODE)
    (pid, *_) = [rank.state.process_id for rank in system.ranks(DECODE)]
    node = next(node for node in system.nodes if node.name == node_of(system.nodes, pid))

    begun = time.monotonic()
    assert empty_node(system.drains, node.node_id, deadline_s=120.0, cause="test").node_id == node.node_id
    print(f"the node was empty {time.monotonic() - begun:.1f} s after it was asked for")
    assert not replica_pids(old)
    (new,) = system.gangs(DECODE)
    assert {node_of(system.nodes, rank.state.process_id) for rank in system.ranks(DECODE)} == {"a", "b"} - {node.name}

    receipt = turn.result()
    assert gang_of(receipt.decode_rank) == new != old
    assert receipt.num_retries >= 1
    assert receipt.num_migrated_tokens > 0
    print(f"it told {receipt.num_output_tokens} tokens; {receipt.num_migrated_tokens} of them moved with it")
    assert len(client.get_history(turn.session_id).messages) == 2

    import ray  # reads how to authenticate when it is first imported

    gcs_address = ray.get_runtime_context().gcs_address
    close_node(node.node_id, message="test", address=gcs_address)
    wait_for(
        "Ray has closed the node", lambda: node.node_id not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}, 40.0
    )
    assert system.gangs(DECODE) == [new]
    with pytest.raises(Unavailable, match="hex"):
        close_node("ab12", message="test", address=gcs_address)
    system.drains.cancel_drain(node.node_id)
