from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from seamount.cluster.kubernetes.api import KubernetesApi

from .api_server import ApiServer


@pytest.fixture
def server() -> Iterator[ApiServer]:
    started = ApiServer()
    started.start()
    yield started
    started.stop()


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> Path:
    return server.kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture
def api(kubeconfig: Path) -> Iterator[KubernetesApi]:
    opened = KubernetesApi.connect(kubeconfig=kubeconfig)
    yield opened
    opened.close()
