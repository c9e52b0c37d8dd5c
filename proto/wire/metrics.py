"""What routers, ranks and the fleet share to be scraped by Prometheus: a registry, an endpoint, buckets.

Names are ``seamount_<part>_<what>_<unit>``, counters end in ``_total``; labels are from closed sets (pool, rank of the
gang, tier, path, outcome): never a session, a tenant or anything of a request.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from seamount.wire.errors import InvalidArgument

NUM_PORTS = 64
"""Endpoints on one address: with a fixed port, each process takes the first free one from there on."""
SCRAPE_TIMEOUT_S = 5.0
"""What a process's event loop gets to say what is there; a scrape fails where it hangs."""

LONG_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: first tokens and whole turns, prompts of 128K tokens among them."""
SHORT_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
"""Seconds: gaps between tokens, steps of a gang."""
STORE_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds: round trips to Redis, which syncs its file before it answers."""


def new_registry() -> CollectorRegistry:
    """A registry of one process's own, with its version, memory, CPU time and open files."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each: when counters began
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Info("seamount_build", "What runs here", registry=registry).info({"version": version("seamount")})
    return registry


class LoopCollector(Collector):
    """Metrics read at the scrape, on the process's event loop, where what they are read from is at rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Callable[[], Iterable[Metric]]) -> None:
        self._loop, self._read = loop, read

    def describe(self) -> Iterable[Metric]:
        """Nothing: their names are known when they are read."""
        return ()

    def collect(self) -> Iterable[Metric]:
        async def on_loop() -> list[Metric]:
            return list(self._read())

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(SCRAPE_TIMEOUT_S)


class MetricsEndpoint:
    """``/metrics`` of one process, by the client library's own server on a thread of its own."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Listen; ``address`` says where. port: 0 = any free one, else the first free one from there on.

        Raises ``InvalidArgument`` where the host is no address of this machine, or no port is free.
        """
        for candidate in range(port, min(port + NUM_PORTS, 65_536)) if port else (0,):
            try:
                self._server, _ = start_http_server(candidate, host, registry)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise _unusable(host, port, error.strerror or str(error)) from None
        else:
            raise _unusable(host, port, f"{NUM_PORTS} ports from there on are taken")
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening, within half a second and with nobody waiting."""

        def stop() -> None:
            self._server.shutdown()
            self._server.server_close()

        threading.Thread(target=stop, name="metrics: stop", daemon=True).start()


def _unusable(host: str, port: int, cause: str) -> InvalidArgument:
    return InvalidArgument(
        f"cannot serve metrics on {host}:{port}: {cause}; set metrics.host to an address of this machine and "
        "metrics.port to a free port, or to 0 for any",
        field="metrics.port",
        reason="ADDRESS_UNUSABLE",
    )
