"""How long each tool's results took in this deployment, by tenant: a small histogram a tool, kept in Redis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from seamount.router.store import Store
from seamount.wire import limits
from seamount.wire.ids import TenantId

FIRST_EDGE_S = 0.25
NUM_BUCKETS = 15
"""Bucket i holds waits of up to ``FIRST_EDGE_S * 2**i``, the last one also what took longer."""
MAX_TOOLS = 256
"""A tenant's; beyond them the one with the fewest waits is forgotten."""
KEPT_S = 30 * 24 * 3600
"""After a tenant's last wait."""
QUANTILE = 0.9
MIN_WAITS = 3
DEFAULT_WAIT_S = 10.0
"""Of a tool with fewer waits than that."""


class ToolWaits:
    """Errors as ``Store.function``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def note(self, tenant: TenantId, names: Iterable[str], wait_s: float) -> None:
        """The results of calls of these tools came together, after ``wait_s``."""
        kept = _kept(names)
        if kept:
            arguments: list[str | int] = [bucket_of(wait_s), NUM_BUCKETS, MAX_TOOLS, KEPT_S * 1000, *kept]
            await self._store.function("note_wait", (self._key(tenant),), arguments)

    async def expected_s(self, tenant: TenantId, names: Iterable[str]) -> float:
        """How long the results of calls of these tools will take together, in nine of ten cases."""
        kept = _kept(names)
        stored = await self._store.command("HMGET", self._key(tenant), *kept) if kept else []
        waits = [quantile_s([int(count) for count in one.split(b",")]) if one else None for one in stored]
        return max((DEFAULT_WAIT_S if wait is None else wait for wait in waits), default=DEFAULT_WAIT_S)

    def _key(self, tenant: TenantId) -> str:
        return self._store.key("tool_waits", quote(tenant, safe=""))


def bucket_of(wait_s: float) -> int:
    """Index of the bucket that a wait falls into."""
    if wait_s <= FIRST_EDGE_S:
        return 0
    return min(NUM_BUCKETS - 1, math.ceil(math.log2(wait_s / FIRST_EDGE_S)))


def quantile_s(counts: Sequence[int]) -> float | None:
    """The upper edge of the bucket in which the ``QUANTILE`` of the waits lies; None for too few of them."""
    total, seen = sum(counts), 0
    if total < MIN_WAITS:
        return None
    for index, count in enumerate(counts):
        seen += count
        if seen >= QUANTILE * total:
            return min(math.ldexp(FIRST_EDGE_S, index), limits.MAX_TOOL_WAIT_S)
    raise AssertionError("the last bucket completes the total")


def _kept(names: Iterable[str]) -> list[str]:
    """Each name once; models invent names, so overlong ones are left out."""
    return [name for name in dict.fromkeys(names) if len(name.encode()) <= limits.MAX_NAME_BYTES]
