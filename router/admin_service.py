"""``AdminService``: pools, ranks and where sessions are, as this router sees them."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from seamount.router.directory import Liveness, Role
from seamount.router.moves import Moves, drained
from seamount.router.ranks import Ranks
from seamount.router.watcher import Peer
from seamount.v1 import admin_pb2, admin_pb2_grpc, worker_pb2
from seamount.wire.errors import NotFound
from seamount.wire.ids import RankId

MAX_DRAIN_S = 3_600.0

Context = grpc.aio.ServicerContext[object, object]
_POOLS = {Role.PREFILL: worker_pb2.POOL_PREFILL, Role.DECODE: worker_pb2.POOL_DECODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminService(admin_pb2_grpc.AdminServiceServicer):
    ranks: Ranks
    moves: Moves

    async def ListPools(self, request: admin_pb2.ListPoolsRequest, context: Context) -> admin_pb2.ListPoolsResponse:
        return admin_pb2.ListPoolsResponse(pools=[self._pool(role) for role in _POOLS])

    async def ListRanks(self, request: admin_pb2.ListRanksRequest, context: Context) -> admin_pb2.ListRanksResponse:
        return admin_pb2.ListRanksResponse(
            ranks=[
                _rank(peer, state)
                for peer, state in self.ranks.all()
                if request.pool in (worker_pb2.POOL_UNSPECIFIED, _POOLS[peer.record.role])
            ]
        )

    async def ListRankSessions(
        self, request: admin_pb2.ListRankSessionsRequest, context: Context
    ) -> admin_pb2.ListRankSessionsResponse:
        for peer, state in self.ranks.all():
            if peer.record.peer_id == request.rank_id:
                session_ids = state.session_ids if state is not None else ()
                return admin_pb2.ListRankSessionsResponse(session_ids=session_ids)
        raise NotFound("there is no such rank; ListRanks names those there are", reason="RANK_NOT_FOUND")

    async def DrainRank(self, request: admin_pb2.DrainRankRequest, context: Context) -> admin_pb2.DrainRankResponse:
        remaining_s = context.time_remaining()
        deadline_s = MAX_DRAIN_S if remaining_s is None else min(MAX_DRAIN_S, remaining_s)
        return await drained(self.ranks, self.moves, RankId(request.rank_id), deadline_s=deadline_s)

    def _pool(self, role: Role) -> admin_pb2.PoolState:
        members = [(peer, state) for peer, state in self.ranks.all() if peer.record.role is role]
        states = [state for _, state in members if state is not None]
        return admin_pb2.PoolState(
            pool=_POOLS[role],
            num_gangs=len({peer.record.gang_id for peer, _ in members}),
            num_ranks=len(members),
            num_healthy_ranks=sum(_is_alive(peer, state) for peer, state in members),
            num_pages=sum(state.num_pages for state in states),
            num_free_pages=sum(state.num_free_pages for state in states),
            num_running=sum(state.num_running for state in states),
            num_waiting=sum(state.num_waiting for state in states),
            num_host_pages=sum(state.num_host_pages for state in states),
            num_host_cached_pages=sum(state.num_host_cached_pages for state in states),
            num_disk_pages=sum(state.num_disk_pages for state in states),
            num_disk_cached_pages=sum(state.num_disk_cached_pages for state in states),
        )


def _is_alive(peer: Peer, state: worker_pb2.RankState | None) -> bool:
    return peer.liveness is Liveness.ALIVE and state is not None and state.healthy


def _rank(peer: Peer, state: worker_pb2.RankState | None) -> admin_pb2.Rank:
    known = state or worker_pb2.RankState(
        rank_id=peer.record.peer_id,
        gang_id=peer.record.gang_id,
        gang_rank=peer.record.gang_rank,
        gang_size=peer.record.gang_size,
        pool=_POOLS[peer.record.role],
        process_id=peer.record.process_id,
    )
    return admin_pb2.Rank(address=peer.record.address, alive=_is_alive(peer, state), state=known)
