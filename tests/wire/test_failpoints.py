"""Points report and wait where they were turned on, and are nothing where they were not."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from seamount.cluster.process import turn_on_failpoints
from seamount.cluster.settings import Settings, validate
from seamount.wire import failpoints
from seamount.wire.errors import InvalidArgument

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from seamount.wire import failpoints
failpoints.turn_on(failpoints.Listener(path=Path(sys.argv[1]), points=frozenset({"rank.token"})))
points = ["rank.token", "rank.frame", "rank.token", "rank.token"]
print([failpoints.reached(point, at) for at, point in enumerate(points)])
"""


def test_off_it_is_nothing() -> None:
    assert not failpoints.reached("rank.token", 1)


def test_a_process_reports_and_waits_for_each_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(20)
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "s")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb", buffering=0) as lines:
                assert json.loads(lines.readline()) == {"point": "rank.token", "at": "0", "pid": process.pid}
                assert process.poll() is None
                lines.write(b"go\n")
                assert json.loads(lines.readline())["at"] == "2", "only the points that were asked for"
                lines.write(b"damage\n")
                lines.readline()
            assert process.communicate(timeout=20)[0] == "[False, False, True, False]\n", "a listener that is gone"


def test_points_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for part in ("router", "workers") for path in (ROOT / part).rglob("*.py"))
    assert set(re.findall(r'failpoints\.reached\("([\w.]+)"', source)) == failpoints.POINTS
    with pytest.raises(InvalidArgument, match=r"rank\.tokens"):
        failpoints.Listener(path=Path("s"), points=frozenset({"rank.tokens"}))


@pytest.mark.parametrize("part", ["router", "pools"])
def test_refused_where_others_can_connect(tmp_path: Path, part: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x" * 40)
    files = {"api_key_file": str(secret), "worker_token_file": str(secret)}
    chosen: dict[str, object] = {"router": {**files, "host": "0.0.0.0"} if part == "router" else files}
    settings: Settings = validate({**chosen, "pools": {"host": "0.0.0.0" if part == "pools" else "127.0.0.1"}})
    with pytest.raises(InvalidArgument, match=rf"{part}\.host"):
        turn_on_failpoints(settings, tmp_path / "s")
