"""The whole system as plain processes on this machine, without Ray: for tests, faults and benchmarks.

    async with LocalCluster(settings) as cluster:
        client = AsyncClient(cluster.address)

Every rank and router is a process of its own; Redis is the given one or an embedded server. Nothing restarts a process
that dies: whoever kills one decides.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from seamount.cluster.forking import ForkedProcess, Parent
from seamount.cluster.process import GRACE_S, RankStart, RouterStart
from seamount.cluster.redis_server import serve_redis
from seamount.cluster.sections import NODE_ADDRESS
from seamount.cluster.settings import Settings, is_loopback
from seamount.cluster.specs import gang_ids, pool_settings
from seamount.wire.errors import InvalidArgument, Unavailable
from seamount.workers.spec import PoolName

START_TIMEOUT_S = 120.0
CUDA_START_TIMEOUT_S = 600.0
"""Kernels are compiled, too."""


@dataclass(slots=True, kw_only=True)
class LocalProcess:
    """One process: ``name`` is ``router-0``, ``prefill-0.0``, ``decode-0.1`` …"""

    name: str
    start: RankStart | RouterStart
    process: asyncio.subprocess.Process | ForkedProcess
    log: Path
    address: str = ""
    metrics_address: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(slots=True, kw_only=True)
class LocalCluster:
    """Async context manager; ``address`` is that of the first router.

    num_routers: each with a port of its own (the first takes ``settings.router.port``). allow_forced_tokens: tests may
    dictate the sampled ids; refused off loopback. failpoints: where a test listens for them. parent: what processes are
    forked from, None = each one imports for itself. redis_urls: by process name, of those that reach Redis another way.
    on_ready: called with a process's name when it serves; on_loading: with its name, bytes of weights read and to read,
    at each percent.
    """

    settings: Settings
    num_routers: int = 1
    allow_forced_tokens: bool = False
    failpoints: Path | None = None
    parent: Parent | None = None
    redis_urls: Mapping[str, str] = field(default_factory=dict)
    on_ready: Callable[[str], None] | None = None
    on_loading: Callable[[str, int, int], None] | None = None
    processes: dict[str, LocalProcess] = field(default_factory=dict)
    redis_url: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def address(self) -> str:
        return self.processes["router-0"].address

    async def __aenter__(self) -> LocalCluster:
        hosts = (self.settings.router.host, self.settings.pools.host)
        if self.allow_forced_tokens and not all(map(is_loopback, hosts)):
            raise InvalidArgument("forced tokens are for tests on loopback only", field="allow_forced_tokens")
        for name, host in (("pools.host", self.settings.pools.host), ("metrics.host", self.settings.metrics.host)):
            if host == NODE_ADDRESS:
                raise InvalidArgument(
                    f"{name} = {NODE_ADDRESS} is Ray's to resolve; plain processes need an address: set {name} to "
                    "one of this machine",
                    field=name,
                )
        try:
            self.settings.run_dir.mkdir(parents=True, exist_ok=True)
            url = self.settings.redis_url
            self.redis_url = self._stack.enter_context(
                serve_redis(url.get_secret_value() if url else None, self.settings.redis.data_dir)
            )
            on_gpu = self.settings.engine.device == "cuda"
            async with asyncio.timeout(CUDA_START_TIMEOUT_S if on_gpu else START_TIMEOUT_S):
                await self._start_all()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop routers, then ranks, then Redis; those that do not end in time are killed."""
        for prefix in ("router", "prefill", "decode"):
            leaving = [self.processes.pop(name) for name in list(self.processes) if name.startswith(prefix)]
            await asyncio.gather(*(_stop(process) for process in leaving))
        self._stack.close()

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process by its name; after SIGKILL it is awaited and forgotten."""
        process = self.processes[name]
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            await process.process.wait()
            del self.processes[name]

    async def start_gang(self, pool: PoolName, gang_id: str) -> list[LocalProcess]:
        """Start all ranks of a gang under a new incarnation of its id; returns when they serve."""
        size = pool_settings(self.settings, pool).expert_parallel
        # Its keys in the directory must not meet those of the gang's earlier life.
        incarnation = f"{gang_id}-{uuid4().hex[:8]}"
        names = [f"{gang_id}.{rank}" for rank in range(size)]
        starts = [
            RankStart(**self._common(name), pool=pool, gang_id=incarnation, gang_rank=rank)
            for rank, name in enumerate(names)
        ]
        return list(await asyncio.gather(*map(self._spawn, names, starts)))

    async def start_router(self, number: int) -> LocalProcess:
        """Start router ``number``; returns when it serves."""
        port = self.settings.router.port if number == 0 else 0
        name = f"router-{number}"
        return await self._spawn(name, RouterStart(**self._common(name), port=port))

    async def _start_all(self) -> None:
        pools: tuple[PoolName, ...] = ("decode", "prefill")
        gangs = [self.start_gang(pool, gang_id) for pool in pools for gang_id in gang_ids(self.settings, pool)]
        await asyncio.gather(*gangs)
        # Routers last: each begins with the state of every rank that is there.
        await asyncio.gather(*(self.start_router(number) for number in range(self.num_routers)))

    def _common(self, name: str) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json", exclude={"redis_url"}, exclude_none=True),
            "redis_url": self.redis_urls.get(name, self.redis_url),
            "parent_pid": os.getpid(),
            "allow_forced_tokens": self.allow_forced_tokens,
            "failpoints": self.failpoints,
        }

    async def _started(
        self, start: RankStart | RouterStart, log_path: Path
    ) -> asyncio.subprocess.Process | ForkedProcess:
        return await (self.parent.fork(start, log_path) if self.parent is not None else _executed(start, log_path))

    async def _spawn(self, name: str, start: RankStart | RouterStart) -> LocalProcess:
        log_path = self.settings.run_dir / f"{name}.log"
        process = await self._started(start, log_path)
        local = LocalProcess(name=name, start=start, process=process, log=log_path)
        self.processes[name] = local
        assert process.stdout is not None
        while not local.address:
            line = await process.stdout.readline()
            if not line:
                raise Unavailable(
                    f"{name} did not start:\n{_last_lines(log_path)}\n(whole log: {log_path})", reason="START_FAILED"
                )
            news = json.loads(line)
            local.address, local.metrics_address = str(news.get("address", "")), str(news.get("metrics", ""))
            if "loading" in news and self.on_loading is not None:
                self.on_loading(name, *news["loading"])
        if self.on_ready is not None:
            self.on_ready(name)
        return local


async def _executed(start: RankStart | RouterStart, log_path: Path) -> asyncio.subprocess.Process:
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "seamount.cluster.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin is not None
    process.stdin.write(start.model_dump_json().encode())
    process.stdin.close()
    return process


async def _stop(local: LocalProcess) -> None:
    process = local.process
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)  # one that a test has stopped would never see the next signal
        process.terminate()
    try:
        async with asyncio.timeout(GRACE_S + 5.0):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _last_lines(path: Path, count: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
