"""What the fleet makes of one look at Serve and the directory. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from seamount.cluster.fleet_meter import gang_name
from seamount.cluster.fleet_plan import Phase, RunningGang
from seamount.cluster.fleet_scaling import Wanted
from seamount.cluster.fleet_view import View


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


def is_serving(wanted: Wanted, running: Sequence[RunningGang]) -> bool:
    """As many gangs as are wanted are ready."""
    return all(
        sum(gang.phase is Phase.READY and gang.pool == pool.pool for gang in running) >= pool.num_gangs
        for pool in wanted.pools
    )


def homeless(running: Sequence[RunningGang]) -> list[str]:
    """Gangs that start and have found no node for any rank yet."""
    return [gang.name for gang in running if gang.phase is Phase.STARTING and not gang.nodes]


def needlessly_homeless(avoided: Mapping[str, frozenset[str]], welcome: Collection[str]) -> list[str]:
    """Of those, by the nodes that each was told to avoid: who avoids one that is there and takes gangs again."""
    return [name for name, nodes in avoided.items() if nodes & set(welcome)]
