"""One rank or one router as a plain process: ``python -m seamount.cluster.process``.

What to be stands in one JSON object on standard input (it holds secrets, so never on the command line). When it serves,
the process prints one JSON line, ``{"address": …, "metrics": …}`` (of its gRPC server, and of ``/metrics``), and runs
until SIGTERM, SIGINT or the end of its parent. Before that, a rank prints ``{"loading": [bytes read, bytes to read]}``
at each percent of its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal, Protocol

import uvloop
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from seamount.cluster.settings import Settings, is_loopback, validate
from seamount.wire import failpoints, logs
from seamount.wire.errors import InvalidArgument
from seamount.wire.ids import GangId
from seamount.workers.spec import PoolName

_PR_SET_PDEATHSIG = 1
GRACE_S = 5.0
"""What a stopping process gives its streams."""


class _Start(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, object]
    redis_url: str
    parent_pid: int
    allow_forced_tokens: bool = False
    failpoints: Path | None = None
    """Where a test listens for them; None = off."""

    def resolved_settings(self) -> Settings:
        return validate({**self.settings, "redis_url": self.redis_url})


class RankStart(_Start):
    """Be a rank."""

    kind: Literal["rank"] = "rank"
    pool: PoolName
    gang_id: str
    gang_rank: int


class RouterStart(_Start):
    """Be a router."""

    kind: Literal["router"] = "router"
    port: int = 0


_START: TypeAdapter[RankStart | RouterStart] = TypeAdapter(
    Annotated[RankStart | RouterStart, Field(discriminator="kind")]
)


class _Part(Protocol):
    @property
    def metrics_address(self) -> str: ...
    async def start(self) -> str: ...
    async def leave_and_stop(self, grace_s: float) -> None: ...


def main() -> None:
    """Read what to be, be it until told to stop. Exit status 1 where the part could not start."""
    start = _START.validate_json(sys.stdin.buffer.read())
    end_with(start.parent_pid)
    be(start)


def be(start: RankStart | RouterStart) -> None:
    """Be it until told to stop. Raises typed errors where it could not start."""
    logs.configure()
    if start.failpoints is not None:
        turn_on_failpoints(start.resolved_settings(), start.failpoints)
    uvloop.run(_serve(start))  # what Ray Serve's replicas run on, too


def turn_on_failpoints(settings: Settings, listener: Path) -> None:
    """Report them to a test's socket from now on. Raises ``InvalidArgument`` where anything listens off loopback."""
    for field, host in (("router.host", settings.router.host), ("pools.host", settings.pools.host)):
        if not is_loopback(host):
            raise InvalidArgument(
                f"failpoints are for tests on loopback: set {field} = {host} to 127.0.0.1, or start without them",
                field="failpoints",
            )
    failpoints.turn_on(failpoints.Listener(path=listener))


def end_with(parent_pid: int) -> None:
    """Get SIGTERM when the parent ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it ended before prctl
        raise SystemExit(1)


async def _serve(start: RankStart | RouterStart) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    part = _part(start)
    starting = asyncio.create_task(part.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
    elif not stop.is_set():
        _tell({"address": starting.result(), "metrics": part.metrics_address})
        await stop.wait()
    stopping.cancel()
    await part.leave_and_stop(GRACE_S)


def _part(start: RankStart | RouterStart) -> _Part:
    settings = start.resolved_settings()
    if isinstance(start, RouterStart):
        from seamount.cluster.specs import router_spec
        from seamount.router.server import RouterServer

        return RouterServer(
            router_spec(
                settings,
                redis_url=start.redis_url,
                port=start.port,
                metrics_host=settings.metrics.host,
                allow_forced_tokens=start.allow_forced_tokens,
            )
        )
    from seamount.cluster.rank import RegisteredRank
    from seamount.cluster.specs import rank_spec

    spec = rank_spec(
        settings,
        pool=start.pool,
        gang_id=GangId(start.gang_id),
        gang_rank=start.gang_rank,
        host=settings.pools.host,
        metrics_host=settings.metrics.host,
        allow_forced_tokens=start.allow_forced_tokens,
    )
    return RegisteredRank(spec, settings, on_loading=lambda done, total: _tell({"loading": [done, total]}))


def _tell(news: dict[str, object]) -> None:
    print(json.dumps(news), flush=True)


if __name__ == "__main__":
    main()
