"""Asking for a node to be emptied: requests and their progress, in Redis, for every fleet of the cluster name.

Whoever wants a node gone (``seamount drain``, a pod's preStop, the watch of Kubernetes' nodes) asks here and looks at
the status until it is ``EMPTY``; only then does ``ray drain-node`` close the node. The fleet of the Ray cluster that
has the node does the work, one that does not know it leaves the request alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import redis

from seamount.wire.errors import InvalidArgument

KEPT_S = 3_600.0
"""A request and its status go so long after its deadline."""
MAX_DEADLINE_S = 24 * 3_600.0
MAX_NODE_LENGTH = 253
_MAX_REQUESTS = 10_000


class DrainPhase(StrEnum):
    """``ASKED``: no fleet has taken it up yet. ``EMPTY``: no gang and no serving router is left there."""

    ASKED = "asked"
    DRAINING = "draining"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequest:
    """node: a Ray node's id, its address or its host name, as it was asked for; deadline_at: by Redis' clock."""

    node: str
    cause: str
    asked_at: float
    deadline_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainStatus:
    """node_id: Ray's, empty until a fleet knows the node; gangs, routers: what is still to go, by name; detail: what is
    waited for; remaining_s: of the request's time; silent_s: since the fleet told this, 0 where it never did."""

    node: str
    phase: DrainPhase
    node_id: str = ""
    gangs: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    detail: str = ""
    remaining_s: float = 0.0
    silent_s: float = 0.0


class DrainRequests:
    """Of one cluster name. Every method blocks and may raise ``redis.RedisError``."""

    def __init__(self, client: redis.Redis, cluster_name: str) -> None:
        self._client = client
        self._asked = f"seamount:{{{cluster_name}}}:drains:asked"
        self._told = f"seamount:{{{cluster_name}}}:drains:told"

    def request_drain(self, node: str, *, deadline_s: float, cause: str = "") -> None:
        """Ask for a node to be emptied within ``deadline_s``. Asked again, the earlier deadline holds.

        deadline_s: afterwards gangs go without waiting for what they hold. cause: for the log.
        Raises ``InvalidArgument`` (node, deadline).
        """
        if not node or len(node) > MAX_NODE_LENGTH:
            raise InvalidArgument(
                f"node has {len(node)} characters; give an id, address or host name of 1 to {MAX_NODE_LENGTH}",
                field="node",
            )
        if not 0 < deadline_s <= MAX_DEADLINE_S:
            raise InvalidArgument(
                f"deadline is {deadline_s:g} s; it must be over 0 and at most {MAX_DEADLINE_S:g} s", field="deadline"
            )
        now = self.now()
        request = DrainRequest(node=node, cause=cause[:200], asked_at=now, deadline_at=now + deadline_s)
        known = self._requests().get(node)
        if known is None or known.deadline_at > request.deadline_at:
            self._client.hset(self._asked, node, json.dumps(asdict(request)))

    def cancel_drain(self, node: str) -> None:
        """The node stays: what has left it does not come back by itself, what is still there goes on. Harmless to
        repeat."""
        self._client.hdel(self._asked, node)
        self._client.hdel(self._told, node)

    def drain_status(self, node: str) -> DrainStatus | None:
        """How far it is; None where nobody asked."""
        request = self._requests().get(node)
        if request is None:
            return None
        now = self.now()
        stored: Any = self._client.hget(self._told, node)
        told = {} if stored is None else json.loads(stored)
        return DrainStatus(
            node=node,
            phase=DrainPhase(told.get("phase", DrainPhase.ASKED)),
            node_id=told.get("node_id", ""),
            gangs=tuple(told.get("gangs", ())),
            routers=tuple(told.get("routers", ())),
            detail=told.get("detail", "no fleet has taken it up: is the node one of this Ray cluster?"),
            remaining_s=max(0.0, request.deadline_at - now),
            silent_s=max(0.0, now - told.get("told_at", now)),
        )

    def requests(self) -> list[DrainRequest]:
        """All that stand, the fleet's work; those long past their deadline are removed."""
        now, standing = self.now(), []
        for node, request in self._requests().items():
            if now > request.deadline_at + KEPT_S:
                self.cancel_drain(node)
            else:
                standing.append(request)
        return sorted(standing, key=lambda request: request.node)[:_MAX_REQUESTS]

    def tell(self, status: DrainStatus) -> None:
        """The fleet's answer, of each pass anew."""
        told = {
            "phase": status.phase.value,
            "node_id": status.node_id,
            "gangs": status.gangs,
            "routers": status.routers,
            "detail": status.detail,
            "told_at": self.now(),
        }
        self._client.hset(self._told, status.node, json.dumps(told))

    def now(self) -> float:
        """Redis' clock: those who ask and those who answer have it in common."""
        seconds, micros = self._client.time()
        return float(seconds) + float(micros) / 1e6

    def _requests(self) -> dict[str, DrainRequest]:
        stored: Any = self._client.hgetall(self._asked)
        return {node.decode(): _parsed(request) for node, request in stored.items()}


def _parsed(stored: bytes) -> DrainRequest:
    """Releases share the requests: one may know more fields than this."""
    told = json.loads(stored)
    return DrainRequest(
        node=told["node"], cause=told["cause"], asked_at=told["asked_at"], deadline_at=told["deadline_at"]
    )
