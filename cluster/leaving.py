"""Routers that are asked to leave, in Redis: the fleet asks, each router's replica looks for itself."""

from __future__ import annotations

from collections.abc import Iterable

import redis

ASKED_FOR_S = 600
"""Without being asked again a router may come back after that."""


class LeavingRouters:
    """Of one cluster name. Every method blocks and may raise ``redis.RedisError``."""

    def __init__(self, client: redis.Redis, cluster_name: str) -> None:
        self._client = client
        self._prefix = f"seamount:{{{cluster_name}}}:router-leaves:"

    def ask(self, router_ids: Iterable[str]) -> None:
        """Have them take no more turns and hand over those they have. Repeat it while they are to stay away."""
        for router_id in router_ids:
            self._client.set(self._prefix + router_id, 1, ex=ASKED_FOR_S)

    def release(self, router_ids: Iterable[str]) -> None:
        """They may come back."""
        for router_id in router_ids:
            self._client.delete(self._prefix + router_id)

    def is_asked(self, router_id: str) -> bool:
        return bool(self._client.exists(self._prefix + router_id))
