"""Ray as ``seamount up`` starts it; each test in a process of its own, since Ray reads its choices at its import."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_START_AND_STOP = """
import sys
from pathlib import Path
import psutil
from seamount.cluster.local_ray import LocalRay

run_dir = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    assert LocalRay.is_needed()
    started = LocalRay.start(run_dir)
    assert not LocalRay.is_needed()
    processes = psutil.Process().children(recursive=True)
    assert len(processes) > 2
    for process in [psutil.Process(), *processes]:
        for socket in process.net_connections(kind="inet"):
            if socket.status == psutil.CONN_LISTEN:
                assert socket.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process.name(), socket.laddr)
    from ray._raylet import AuthenticationTokenLoader, get_authentication_mode, AuthenticationMode
    assert get_authentication_mode() is AuthenticationMode.TOKEN
    started.stop()
    started.stop()
    _, left = psutil.wait_procs(processes, timeout=10)
    assert not left, left
    assert any((run_dir / "ray-logs").glob("gcs_server*"))
print("fine")
"""

_IMPORTED_EARLY = """
import sys
from pathlib import Path
import ray
from seamount.cluster.local_ray import LocalRay
from seamount.wire.errors import FailedPrecondition

try:
    LocalRay.start(Path(sys.argv[1]))
except FailedPrecondition as error:
    assert error.reason == "RAY_IMPORTED_EARLY"
    print("fine")
"""


def run(script: str, *arguments: object, temp_dir: str = tempfile.gettempdir()) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"TMPDIR": temp_dir}
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_stays_on_loopback_asks_for_a_token_and_leaves_nothing_but_its_logs(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as temp_dir:  # pytest's own is too long for sockets
        assert run(_START_AND_STOP, tmp_path / "run", 2, temp_dir=temp_dir).strip() == "fine"
        assert list(Path(temp_dir).iterdir()) == []


def test_it_refuses_where_ray_would_listen_beyond_loopback(tmp_path: Path) -> None:
    assert run(_IMPORTED_EARLY, tmp_path / "run").strip() == "fine"
