"""The whole system as plain processes: real ranks, routers, Redis, gRPC and gloo; only Ray is left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.forking import Parent
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import Settings, validate
from seamount.router.client import AsyncClient


class StartCluster(Protocol):
    def __call__(
        self, overrides: Mapping[str, Any] | None = None, *, redis_url: str | None = None, num_routers: int = 1
    ) -> AbstractAsyncContextManager[LocalCluster]: ...


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "test"
    init_checkpoint(path, seed=20, geometry="test")
    return path


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, Mapping) else value
    return result


@pytest.fixture(scope="session")
def make_settings(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Mapping[str, Any] | None], Settings]:
    """Settings of a test cluster: float64, exact layout, EP 2, one prefill rank, every prompt prefilled remotely."""

    def make(overrides: Mapping[str, Any] | None = None) -> Settings:
        run_dir = tmp_path_factory.mktemp("run")
        base = {
            "run_dir": str(run_dir),
            "model": {"path": str(checkpoint), "name": "test-model"},
            "cache": {"layout": "exact", "dtype": "float64", "num_pages": 256},
            "engine": {"max_context_tokens": 4096, "prefill_chunk_tokens": 128, "max_batch_tokens": 256},
            "router": {"port": 0, "cut_ahead": False},  # receipts would depend on when a rank rested
            "placement": {"path": "remote"},
            "redis": {"data_dir": str(run_dir / "redis")},
        }
        return validate(merged(base, overrides or {}))

    return make


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def parent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parent]:
    """Imports once for all processes of these tests."""
    async with Parent(tmp_path_factory.mktemp("parent")) as started:
        yield started


@pytest.fixture(scope="session")
def start_cluster(make_settings: Callable[[Mapping[str, Any] | None], Settings], parent: Parent) -> StartCluster:
    @asynccontextmanager
    async def start(
        overrides: Mapping[str, Any] | None = None, *, redis_url: str | None = None, num_routers: int = 1
    ) -> AsyncIterator[LocalCluster]:
        chosen = dict(overrides or {})
        if redis_url is not None:
            chosen["redis_url"] = redis_url
        async with LocalCluster(
            settings=make_settings(chosen), allow_forced_tokens=True, num_routers=num_routers, parent=parent
        ) as cluster:
            yield cluster

    return start


@pytest.fixture(scope="session")
def pages_are_back() -> Callable[[AsyncClient], Awaitable[None]]:
    """Asserts that no rank holds a reservation and every page is free or merely cached, in the time in which what a
    frozen or dead router reserved expires (``RESERVED_FOR_S``)."""

    async def check(client: AsyncClient) -> None:
        held: list[str] = []
        for _ in range(150):
            ranks = [rank.state for rank in await client.list_ranks() if rank.alive]
            held = [
                f"{state.rank_id}: {state.num_reservations} reservations, "
                f"{state.num_pages - state.num_free_pages - state.num_cached_pages} pages"
                for state in ranks
                if state.num_reservations or state.num_free_pages + state.num_cached_pages != state.num_pages
            ]
            if ranks and not held:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"not given back: {held}")

    return check


@pytest.fixture(scope="session")
def the_busy_decode_rank() -> Callable[[LocalCluster, AsyncClient], Awaitable[str]]:
    """The process that generates; ranks' states reach the router ten times a second, so it may take a look or two."""

    async def find(cluster: LocalCluster, client: AsyncClient) -> str:
        for _ in range(20):
            busy = [r.state for r in await client.list_ranks() if r.state.num_running and "decode" in r.state.gang_id]
            if len(busy) == 1:
                return next(name for name, p in cluster.processes.items() if p.pid == busy[0].process_id)
            await asyncio.sleep(0.05)
        raise AssertionError("no decode rank is seen to generate")

    return find
