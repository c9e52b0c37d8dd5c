"""One system for all fault tests, restored after each; how long recoveries took, at the end of the run.

A dozen seeded points run with all other tests; ``make test-faults`` runs every point (marker ``faults``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from harness.recoveries import Recoveries
from harness.system import CHUNK_TOKENS, FaultSystem, fault_system
from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.forking import Parent
from seamount.cluster.settings import validate
from seamount.router.tokenizer import Tokenizer

_recoveries = pytest.StashKey[Recoveries]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_recoveries] = Recoveries()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if table := config.stash[_recoveries].table():
        terminalreporter.section("recoveries")
        for line in table:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def fault_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "faults"
    init_checkpoint(path, seed=20, geometry="test")
    return path


@pytest.fixture(scope="session")
def tokenizer(fault_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(fault_checkpoint)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def parent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parent]:
    """What all processes of these tests are forked from."""
    async with Parent(tmp_path_factory.mktemp("parent")) as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running(
    fault_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, parent: Parent
) -> AsyncIterator[FaultSystem]:
    """Timeouts as they are by default: what is promised is promised of them."""
    run_dir = tmp_path_factory.mktemp("run")
    settings = validate(
        {
            "run_dir": str(run_dir),
            "model": {"path": str(fault_checkpoint), "name": "test-model"},
            "cache": {"layout": "exact", "dtype": "float64", "num_pages": 256},
            "engine": {"max_context_tokens": 4096, "prefill_chunk_tokens": CHUNK_TOKENS, "max_batch_tokens": 96},
            "pools": {"prefill": {"gangs": 1}, "decode": {"gangs": 3, "expert_parallel": 1}},
            "router": {"port": 0},
            "placement": {"path": "remote"},
            "redis": {"data_dir": str(run_dir / "redis")},
        }
    )
    async with fault_system(settings, parent, pytestconfig.stash[_recoveries]) as system:
        yield system


@pytest_asyncio.fixture(loop_scope="session")
async def system(running: FaultSystem) -> AsyncIterator[FaultSystem]:
    """The system, whole; afterwards all caches are checked, and whoever was killed is started anew."""
    yield running
    running.listener.clear()
    for proxy in running.proxies.values():
        proxy.clear()
    await running.restore()
    await running.check_caches()
