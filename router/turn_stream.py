"""The events of one turn while it runs: written once by the turn, followed by any number of clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from seamount.v1 import events_pb2

MAX_EVENTS_PER_BATCH = 256
"""A long turn's events, told at once to one who comes late, would not fit into a message."""


class TurnStream:
    """Append-only list of events. Belongs to one event loop; a follower that goes away leaves the turn alone."""

    def __init__(self) -> None:
        self._events: list[events_pb2.TurnEvent] = []
        self._closed = False
        self._waiters: set[asyncio.Future[None]] = set()

    def append(self, events: Sequence[events_pb2.TurnEvent]) -> None:
        """Deliver events, in order, to all who follow."""
        if events:
            self._events.extend(events)
            self._wake()

    def close(self) -> None:
        """Nothing more will come; followers end after what is there."""
        self._closed = True
        self._wake()

    async def follow(self) -> AsyncIterator[Sequence[events_pb2.TurnEvent]]:
        """All events from the first on, in batches of what is there, until the stream is closed."""
        position = 0
        while True:
            if position < len(self._events):
                batch = self._events[position : position + MAX_EVENTS_PER_BATCH]
                position += len(batch)
                yield batch
            elif self._closed:
                return
            else:
                await self._changed()

    async def _changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
