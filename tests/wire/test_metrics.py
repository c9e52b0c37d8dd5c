"""Where a process is scraped, and what a scrape says while its event loop hangs."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from seamount.wire import metrics
from seamount.wire.errors import InvalidArgument
from seamount.wire.metrics import LoopCollector, MetricsEndpoint, new_registry


@contextmanager
def served(port: int = 0) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(new_registry(), host="127.0.0.1", port=port)
    try:
        yield endpoint
    finally:
        endpoint.close()


def read(endpoint: MetricsEndpoint) -> str:
    with urlopen(f"http://{endpoint.address}/metrics", timeout=10) as response:
        return str(response.read().decode())


def test_a_process_tells_its_version_and_memory_and_no_times_of_creation() -> None:
    with served() as endpoint:
        text = read(endpoint)
    assert 'seamount_build_info{version="' in text
    assert "process_resident_memory_bytes" in text
    assert "_created" not in text


def test_processes_of_one_address_take_one_port_after_the_other() -> None:
    with served() as first:
        port = int(first.address.rpartition(":")[2])
        with served(port) as second, served(port) as third:
            taken = [int(one.address.rpartition(":")[2]) for one in (second, third)]
            assert port < taken[0] < taken[1] < port + metrics.NUM_PORTS
            assert "seamount_build_info" in read(third)


def test_a_closed_endpoint_gives_its_port_back() -> None:
    with served() as endpoint:
        port = int(endpoint.address.rpartition(":")[2])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    raise AssertionError("it still listens")


def test_an_address_of_another_machine_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(InvalidArgument) as caught:
        MetricsEndpoint(new_registry(), host="192.0.2.1", port=0)
    assert caught.value.field == "metrics.port"
    assert "metrics.host" in caught.value.message


def test_no_free_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "NUM_PORTS", 1)
    with served() as endpoint:
        port = int(endpoint.address.rpartition(":")[2])
        with pytest.raises(InvalidArgument, match="taken"):
            MetricsEndpoint(new_registry(), host="127.0.0.1", port=port)


async def test_a_scrape_reads_on_the_loop_and_fails_while_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, reads = asyncio.get_running_loop(), []

    def families() -> Iterable[Metric]:
        reads.append(asyncio.get_running_loop())
        family = GaugeMetricFamily("seamount_test_things", "Things")
        family.add_metric([], 3)
        yield family

    registry = new_registry()
    registry.register(LoopCollector(loop, families))
    endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    try:
        assert "seamount_test_things 3.0" in await asyncio.to_thread(read, endpoint)
        assert reads == [loop]
        monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT_S", 0.05)
        failed = loop.run_in_executor(None, read, endpoint)
        time.sleep(1.0)  # noqa: ASYNC251 - the loop hangs
        with pytest.raises(HTTPError) as caught:
            await failed
        assert caught.value.code == 500
    finally:
        endpoint.close()
