"""What fleets see, made up: ranks, gangs, routers, and a clock that stands still until a test moves it."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from seamount.cluster.fleet_meter import SeenRank
from seamount.cluster.fleet_nodes import Node
from seamount.cluster.fleet_plan import Phase, RunningGang, WantedPool
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


class ServeInMemory:
    """What the fleet needs of Serve, without processes. phase: in which a gang stands that has just been started."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.gangs: dict[str, RunningGang] = {}
        self.started: list[str] = []

    def running(self) -> list[RunningGang]:
        return list(self.gangs.values())

    def start(self, name: str, wanted: WantedPool, avoided_nodes: Collection[str]) -> None:
        self.started.append(name)
        number = int(name.rpartition("-")[2])
        self.gangs[name] = RunningGang(pool=wanted.pool, number=number, version=wanted.version, phase=self.phase)

    def come_up(self, how_many: int) -> None:
        """So many of the decode gangs that start are ready, the first ones."""
        starting = [one for one in self.gangs.values() if one.phase is Phase.STARTING]
        for one in starting[:how_many]:
            self.gangs[one.name] = gang(one.number, version=one.version)

    def delete(self, name: str) -> None:
        del self.gangs[name]

    def nodes(self) -> list[Node]:
        return []

    def num_routers(self) -> int | None:
        return None

    def scale_routers(self, number: int) -> None:
        raise AssertionError("routers are not scaled here")

    def ready(self) -> int:
        return sum(one.phase is Phase.READY for one in self.gangs.values())
