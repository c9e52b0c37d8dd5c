"""A real Valkey for every test that wants one: one server a run, one namespace a test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from seamount.cluster.redis_server import RedisServer
from seamount.router.store import Store


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
