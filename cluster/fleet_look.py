"""What the fleet makes of one look at Serve and the directory. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from seamount.cluster.fleet_meter import SeenRank, gang_name
from seamount.cluster.fleet_plan import Phase, RunningGang, WantedPool, named_gang
from seamount.cluster.fleet_state import Progress
from seamount.cluster.fleet_view import View
from seamount.workers.spec import PoolName


def gangs_of(view: View) -> frozenset[str]:
    """Names of the gangs with a rank that is alive."""
    return frozenset(gang_name(rank.record.gang_id) for rank in view.ranks)


def half_drained(view: View, known: Collection[str]) -> list[str]:
    """Gangs with a rank that is leaving, other than ``known``: no turn goes there any more."""
    names = {gang_name(rank.record.gang_id) for rank in view.ranks if rank.state.draining}
    return sorted(names - set(known))


def of_nodes(view: View, node_ids: Collection[str]) -> View:
    """What is in this Ray cluster: others of the name have gangs of the same names."""
    return View(
        ranks=tuple(rank for rank in view.ranks if rank.record.node_id in node_ids),
        routers=tuple(one for one in view.routers if one[0].node_id in node_ids),
    )


def ranks_elsewhere(view: View, node_ids: Collection[str]) -> tuple[SeenRank, ...]:
    """Of the other Ray clusters of the name."""
    return tuple(rank for rank in view.ranks if rank.record.node_id not in node_ids)


def gangs_elsewhere(ranks: Sequence[SeenRank]) -> list[RunningGang]:
    """Those of the other Ray clusters that stay; all of their ranks serve."""
    leaving = {rank.record.gang_id for rank in ranks if rank.state.draining}
    ids = {rank.record.gang_id for rank in ranks} - leaving
    found = [named_gang(gang_name(gang_id), version="", phase=Phase.READY) for gang_id in sorted(ids)]
    return [gang for gang in found if gang is not None]


def progress(
    pools: Sequence[WantedPool], running: Sequence[RunningGang], leaving: Collection[str]
) -> dict[PoolName, Progress]:
    """How many gangs are ready and stay, of those that are wanted."""

    def num_ready(pool: WantedPool) -> int:
        present = [gang for gang in running if gang.pool == pool.pool and gang.name not in leaving]
        return min(pool.num_gangs, sum(gang.phase is Phase.READY for gang in present))

    return {pool.pool: Progress(num_ready=num_ready(pool), num_wanted=pool.num_gangs) for pool in pools}


def homeless(running: Sequence[RunningGang]) -> list[str]:
    """Gangs that start and have found no node for any rank yet."""
    return [gang.name for gang in running if gang.phase is Phase.STARTING and not gang.nodes]


def needlessly_homeless(avoided: Mapping[str, frozenset[str]], welcome: Collection[str]) -> list[str]:
    """Of those, by the nodes that each was told to avoid: who avoids one that is there and takes gangs again."""
    return [name for name, nodes in avoided.items() if nodes & set(welcome)]
