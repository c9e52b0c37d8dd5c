"""A fleet that scales, on three simulated Ray nodes: it grows and shrinks in whole gangs, and no turn fails for it.

``make test-scaling`` runs the longer forms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from harness.ray_nodes import replica_pids, wait_for
from harness.scaling import Load, ScalingSystem, gang_of, large_session_at, say, scaling_system
from seamount.router.client import Client
from seamount.v1 import worker_pb2

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
    for small in load.acknowledged:
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
