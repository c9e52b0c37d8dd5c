from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from seamount.cluster.cli import main
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


@pytest.fixture
def run(kubeconfig: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of ``seamount k8s ...``."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["k8s", *arguments, "--kubeconfig", str(kubeconfig)])
        code = caught.value.code
        told = capsys.readouterr()
        return (code if isinstance(code, int) else 0 if code is None else 1), told.out, told.err

    return call
