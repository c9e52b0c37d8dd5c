"""A parent that has imported everything: processes forked from it serve in tenths of a second, not in seconds.

    async with Parent(run_dir) as parent:
        async with LocalCluster(settings, parent=parent) as cluster: ...

The parent is a process of its own (``python -m seamount.cluster.forking``), without threads, event loops or gRPC, so
that forking it is safe. Each connection to its socket asks for one process: one line of JSON says what to be and
where to log; what the process tells comes back on the same connection, its id first. The connection ends when it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from seamount.cluster.process import RankStart, RouterStart, be, end_with
from seamount.wire.errors import Unavailable

_START_TIMEOUT_S = 120.0


class ForkedProcess:
    """What ``LocalCluster`` needs of ``asyncio.subprocess.Process``. It has ended when its connection does: nobody else
    holds it."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.stdout = asyncio.StreamReader()
        self._following = asyncio.create_task(self._follow(reader, writer), name=f"process {pid}")

    @property
    def returncode(self) -> int | None:
        """None while it runs; that it has ended is known, its status is not: always -1."""
        return -1 if self._following.done() else None

    def send_signal(self, number: int) -> None:
        """Raises ``ProcessLookupError`` where it has ended."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> None:
        """Return when it has ended."""
        await asyncio.wait({self._following})

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while told := await reader.read(1 << 16):
                self.stdout.feed_data(told)
        self.stdout.feed_eof()
        writer.close()


class Parent:
    """Starts the parent process and asks it for others; they end with it, and it ends with this process."""

    def __init__(self, folder: Path) -> None:
        """folder: for its log."""
        self._log = folder / "parent.log"
        # Of its own: a socket's path may have 107 bytes, and test folders are deep.
        self._folder = tempfile.TemporaryDirectory(prefix="seamount-")
        self._socket = Path(self._folder.name) / "parent.sock"
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Parent:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "seamount.cluster.forking",
                str(self._socket),
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(_START_TIMEOUT_S):
            if not await self._process.stdout.readline():
                raise Unavailable(f"the parent did not start; see {self._log}", reason="START_FAILED")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            await self._process.wait()
        self._folder.cleanup()

    async def fork(self, start: RankStart | RouterStart, log: Path) -> ForkedProcess:
        """A process that becomes what ``start`` says; its standard error goes to ``log``."""
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        asked = {"start": start.model_dump(mode="json"), "kind": start.kind, "log": str(log)}
        writer.write(json.dumps(asked).encode() + b"\n")
        first = await reader.readline()
        if not first:
            raise Unavailable(f"a process did not start; see {log}", reason="START_FAILED")
        return ForkedProcess(json.loads(first)["pid"], reader, writer)


def main() -> None:
    """Import, listen, fork for whoever asks."""
    path, starter = sys.argv[1:]
    end_with(int(starter))
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                asked = json.loads(lines.readline())
                if os.fork() == 0:
                    listener.close()
                    _become(connection, asked)


def _become(connection: socket.socket, asked: dict[str, object]) -> None:
    """In the child: take the connection as standard output, and never return."""
    status = 1
    try:
        parent = os.getppid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(str(asked["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(connection.fileno(), 1)
        os.dup2(log, 2)
        os.close(log)
        connection.close()
        os.write(1, json.dumps({"pid": os.getpid()}).encode() + b"\n")
        random.seed()  # siblings would draw alike
        end_with(parent)
        be(_START_OF[str(asked["kind"])].model_validate(asked["start"]))
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


_START_OF: dict[str, type[RankStart] | type[RouterStart]] = {"rank": RankStart, "router": RouterStart}


def _import_all() -> None:
    import seamount.cluster.rank
    import seamount.cluster.specs
    import seamount.router.server  # noqa: F401


if __name__ == "__main__":
    main()
