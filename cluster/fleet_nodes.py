"""Nodes that are to be emptied: which gangs and routers that concerns, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from seamount.cluster.fleet_plan import Phase, RunningGang
from seamount.cluster.fleet_view import View
from seamount.cluster.node_drain import DrainPhase, DrainRequest, DrainRequests, DrainStatus

HOOKS_S = 5.0
"""Kept of a request's time for the shutdown of what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One of this Ray cluster's. names: its id, its address, its host name."""

    node_id: str
    names: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emptying:
    """One request that concerns a node of this cluster. is_overdue: do not wait for replacements any more."""

    request: DrainRequest
    node_id: str
    left_s: float
    is_overdue: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWork:
    """What requests come to. gangs: name -> seconds left; overdue: gangs that do not wait; avoided: ids of nodes where
    nothing new is to be started; routers: ids of those that should leave now."""

    emptying: tuple[Emptying, ...] = ()
    gangs: dict[str, float] = field(default_factory=dict)
    overdue: frozenset[str] = frozenset()
    avoided: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()


class NodeRequests:
    """The requests that concern one Ray cluster. One ends with its node: a machine that comes back under the same name
    or address, or another pod that is given it, is another Ray node, which nobody has asked for."""

    def __init__(self, drains: DrainRequests, replacement_s: float) -> None:
        self._drains, self._replacement_s = drains, replacement_s
        self._meant: dict[DrainRequest, str] = {}  # the id of the Ray node that was found for each

    def work(self, running: Iterable[RunningGang], nodes: Sequence[Node], view: View) -> NodeWork:
        """What there is to do now. May raise ``redis.RedisError``."""
        requests = self._drains.requests()
        if not requests:
            return NodeWork()
        alive = {node.node_id for node in nodes}
        ended = [request for request in requests if self._meant.get(request, "") not in {"", *alive}]
        for request in ended:
            self._drains.cancel_drain(request.node)
        standing = [request for request in requests if request not in ended]
        concerned = emptying(standing, nodes, now=self._drains.now(), replacement_s=self._replacement_s)
        self._meant = {one.request: one.node_id for one in concerned}
        return node_work(concerned, running, view)


def emptying(
    requests: Iterable[DrainRequest], nodes: Sequence[Node], *, now: float, replacement_s: float
) -> tuple[Emptying, ...]:
    """Requests for nodes that are known here. Replacements are waited for during ``replacement_s``, at most half of the
    request's time. now: by the clock of the requests."""
    found = []
    for request in requests:
        node = next((node for node in nodes if request.node in node.names), None)
        if node is not None:
            wait_s = min(replacement_s, (request.deadline_at - request.asked_at) / 2)
            found.append(
                Emptying(
                    request=request,
                    node_id=node.node_id,
                    left_s=max(0.0, request.deadline_at - now - HOOKS_S),
                    is_overdue=now >= request.asked_at + wait_s,
                )
            )
    return tuple(found)


def node_work(concerned: tuple[Emptying, ...], running: Iterable[RunningGang], view: View) -> NodeWork:
    """A router leaves when another one serves on a node that stays, or when it is overdue."""
    by_node = {one.node_id: one for one in concerned}
    gangs: dict[str, float] = {}
    overdue = set()
    for gang in running:
        here = [by_node[node_id] for node_id in gang.nodes if node_id in by_node]
        if here and gang.phase is not Phase.LEAVING:
            gangs[gang.name] = min(one.left_s for one in here)
            if any(one.is_overdue for one in here):
                overdue.add(gang.name)
    others_serve = any(record.node_id not in by_node for record, _ in view.routers)
    routers = {
        record.peer_id
        for record, _ in view.routers
        if record.node_id in by_node and (others_serve or by_node[record.node_id].is_overdue)
    }
    return NodeWork(
        emptying=concerned,
        gangs=gangs,
        overdue=frozenset(overdue),
        avoided=frozenset(by_node),
        routers=frozenset(routers),
    )


def statuses(work: NodeWork, running: Sequence[RunningGang], view: View) -> list[DrainStatus]:
    """What to tell those who asked."""
    told = []
    for one in work.emptying:
        gangs = tuple(sorted(gang.name for gang in running if one.node_id in gang.nodes))
        routers = tuple(sorted(record.peer_id for record, _ in view.routers if record.node_id == one.node_id))
        is_empty = not gangs and not routers
        waiting = "" if one.is_overdue else "replacements are started first; "
        told.append(
            DrainStatus(
                node=one.request.node,
                phase=DrainPhase.EMPTY if is_empty else DrainPhase.DRAINING,
                node_id=one.node_id,
                gangs=gangs,
                routers=routers,
                detail="" if is_empty else f"{waiting}{len(gangs)} gangs and {len(routers)} routers are left",
            )
        )
    return told
