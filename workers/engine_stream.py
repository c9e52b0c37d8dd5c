"""From the engine's thread to the event loop: one request's events as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from seamount.workers.engine import Engine
from seamount.workers.events import EngineEvent, Failed, Finished, Progress
from seamount.workers.requests import EngineRequest

KEEP_ALIVE_S = 1.0
"""A waiting stream shows at least this often that the rank is alive: routers count frames, not sockets."""


async def run_request(
    engine: Engine, make: Callable[[Callable[[EngineEvent], None]], EngineRequest], *, active: set[str] | None = None
) -> AsyncGenerator[EngineEvent, None]:
    """Submit a request and yield its events; ``Failed`` is raised. Leaving early aborts it within a step.

    While nothing happens and the engine is healthy, the last ``Progress`` is repeated every ``KEEP_ALIVE_S``.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    request = make(lambda event: _deliver(loop, events, event))
    progress = Progress(num_computed=0, in_batch=False)
    finished = False
    if active is not None:
        active.add(request.id)
    try:
        engine.submit(request)
        while not finished:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    event = await events.get()
            except TimeoutError:
                if not engine.healthy():
                    raise engine.stalled() from None
                event = progress
            if isinstance(event, Failed):
                finished = True
                raise event.error
            progress = event if isinstance(event, Progress) else progress
            finished = isinstance(event, Finished)
            yield event
    finally:
        if active is not None:
            active.discard(request.id)
        if not finished:
            engine.abort(request.id)


def _deliver(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[EngineEvent], event: EngineEvent) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
