"""A real Valkey for every test that wants one: one server a run, one namespace a test. Figures at the end of a run."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest

from seamount.cluster.redis_server import RedisServer
from seamount.router.store import Store

# Ray reads these when it is first imported, which some test files do before any test runs.
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nodes have the address 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
}

_figures = pytest.StashKey[list[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_figures] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed and item.get_closest_marker("figures") and report.capstdout:
        item.config.stash[_figures].append((item.nodeid, report.capstdout))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Repeat what tests marked ``figures`` printed: a passing run shows its measurements, too."""
    if config.stash[_figures]:
        terminalreporter.section("figures")
        for name, text in config.stash[_figures]:
            terminalreporter.write_line(name)
            for line in text.strip().splitlines():
                terminalreporter.write_line(f"    {line}")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that lives as long as the test run. Tests that stop or damage one start their own."""
    with RedisServer() as server:
        yield server.start(Path(tmp_path_factory.mktemp("redis")))


@pytest.fixture
def namespace() -> str:
    """A key prefix of this test's own."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def store(redis_url: str, namespace: str) -> AsyncIterator[Store]:
    """An open store in this test's namespace."""
    opened = await Store.open(redis_url, namespace=namespace)
    yield opened
    await opened.close()
