"""What fleets see, made up: ranks, gangs, routers, and a clock that stands still until a test moves it."""

from __future__ import annotations

import secrets

from seamount.cluster.fleet_meter import SeenRank
from seamount.cluster.fleet_plan import Phase, RunningGang
from seamount.cluster.fleet_state import FleetState, connect
from seamount.cluster.fleet_view import View
from seamount.cluster.load import RouterLoad
from seamount.router.directory import PeerRecord, Role
from seamount.v1 import worker_pb2


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


def routers(*nodes: str) -> View:
    found = [peer(f"router-{number}", Role.ROUTER, node_id=node) for number, node in enumerate(nodes)]
    return View(routers=tuple((record, RouterLoad(name=record.peer_id)) for record in found))


def states(redis_url: str, *sessions: str) -> list[FleetState]:
    """Of Ray clusters with these sessions, in this order, under one new cluster name."""
    client = connect(redis_url, timeout_s=1.0)
    name = f"test-{secrets.token_hex(4)}"
    made = [FleetState(client, cluster_name=name, ray_session=session) for session in sessions]
    for state in made:
        state.claim()
    return made
