"""``seamount status``: what the pools and ranks say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message as ProtoMessage
from rich.console import Console
from rich.table import Table

from seamount.router.client import Client
from seamount.v1 import admin_pb2, worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """As one router sees it."""

    address: str
    pools: list[admin_pb2.PoolState]
    ranks: list[admin_pb2.Rank]

    @property
    def complete(self) -> bool:
        """Whether every rank that the router knows is alive and healthy, and there are decode ranks."""
        decode = [rank for rank in self.ranks if rank.state.pool == worker_pb2.POOL_DECODE]
        return bool(decode) and all(rank.alive and rank.state.healthy for rank in self.ranks)


def read_status(client: Client) -> ClusterStatus:
    """Raises ``Unavailable`` without a router, ``PermissionDenied`` without the admin role."""
    return ClusterStatus(address=client.core.address, pools=client.list_pools(), ranks=client.list_ranks())


def plain(status: ClusterStatus) -> dict[str, Any]:
    """``{"address", "complete", "pools": […], "ranks": […]}`` for JSON, fields as in admin.proto, pools by name."""
    return {
        "address": status.address,
        "complete": status.complete,
        "pools": [_plain(pool) for pool in status.pools],
        "ranks": [_plain(rank) for rank in status.ranks],
    }


def print_tables(status: ClusterStatus, console: Console) -> None:
    pools = Table(title=f"Pools behind {status.address}", title_justify="left")
    for column in ("pool", "gangs", "ranks", "healthy", "pages", "free", "host", "disk", "running", "waiting"):
        pools.add_column(column, justify="left" if column == "pool" else "right")
    for pool in status.pools:
        figures = (
            pool.num_gangs,
            pool.num_ranks,
            pool.num_healthy_ranks,
            pool.num_pages,
            pool.num_free_pages,
            pool.num_host_cached_pages,
            pool.num_disk_cached_pages,
            pool.num_running,
            pool.num_waiting,
        )
        pools.add_row(_pool_name(pool.pool), *map(str, figures))
    ranks = Table(title="Ranks", title_justify="left")
    for column in (
        "rank",
        "state",
        "address",
        "free / cached / all pages",
        "host",
        "disk",
        "running",
        "computed",
        "sampled",
        "sessions",
    ):
        ranks.add_column(column, justify="left" if column in ("rank", "state", "address") else "right")
    for rank in status.ranks:
        state = rank.state
        ranks.add_row(
            state.rank_id,
            _condition(rank),
            rank.address,
            f"{state.num_free_pages} / {state.num_cached_pages} / {state.num_pages}",
            f"{state.num_host_cached_pages} / {state.num_host_pages}",
            f"{state.num_disk_cached_pages} / {state.num_disk_pages}",
            f"{state.num_running} + {state.num_waiting}",
            str(state.num_computed_tokens),
            str(state.num_sampled_tokens),
            str(len(state.session_ids)),
        )
    console.print(pools)
    console.print(ranks)


def _condition(rank: admin_pb2.Rank) -> str:
    if not rank.alive:
        return "[red]dead"
    if not rank.state.healthy:
        return "[red]unhealthy"
    return "[yellow]draining" if rank.state.draining else "[green]healthy"


def _pool_name(pool: worker_pb2.Pool) -> str:
    return worker_pb2.Pool.Name(pool).removeprefix("POOL_").lower()


def _plain(message: ProtoMessage) -> dict[str, Any]:
    return {field.name: _plain_value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain_value(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        return _pool_name(value)  # the only enum of these messages
    if field.is_repeated:
        return list(value)
    return _plain(value) if field.message_type is not None else value
