"""The events of one turn as one router tells them: written once, followed by any number of clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from seamount.v1 import events_pb2
from seamount.wire.errors import OutOfRange, SeamountError, Unavailable

MAX_EVENTS_PER_BATCH = 256
"""A long turn's events, told at once to one who comes late, would not fit into a message."""


class TurnStream:
    """Append-only list of events, numbered from 1. Belongs to one event loop; whoever follows may go away.

    num_forgotten: events before the first one here, which nobody can tell again. on_left: called when the last follower
    went away before the end; it may be set later.
    """

    def __init__(self, *, num_forgotten: int = 0, on_left: Callable[[], None] | None = None) -> None:
        self.on_left = on_left
        self.num_followers = 0
        self._num_forgotten = num_forgotten
        self._events: list[events_pb2.TurnEvent] = []
        self._closed = False
        self._failure: SeamountError | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def last_sequence(self) -> int:
        """Number of the last event; 0 = none."""
        return self._num_forgotten + len(self._events)

    def append(self, events: Sequence[events_pb2.TurnEvent]) -> None:
        """Deliver events, in order, to all who follow; those told already are passed over."""
        new = [event for event in events if event.sequence > self.last_sequence]
        if new:
            assert new[0].sequence == self.last_sequence + 1, "an event is missing"
            self._events.extend(new)
            self._wake()

    def close(self, failure: SeamountError | None = None) -> None:
        """Nothing more will come here; followers end after what is there, with ``failure`` where the turn goes on
        elsewhere or nobody knows what became of it."""
        self._closed, self._failure = True, failure
        self._wake()

    async def follow(self, after: int = 0) -> AsyncGenerator[Sequence[events_pb2.TurnEvent], None]:
        """All events after number ``after``, in batches of what is there, until the stream is closed.

        Raises ``OutOfRange`` where the turn ends before that number, and what the stream was closed with.
        """
        position = max(0, after - self._num_forgotten)
        self.num_followers += 1
        try:
            while True:
                if position < len(self._events):
                    batch = self._events[position : position + MAX_EVENTS_PER_BATCH]
                    position += len(batch)
                    yield batch
                elif self._closed:
                    break
                else:
                    await self._changed()
        finally:
            self.num_followers -= 1
            if not self.num_followers and not self._closed and self.on_left is not None:
                self.on_left()
        if self._failure is not None:
            raise self._failure
        if position > len(self._events):
            raise OutOfRange(
                f"after_sequence is {after}; the turn has {self.last_sequence} events",
                reason="AFTER_LAST_EVENT",
                field="after_sequence",
            )

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


def router_leaving() -> Unavailable:
    """What closes the streams of a router that stops: their turns go on elsewhere."""
    return Unavailable("this router is leaving; resume elsewhere", reason="ROUTER_LEAVING", retry_after_s=0)
