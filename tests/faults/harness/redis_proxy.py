"""A TCP proxy before Redis that understands its protocol: commands can be held, cut off, or robbed of their reply."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import TracebackType


class Fate(Enum):
    PASS = auto()
    CUT = auto()
    """The connection breaks before Redis hears the command."""
    LOSE_REPLY = auto()
    """Redis does it; the connection breaks before the router hears of it."""


@dataclass(slots=True, kw_only=True)
class Command:
    """``name``: the command, of FCALL the Function (``append_tokens``); ``reply``: its first word once it is there."""

    name: str
    arguments: list[bytes]
    reply: bytes | None = None

    @property
    def is_of_a_turn(self) -> bool:
        """Not one of those that come all the time: beats, looks at the directory and at the running index."""
        return self.name in OF_A_TURN


OF_A_TURN = frozenset({"begin_turn", "append_tokens", "commit_turn", "fail_turn", "take_over_turn", "note_lease"})


class RedisProxy:
    """``async with RedisProxy(socket_of_redis) as proxy``: clients connect to ``proxy.url``.

    ``intercept``: asked about each command before it is passed on; while it waits, that connection does. ``seen``: all
    commands of turns.
    """

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Future[Fate]] = set()
        self.intercept: Callable[[Command], Awaitable[Fate]] | None = None
        self.seen: list[Command] = []
        self.is_open = asyncio.Event()
        self.is_open.set()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def __aenter__(self) -> RedisProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def pause(self) -> None:
        """Nothing passes any more, in either direction; connections stay open, until ``go_on``."""
        self.is_open.clear()

    def go_on(self) -> None:
        self.is_open.set()

    def cut(self) -> None:
        """Break every connection."""
        for task in list(self._connections):
            task.cancel()

    def clear(self) -> None:
        self.intercept = None
        self.seen.clear()
        self.go_on()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        with suppress(asyncio.CancelledError, ConnectionError, FileNotFoundError, asyncio.IncompleteReadError):
            try:
                await self._relay(reader, writer)
            finally:
                writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_unix_connection(str(self._upstream))
        pending: deque[tuple[Command, Fate]] = deque()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._commands(reader, to_redis, pending))
                tasks.create_task(self._replies(from_redis, writer, pending))
        except* (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            to_redis.close()

    async def _commands(
        self, reader: asyncio.StreamReader, to_redis: asyncio.StreamWriter, pending: deque[tuple[Command, Fate]]
    ) -> None:
        while True:
            raw, value = await _read(reader)
            assert isinstance(value, list)
            command = _command([part for part in value if isinstance(part, bytes)])
            if command.is_of_a_turn:
                self.seen.append(command)
            await self.is_open.wait()
            fate = await self._fate(command)
            if fate is Fate.CUT:
                raise ConnectionResetError
            pending.append((command, fate))
            to_redis.write(raw)
            await to_redis.drain()

    async def _fate(self, command: Command) -> Fate:
        if self.intercept is None:
            return Fate.PASS
        asking = asyncio.ensure_future(self.intercept(command))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        return await asyncio.shield(asking)  # what it does may break this very connection

    async def _replies(
        self, from_redis: asyncio.StreamReader, writer: asyncio.StreamWriter, pending: deque[tuple[Command, Fate]]
    ) -> None:
        while True:
            raw, value = await _read(from_redis)
            await self.is_open.wait()
            command, fate = pending.popleft()
            first = value[0] if isinstance(value, list) and value else value
            command.reply = first if isinstance(first, bytes) else b""
            if fate is Fate.LOSE_REPLY:
                raise ConnectionResetError
            writer.write(raw)
            await writer.drain()


Value = bytes | int | list["Value"] | None


def _command(parts: list[bytes]) -> Command:
    name = parts[0].decode().lower()
    if name in ("fcall", "fcall_ro"):
        name = parts[1].decode().removeprefix("seamount_1_")
    return Command(name=name, arguments=parts)


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, Value]:
    """One value of RESP2, as it came and as what it says."""
    line = await reader.readuntil(b"\r\n")
    kind, rest = line[:1], line[1:-2]
    match kind:
        case b"+" | b"-":
            return line, rest
        case b":":
            return line, int(rest)
        case b"$":
            if int(rest) < 0:
                return line, None
            body = await reader.readexactly(int(rest) + 2)
            return line + body, body[:-2]
        case b"*":
            raw, values = line, list[Value]()
            for _ in range(int(rest)):
                part, value = await _read(reader)
                raw += part
                values.append(value)
            return raw, values
    raise AssertionError(f"not RESP2: {line!r}")
