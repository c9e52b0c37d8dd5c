"""The longer form of ``test_ray_scaling``: up to three gangs, prefill from zero and back, a node that dies."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from harness.long_turns import LongTurn, num_tokens_in
from harness.ray_nodes import RayNode, node_of, replica_pids, wait_for
from harness.scaling import Load, ScalingSystem, say, scaling_system
from seamount.cluster.fleet_meter import gang_name
from seamount.cluster.node_drain import DrainPhase
from seamount.cluster.settings import validate
from seamount.router.client import Client
from seamount.v1 import events_pb2, worker_pb2
from seamount.wire.errors import SeamountError

pytestmark = [pytest.mark.scaling, pytest.mark.cluster, pytest.mark.figures, pytest.mark.timeout(900)]
DECODE, PREFILL = worker_pb2.POOL_DECODE, worker_pb2.POOL_PREFILL


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScalingSystem]:
    ranges = {
        "decode": {"min_gangs": 1, "max_gangs": 3},
        "prefill": {"min_gangs": 0, "max_gangs": 2},
        "routers": {"min_replicas": 2, "max_replicas": 3},
        "streams_per_router": 4,
    }
    with scaling_system(redis_url, tmp_path_factory.mktemp("scaling"), ranges, num_places=3) as running:
        yield running


@pytest.fixture
def client(system: ScalingSystem) -> Iterator[Client]:
    with system.client() as client:
        yield client


def test_four_long_prompts_scale_prefill_and_not_decode(system: ScalingSystem, client: Client) -> None:
    wait_for("one decode gang, no prefill gang", lambda: shape(system) == (1, 0))
    stop, failures, receipts = threading.Event(), list[str](), list[events_pb2.Receipt]()

    def speak() -> None:
        with system.client() as own:
            while not stop.is_set():
                try:
                    prompt = f"{secrets.token_hex(4)} " + "the sea is deep and cold. " * 230
                    receipts.append(say(own, own.create_session().id, prompt))
                except (SeamountError, AssertionError) as error:
                    failures.append(f"{type(error).__name__}: {error}")
                    return

    speakers = [threading.Thread(target=speak, daemon=True) for _ in range(4)]
    for speaker in speakers:
        speaker.start()
    seen: set[int] = set()

    def has_prefill() -> bool:
        num_decode, num_prefill = shape(system)
        seen.add(num_decode)
        return num_prefill >= 1 and any(one.path == events_pb2.PREFILL_PATH_REMOTE for one in receipts)

    wait_for("prefill computes them", has_prefill, 240.0)
    stop.set()
    for speaker in speakers:
        speaker.join(240.0)
    assert failures == []
    assert seen == {1}
    print(f"{len(receipts)} prompts of 6,000 tokens, none failed")
    wait_for("no prefill gang again", lambda: shape(system) == (1, 0) and not replica_pids("prefill-0"), 180.0)
    assert say(client, client.create_session().id, "still there?").num_prompt_tokens > 0


def test_from_one_session_to_twelve_and_back(system: ScalingSystem) -> None:
    load = Load(system=system)
    load.start(1)
    time.sleep(3.0)
    assert shape(system)[0] == 1
    load.start(11)
    wait_for("grown to three gangs", lambda: shape(system)[0] == 3, 240.0)
    wait_for("and three routers", lambda: len(replica_pids("router")) == 3)
    load.stop()
    print(f"{load.num_turns} turns while it grew")
    alone = Load(system=system)
    alone.start(1)
    wait_for("shrunk to one gang", lambda: shape(system)[0] == 1, 240.0)
    wait_for("and two routers", lambda: len(replica_pids("router")) == 2)
    alone.stop()
    print(f"{alone.num_turns} turns of one session while it shrank")
    assert load.failures == alone.failures == []


def client_at(system: ScalingSystem, pids: set[int]) -> Client:
    """A client of one of these routers. All have one port, the kernel deals connections out, and the channels of one
    process share one: where this client is, others are as well for as long as it is open."""
    address = system.deployment.router_address
    port = int(address.rpartition(":")[2])
    for _ in range(50):
        client = system.client()
        client.list_ranks(DECODE)
        ours = {
            one.laddr.port for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port == port
        }
        theirs = {one.raddr.port for pid in pids for one in psutil.Process(pid).net_connections("tcp") if one.raddr}
        if ours & theirs:
            return client
        client.close()
    raise AssertionError(f"50 connections to {address}, none at {pids}")


@pytest.fixture
def leaving(system: ScalingSystem) -> Iterator[tuple[RayNode, Client]]:
    """A node that can be emptied, and a client of its router."""
    homes = {pid: node_of(system.nodes, pid) for pid in replica_pids("router")}
    node = next(one for one in system.nodes if one.name in {*homes.values()} - {"head"})
    with client_at(system, {pid for pid, home in homes.items() if home == node.name}) as client:
        yield node, client


def test_turns_go_on_at_other_routers_when_their_router_leaves_a_node(
    system: ScalingSystem, leaving: tuple[RayNode, Client]
) -> None:
    node, client = leaving
    address = system.deployment.router_address
    num_tokens = num_tokens_in(10.0, address, client)
    turns = [LongTurn(address=address, session_id=client.create_session().id, num_tokens=num_tokens) for _ in range(8)]
    for turn in turns:
        turn.start()
    wait_for("eight long turns run", lambda: all(turn.is_running() for turn in turns))
    system.drains.request_drain(node.node_id, deadline_s=120.0, cause="test")
    told: set[str] = set()

    def is_empty() -> bool:
        status = system.drains.drain_status(node.node_id)
        assert status is not None
        told.update(status.routers)
        return status.phase is DrainPhase.EMPTY

    wait_for("the node is empty", is_empty, 150.0)
    assert told
    receipts = [turn.result() for turn in turns]
    num_resumed = sum(len(turn.told.calls) - 1 for turn in turns)
    print(
        f"{num_tokens} tokens each; {sum(receipt.num_retries for receipt in receipts)} times a turn was placed again, "
        f"{num_resumed} times its client went on at another router"
    )
    assert num_resumed, "no client was at the router that left"
    for turn in turns:
        assert len(client.get_history(turn.session_id).messages) == 2
        client.delete_session(turn.session_id)  # its pages would keep the fleet as large as it is
    system.drains.cancel_drain(node.node_id)


def test_new_settings_are_new_gangs_beside_the_old_ones(system: ScalingSystem, redis_url: str) -> None:
    from ray import serve  # not before the nodes are there: Ray reads its token when it is imported

    from seamount.cluster.replicas import fleet_application

    wait_for("one gang", lambda: shape(system)[0] == 1, 240.0)  # what ran before may have grown the fleet
    (old,) = {rank.state.gang_id for rank in system.ranks(DECODE)}
    load = Load(system=system)
    load.start(3, num_tokens=40)
    wait_for("turns run", lambda: load.num_turns >= 3)
    changed = system.settings.model_dump(exclude={"redis_url"}, mode="json")
    changed["cache"]["num_pages"] = 1000
    serve.run(fleet_application(validate({**changed, "redis_url": redis_url})), name="fleet", route_prefix=None)

    def is_new() -> bool:
        ranks = system.ranks(DECODE)
        return bool(system.gangs(DECODE)) and all(rank.state.num_pages == 1000 for rank in ranks)

    wait_for("the ranks are new ones", is_new, 180.0)
    wait_for("the old gang is gone", lambda: not replica_pids(gang_name(old)), 60.0)
    num_turns = load.num_turns
    wait_for("turns go on", lambda: load.num_turns >= num_turns + 3)
    load.stop()
    assert load.failures == []
    print(f"{load.num_turns} turns of three sessions, none failed")


def test_a_node_that_dies_costs_no_acknowledged_turn(system: ScalingSystem, client: Client) -> None:
    session_id = client.create_session().id
    wait_for("one gang", lambda: shape(system)[0] == 1, 240.0)
    for number in range(3):
        say(client, session_id, f"remember the number {number}")
    load = Load(system=system)
    load.start(3, num_tokens=40)
    wait_for("turns run", lambda: load.num_turns >= 6)
    before = system.ranks(DECODE)
    node = next(one for one in system.nodes if one.name == node_of(system.nodes, before[0].state.process_id))
    raylet = psutil.Process(node.raylet)
    doomed = [raylet, *raylet.children(recursive=True)]
    for process in doomed:
        process.kill()
    old = {rank.state.gang_id for rank in before}

    def is_replaced() -> bool:
        gangs = {rank.state.gang_id for rank in system.ranks(DECODE)}
        return bool(system.gangs(DECODE)) and not gangs & old

    wait_for("a gang on the other node", is_replaced, 240.0)
    load.stop()
    print(f"{load.num_turns} turns were acknowledged; {len(load.failures)} failed: {load.failures}")
    for one, number in load.acknowledged.items():
        assert len(client.get_history(one).messages) in (2 * number, 2 * number + 2)  # the last may have been unheard
    assert len(client.get_history(session_id).messages) == 6
    after = say(client, session_id, "which numbers were they?")
    assert after.num_prompt_tokens > 0
    assert len(client.get_history(session_id).messages) == 8
    (name,) = {node_of(system.nodes, rank.state.process_id) for rank in system.ranks(DECODE)}
    assert name not in (node.name, "head")


def shape(system: ScalingSystem) -> tuple[int, int]:
    """Decode and prefill gangs that are whole and take turns."""
    return len(system.gangs(DECODE)), len(system.gangs(PREFILL))
