"""The test's side of ``seamount.wire.failpoints``: who waits where, and what they are told."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One process at one point."""

    point: str
    at: str
    pid: int


@dataclass(slots=True, kw_only=True)
class Paused:
    """A process that waits at a point until it is killed, or told to go on."""

    reached: Reached
    _answer: asyncio.Future[bytes]

    @property
    def pid(self) -> int:
        return self.reached.pid

    def go_on(self) -> None:
        if not self._answer.done():
            self._answer.set_result(b"go\n")


@dataclass(slots=True, kw_only=True)
class Trap:
    """Catches the first process that fits; ``sprung`` is there then."""

    fits: Callable[[Reached], bool]
    sprung: asyncio.Future[Paused] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def wait(self, timeout_s: float = 30.0) -> Paused:
        async with asyncio.timeout(timeout_s):
            return await self.sprung


class FailpointListener:
    """Listens while the block lasts. Everybody is told to go on, except whom a trap or ``damage`` catches."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="seamount-")
        self.path = Path(self._folder.name) / "failpoints.sock"
        self.seen: list[Reached] = []
        self._traps: list[Trap] = []
        self._damage: Callable[[Reached], bool] | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FailpointListener:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._server is not None
        self.clear()
        self._server.close()
        self._folder.cleanup()

    def stop_at(self, point: str, fits: Callable[[Reached], bool] = lambda _: True) -> Trap:
        """The first process from now on that reaches ``point`` and fits waits there."""
        trap = Trap(fits=lambda reached: reached.point == point and fits(reached))
        self._traps.append(trap)
        return trap

    def damage(self, fits: Callable[[Reached], bool]) -> None:
        """What is made at points that fit is damaged, until ``clear``."""
        self._damage = fits

    def clear(self) -> None:
        """No traps, no damage, nothing seen; who waits goes on."""
        for trap in self._traps:
            if not trap.sprung.cancel() and not trap.sprung.cancelled():
                trap.sprung.result().go_on()
        self._traps, self._damage = [], None
        self.seen.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(await self._answer(Reached(**json.loads(line))))
        except (ConnectionError, asyncio.CancelledError):  # killed, or the test is over
            pass
        finally:
            writer.close()

    async def _answer(self, reached: Reached) -> bytes:
        self.seen.append(reached)
        for trap in self._traps:
            if not trap.sprung.done() and trap.fits(reached):
                answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
                trap.sprung.set_result(Paused(reached=reached, _answer=answer))
                return await answer
        return b"damage\n" if self._damage is not None and self._damage(reached) else b"go\n"
