"""Work ahead of time: what sessions' next prompts are known to begin with, computed while nothing else is to do.

A new user message cuts the reasoning of the turns before, so that everything behind the first old ``<think>`` must be
computed again. While the person reads the answer, that is done here: one session after the other, the one that has
waited longest first. Any other work of the gang ends it within a step; what was computed stays cached as the session's,
and the rest is taken up when the rank rests again. It takes free pages, superseded and cold ones, and a Reserve that
finds too few gets them back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass, field

from seamount.v1 import worker_pb2
from seamount.wire import limits
from seamount.wire.errors import FailedPrecondition, SeamountError
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.engine import Engine
from seamount.workers.engine_stream import run_request
from seamount.workers.events import Finished, Progress
from seamount.workers.requests import EngineRequest

_LOG = logging.getLogger(__name__)
MAX_WANTED = 1_024
"""Sessions that wait to be prepared, and sessions whose prepared tokens are remembered; the oldest are forgotten."""
_LOOK_AGAIN_S = 0.02


@dataclass(slots=True, kw_only=True)
class Ahead:
    """Runs ``WorkerService.Prepare``. ``start`` before use, ``stop`` at the end."""

    reservations: Reservations
    engine: Engine
    _wanted: OrderedDict[str, worker_pb2.PrepareRequest] = field(default_factory=OrderedDict)
    _num_prepared: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _has_news: asyncio.Event = field(default_factory=asyncio.Event)
    _current: Reservation | None = None
    _num_attempts: int = 0
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="ahead")

    async def stop(self) -> None:
        """Harmless to repeat."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def want(self, request: worker_pb2.PrepareRequest) -> None:
        """Prepare the session when the rank rests; in the place of an earlier request of the session."""
        self._wanted.pop(request.session_id, None)
        self._wanted[request.session_id] = request
        self._num_prepared.pop(request.session_id, None)
        while len(self._wanted) > MAX_WANTED:
            self._wanted.popitem(last=False)
        self._has_news.set()

    def came(self, session_id: str) -> int:
        """A turn of the session has reserved. Returns how many tokens were computed ahead of it, once."""
        self._wanted.pop(session_id, None)
        return self._num_prepared.pop(session_id, 0)

    async def yield_pages(self) -> bool:
        """Give back what work ahead of time holds; whether it held anything. Waits for at most the step in progress."""
        current = self._current
        if current is None:
            return False
        self.engine.abort(current.id)
        while self._current is current:  # noqa: ASYNC110 - ends with the step
            await asyncio.sleep(0.001)
        return True

    async def _run(self) -> None:
        while True:
            await self._has_news.wait()
            while self._wanted:
                if self.engine.state().is_resting:
                    await self._prepare(next(iter(self._wanted)))
                await asyncio.sleep(_LOOK_AGAIN_S)
            self._has_news.clear()

    async def _prepare(self, session_id: str) -> None:
        """Compute for one session; it stays wanted where other work came first."""
        request = self._wanted[session_id]
        try:
            self._current = reservation = self._reserve(request)
        except FailedPrecondition:  # its turn has not been released yet
            self._wanted.move_to_end(session_id)
            return
        except SeamountError as error:
            self._done(request)
            _LOG.info("not_prepared", extra={"session_id": session_id, "reason": error.reason})
            return
        try:
            if await self._compute(reservation) == "prefilled":
                self._done(request)
        except SeamountError as error:
            self._done(request)
            _LOG.info("not_prepared", extra={"session_id": session_id, "reason": error.reason})
        finally:
            self.reservations.release(reservation.id)
            self._current = None

    def _reserve(self, request: worker_pb2.PrepareRequest) -> Reservation:
        self._num_attempts += 1
        return self.reservations.reserve(
            session_id=request.session_id,
            turn_id=f"{request.turn_id}/ahead",
            epoch=request.epoch,
            attempt=self._num_attempts,
            salt=request.cache_salt,
            token_ids=request.token_ids,
            time_to_live_s=limits.MAX_RESERVATION_S,
            is_spare=True,
        )

    async def _compute(self, reservation: Reservation) -> str:
        events = run_request(
            self.engine,
            lambda sink: EngineRequest(
                id=reservation.id, reservation=reservation, sampling=None, is_background=True, sink=sink
            ),
        )
        num_counted = 0
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress | Finished) and reservation.session_id in self._wanted:
                    self._count(reservation.session_id, event.num_computed - num_counted)
                    num_counted = event.num_computed
                if isinstance(event, Finished):
                    return event.reason
        return "cancelled"

    def _count(self, session_id: str, num_computed: int) -> None:
        self._num_prepared[session_id] = self._num_prepared.pop(session_id, 0) + num_computed
        while len(self._num_prepared) > MAX_WANTED:
            self._num_prepared.popitem(last=False)

    def _done(self, request: worker_pb2.PrepareRequest) -> None:
        if self._wanted.get(request.session_id) is request:
            del self._wanted[request.session_id]
