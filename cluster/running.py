"""The whole system for as long as a block lasts: on Ray Serve, or as plain processes."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import Settings
from seamount.wire.errors import Unavailable


class Show(Protocol):
    """Part, how many of it are ready, how many are wanted, what is said of the rest (empty if nothing).

    passing: the detail is of the moment, for a display that is redrawn.
    """

    def __call__(self, part: str, num_ready: int, num_wanted: int, detail: str, *, passing: bool = False) -> None: ...


_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """address: of a router. wait: blocks until a part ends by itself, and raises ``Unavailable`` naming it."""

    address: str
    wait: Callable[[], None]


@contextmanager
def running(settings: Settings, *, plain: bool, show: Show) -> Iterator[Running]:
    """Start everything; stop it at the end of the block, however it ends. SIGTERM counts as SIGINT meanwhile.

    Raises what starting raises (``Unavailable``, ``DeadlineExceeded``, ``FailedPrecondition``); nothing is left then.
    """
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    try:
        with _plain(settings, show) if plain else _on_ray(settings, show) as system:
            yield system
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain(settings: Settings, show: Show) -> Iterator[Running]:
    wanted = Counter(router=1)
    for pool, chosen in (("prefill", settings.pools.prefill), ("decode", settings.pools.decode)):
        wanted[pool] = chosen.gangs * chosen.expert_parallel
    ready: Counter[str] = Counter()

    def on_ready(name: str) -> None:
        part = name.split("-", 1)[0]
        ready[part] += 1
        show(part, ready[part], wanted[part], "")

    def on_loading(name: str, num_bytes: int, num_bytes_total: int) -> None:
        part = name.split("-", 1)[0]
        share = num_bytes / max(1, num_bytes_total)
        detail = f"{name}: {share:.0%} of {num_bytes_total / 1e6:,.0f} MB of weights"
        show(part, ready[part], wanted[part], detail, passing=True)

    for part, count in wanted.items():
        show(part, 0, count, "")
    with asyncio.Runner() as runner:
        cluster = runner.run(LocalCluster(settings=settings, on_ready=on_ready, on_loading=on_loading).__aenter__())
        try:
            yield Running(address=cluster.address, wait=lambda: runner.run(_first_end(cluster)))
        finally:
            runner.run(cluster.stop())


async def _first_end(cluster: LocalCluster) -> None:
    processes = dict(cluster.processes)
    while True:
        for name, process in processes.items():
            if process.process.returncode is not None:
                raise Unavailable(
                    f"{name} ended with code {process.process.returncode}; its log: {process.log}",
                    reason="PROCESS_ENDED",
                )
        await asyncio.sleep(_LOOK_S)


@contextmanager
def _on_ray(settings: Settings, show: Show) -> Iterator[Running]:
    from seamount.cluster import app
    from seamount.cluster.redis_server import serve_redis

    def on_progress(pools: list[app.PoolProgress]) -> None:
        for pool in pools:
            show(pool.pool, pool.num_ready, pool.num_wanted, pool.detail)

    show("redis", 0, 1, "")
    url = settings.redis_url
    with serve_redis(url.get_secret_value() if url else None, settings.redis.data_dir) as redis_url:
        show("redis", 1, 1, "")
        deployment = app.deploy(settings, redis_url=redis_url, on_progress=on_progress)
        try:
            yield Running(address=deployment.router_address, wait=signal.pause)
        finally:
            deployment.stop()
