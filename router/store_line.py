"""A connection to Redis of its own, for calls that follow each other many times a second.

The client's pipelines take a connection from a pool, check it, and guard each reply with a timer: 0.3 ms of processor
time for one call, 20 µs for each further one. Here it is 0.1 ms and 10 µs. Commands are packed by hiredis, written at
once, and their replies read one after the other; whoever calls brings the time limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
import redis.asyncio
import redis.exceptions as redis_errors

Command = tuple[bytes | str | int, ...]


class Line:
    """Connects when it is first used, and again after any failure. Replies come as they are, undecoded."""

    def __init__(self, pool: redis.asyncio.ConnectionPool) -> None:
        """pool: whose connections this one is like."""
        untimed = {**pool.connection_kwargs, "socket_timeout": None}
        self._connection = pool.connection_class(**untimed)
        self._lock = asyncio.Lock()

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order. Raises the first error reply when all have been read, so that the other commands have
        been done, and what the client raises for a connection that breaks."""
        packed = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]  # its stub: tuples of one
        async with self._lock:
            try:
                await self._connection.send_packed_command(packed)
                replies = [await self._reply() for _ in commands]
            except BaseException:  # a reply that nobody has read would be taken for the next command's
                await self._connection.disconnect(nowait=True)
                raise
        for reply in replies:
            if isinstance(reply, redis_errors.ResponseError):
                raise reply
        return replies

    async def close(self) -> None:
        """Harmless when repeated."""
        await self._connection.disconnect()

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response()
        except redis_errors.ResponseError as error:
            return error
