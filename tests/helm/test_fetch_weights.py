"""The init container's script, run by a real shell against a real HTTP server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rendered_chart import CHART

SCRIPT = CHART / "files" / "fetch-weights.sh"
FILES = {"config.json": b"{}", "model-00001.safetensors": b"\x00\x01" * 5000, "parts/names.json": b"[]"}


class Server:
    """Serves FILES; ``asked``: the paths that were."""

    def __init__(self, folder: Path) -> None:
        for name, content in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                asked.append(self.path)

        self.asked = asked
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "served")
    yield started
    started.close()


def fetch(
    server: Server, folder: Path, *, skip: str = "", sums: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """As the pod runs it."""
    target = folder / "weights"
    target.mkdir(exist_ok=True)
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()} | (sums or {})
    (folder / "sums").write_text("".join(f"{total}  {name}\n" for name, total in listed.items()))
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BASE_URL": server.url,
        "TARGET": str(target),
        "SUMS": str(folder / "sums"),
        "SKIP": skip,
    }
    command = ["/bin/sh", "-eu", str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_files_arrive_whole_and_are_fetched_once(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path).returncode == 0
    assert (tmp_path / "weights" / "model-00001.safetensors").read_bytes() == FILES["model-00001.safetensors"]
    assert len(server.asked) == 3
    assert fetch(server, tmp_path).returncode == 0
    assert len(server.asked) == 3
    (tmp_path / "weights" / "config.json").write_bytes(b"{")  # cut short by a crash
    assert fetch(server, tmp_path).returncode == 0
    assert (tmp_path / "weights" / "config.json").read_bytes() == b"{}"
    assert len(server.asked) == 4


def test_a_file_that_is_another_one_is_refused_by_name(server: Server, tmp_path: Path) -> None:
    done = fetch(server, tmp_path, sums={"model-00001.safetensors": "0" * 64})
    assert done.returncode == 1
    assert "model-00001.safetensors is not what weights.download.sha256 says" in done.stderr
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["config.json"]


def test_a_file_that_is_not_there_ends_it(server: Server, tmp_path: Path) -> None:
    done = fetch(server, tmp_path, sums={"missing.json": "0" * 64})
    assert done.returncode != 0
    assert "404" in done.stderr
    assert not (tmp_path / "weights" / "missing.json").exists()


def test_routers_leave_the_weights_out(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path, skip="*.safetensors").returncode == 0
    assert sorted(path.name for path in (tmp_path / "weights").rglob("*.*")) == ["config.json", "names.json"]
