"""The system on three simulated Ray nodes: both ranks of the decode gang on nodes of their own, prefill on the third.

One deployment serves the whole file; the tests run in order and leave it up for the next.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from urllib.request import urlopen

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.ray_nodes import RayNode, free_port, node_of, random_checkpoint, ray_nodes, replica_pids, wait_for
from seamount.cluster.app import Deployment, PoolProgress, deploy
from seamount.cluster.settings import Settings, validate
from seamount.router.client import Client, Sampling, user
from seamount.router.store import Store
from seamount.router.watcher import Directory
from seamount.v1 import admin_pb2, events_pb2, worker_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

DECODE, PREFILL = worker_pb2.POOL_DECODE, worker_pb2.POOL_PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    settings: Settings
    deployment: Deployment
    nodes: list[RayNode]
    progress: list[list[PoolProgress]]


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("ray")
    settings = validate(
        {
            "cluster_name": f"test-{secrets.token_hex(4)}",
            "run_dir": str(folder / "run"),
            "model": {"path": str(random_checkpoint(folder))},
            "cache": {"num_pages": 64},
            "engine": {"max_context_tokens": 2048},
            "router": {"port": free_port()},  # one that is replaced comes back there
            "metrics": {"port": free_port()},
            "placement": {"path": "remote"},
            "pools": {
                "decode": {"gangs": 1, "expert_parallel": 2, "resources": {"decode": 1}},
                "prefill": {"gangs": 1, "expert_parallel": 1, "resources": {"prefill": 1}},
            },
        }
    )
    offered = [("prefill", {"prefill": 1, "router": 1}), ("decode-a", {"decode": 1}), ("decode-b", {"decode": 1})]
    with ray_nodes(offered) as nodes:
        progress: list[list[PoolProgress]] = []
        deployment = deploy(settings, redis_url=redis_url, on_progress=progress.append, timeout_s=90.0)
        yield System(settings=settings, deployment=deployment, nodes=nodes, progress=progress)
        deployment.stop()


def ranks(client: Client, pool: worker_pb2.Pool) -> list[admin_pb2.Rank]:
    return [rank for rank in client.list_ranks(pool) if rank.alive and rank.state.healthy]


def say(client: Client, session_id: str, text: str) -> events_pb2.Receipt:
    turn = client.run_turn(session_id, [user(text)], sampling=Sampling(max_output_tokens=6), deadline_s=40.0).result()
    assert turn.receipt.num_output_tokens > 0
    return turn.receipt


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(system.deployment.router_address) as client:
        yield client


def test_every_rank_of_the_gang_has_a_node_of_its_own(system: System, client: Client) -> None:
    assert [pool.num_ready for pool in system.progress[-1]] == [1, 1]
    wait_for("ranks seen by the router", lambda: len(ranks(client, DECODE)) == 2 and len(ranks(client, PREFILL)) == 1)
    decode, prefill = ranks(client, DECODE), ranks(client, PREFILL)
    assert {node_of(system.nodes, rank.state.process_id) for rank in decode} == {"decode-a", "decode-b"}
    assert [node_of(system.nodes, rank.state.process_id) for rank in prefill] == ["prefill"]
    assert len({rank.state.gang_id for rank in decode}) == 1
    assert sorted(rank.state.gang_rank for rank in decode) == [0, 1]
    assert decode[0].state.expert_bytes == decode[1].state.expert_bytes == prefill[0].state.expert_bytes // 2


def test_a_conversation_goes_through_both_pools(client: Client) -> None:
    session = client.create_session()
    first = say(client, session.id, "Where does the sea begin? " * 12)
    assert first.path == events_pb2.PREFILL_PATH_REMOTE
    assert first.num_decode_computed_tokens == 1
    second = say(client, session.id, "And where does it end?")
    assert second.num_cached_tokens > 0
    assert second.decode_rank == first.decode_rank
    assert len(client.get_history(session.id).messages) == 4


def test_every_process_is_scraped_on_a_port_of_its_own(system: System, client: Client) -> None:
    say(client, client.create_session().id, "Are you counted?")
    first, found = system.settings.metrics.port, dict[str, float]()
    for port in range(first, first + 12):  # fleet, router and three ranks; the port of a stranger may lie between
        with suppress(OSError, HTTPException), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
            samples = [sample for family in families for sample in family.samples if sample.name.startswith("seamount")]
            found |= {f"{s.name} {' '.join(sorted(s.labels.values()))}".strip(): s.value for s in samples}
    assert found["seamount_fleet_wanted_gangs decode"] == found["seamount_fleet_gangs decode ready"] == 1
    assert found["seamount_fleet_gangs prefill ready"] == 1
    assert found["seamount_router_ranks decode"] == 2
    assert found["seamount_router_turns_total finished"] >= 1
    for rank in ("0 decode", "1 decode", "0 prefill"):
        assert found[f"seamount_rank_healthy {rank}"] == 1
        assert found[f"seamount_rank_steps_total {rank}"] > 0


def test_a_killed_fleet_comes_back_and_leaves_the_gangs_alone(client: Client) -> None:
    gangs = [replica_pids(name) for name in ("decode-0", "prefill-0")]
    assert [len(pids) for pids in gangs] == [2, 1]
    (fleet,) = replica_pids("fleet")
    psutil.Process(fleet).kill()
    wait_for("fleet replaced", lambda: bool(replica_pids("fleet") - {fleet}))
    time.sleep(3.0)  # several passes of the new one
    assert [replica_pids(name) for name in ("decode-0", "prefill-0")] == gangs
    assert not replica_pids("decode-1")
    say(client, client.create_session().id, "Still there?")


def test_a_killed_decode_rank_has_its_gang_replaced_and_the_session_goes_on(client: Client) -> None:
    session = client.create_session()
    before = say(client, session.id, "Remember the number seven. " * 8)
    old = ranks(client, DECODE)
    victim = next(rank for rank in old if rank.state.rank_id == before.decode_rank)
    psutil.Process(victim.state.process_id).kill()
    old_gang = victim.state.gang_id
    wait_for(
        "gang replaced",
        lambda: [rank.state.gang_id != old_gang for rank in ranks(client, DECODE)] == [True, True],
    )
    assert not any(psutil.pid_exists(rank.state.process_id) for rank in old)
    after = say(client, session.id, "Which number was it?")
    assert after.decode_rank != before.decode_rank
    assert after.num_prompt_tokens > before.num_prompt_tokens
    assert len(client.get_history(session.id).messages) == 4


def test_a_killed_prefill_rank_costs_no_turn_and_is_replaced(client: Client) -> None:
    (victim,) = ranks(client, PREFILL)
    psutil.Process(victim.state.process_id).kill()
    meanwhile = say(client, client.create_session().id, "Count the stars one by one. " * 12)
    assert meanwhile.num_decode_computed_tokens > 1
    wait_for(
        "prefill rank replaced",
        lambda: [rank.state.gang_id != victim.state.gang_id for rank in ranks(client, PREFILL)] == [True],
    )
    assert say(client, client.create_session().id, "Count the waves. " * 20).path == events_pb2.PREFILL_PATH_REMOTE


def test_a_killed_router_is_replaced_under_a_stream(client: Client) -> None:
    session = client.create_session()
    sampling = Sampling(max_output_tokens=100, temperature=0.0)
    stream = client.run_turn(session.id, [user("Tell me a story.")], sampling=sampling, deadline_s=60.0)
    seen = [next(stream) for _ in range(3)]
    (victim,) = replica_pids("router")
    psutil.Process(victim).kill()
    begun = time.monotonic()
    seen += stream
    print(f"the stream was over {time.monotonic() - begun:.1f} s after its router was killed")
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].HasField("finished")
    assert (client.get_session(session.id).head, replica_pids("router") & {victim}) == (1, set())


async def test_a_graceful_stop_leaves_no_process(system: System, redis_url: str) -> None:
    with Client(system.deployment.router_address) as client:
        present = [rank for rank in client.list_ranks() if rank.alive]
    processes = [psutil.Process(rank.state.process_id) for rank in present]
    processes += [psutil.Process(pid) for name in ("fleet", "router") for pid in replica_pids(name)]
    assert len(processes) == 5
    begun = time.monotonic()
    system.deployment.stop()
    print(f"stopped in {time.monotonic() - begun:.1f} s")
    _, left = psutil.wait_procs(processes, timeout=10.0)
    assert not left
    store = await Store.open(redis_url)
    entries = await Directory(store, system.settings.cluster_name).read()
    await store.close()
    assert not entries.keys() & {rank.state.rank_id for rank in present}  # each one has taken itself out
    system.deployment.stop()  # nothing left to stop: harmless
