"""How many routers there are to be, and which of them go: routers are alike, so Serve may choose any but these."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from seamount.cluster.fleet_nodes import NodeWork
from seamount.cluster.fleet_view import View
from seamount.cluster.leaving import LeavingRouters


class RouterReplicas(Protocol):
    """What this needs of Serve."""

    def num_routers(self) -> int | None:
        """Replicas that Serve aims at; None where it has no routers."""

    def scale_routers(self, number: int) -> None: ...


class RouterCare:
    """Of one fleet. A router that has left a node still counts as one of Serve's replicas until the node is closed, so
    there is one more for each such node; and none fewer before those on nodes that stay after all are back."""

    def __init__(self, leaving: LeavingRouters, routers: RouterReplicas) -> None:
        self._leaving, self._routers = leaving, routers
        self._number: int | None = None
        self._asked: dict[str, str] = {}  # router -> its node
        self._emptied: set[str] = set()

    def mind(self, wanted: int | None, view: View, work: NodeWork, nodes: Collection[str]) -> None:
        """One pass. wanted: None = Serve's settings decide; nodes: ids of those that are alive."""
        homes = {record.peer_id: record.node_id for record, _ in view.routers}
        self._emptied |= {node for node in homes.values() if node in work.avoided}
        self._emptied &= set(nodes)
        staying = self._emptied - work.avoided
        self._leaving.release([router for router, node in self._asked.items() if node in staying])
        if len(homes) >= (self._number or 0):
            self._emptied -= staying
        self._asked |= {router: homes[router] for router in work.routers}
        self._asked = {router: node for router, node in self._asked.items() if node in self._emptied}
        self._leaving.ask(sorted(work.routers))
        in_force = self._routers.num_routers()
        if wanted is None or in_force is None:
            return
        self._number = wanted + len(self._emptied)
        if self._number != in_force:  # also where Serve's configuration, applied again, has set it back
            self._routers.scale_routers(self._number)

    def all_leave(self, view: View) -> None:
        """Others have taken this Ray cluster's place."""
        self._leaving.ask(sorted(record.peer_id for record, _ in view.routers))
