"""What other threads leave for the engine's next step."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from seamount.wire.errors import AlreadyExists, ResourceExhausted, SeamountError
from seamount.workers.requests import EngineRequest
from seamount.workers.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """New sequences in order of arrival, and ids of requests to abort."""

    submitted: tuple[Sequence, ...] = ()
    aborted: tuple[str, ...] = ()


class Inbox:
    """Admits requests up to a bound and remembers which are known to the engine, from ``submit`` to ``forget``."""

    def __init__(self, *, max_known: int) -> None:
        self._max_known = max_known
        self._lock = threading.Lock()
        self._submitted: list[Sequence] = []
        self._aborted: list[str] = []
        self._known: set[str] = set()
        self._closed: SeamountError | None = None
        self._num_arrivals = 0

    def submit(self, request: EngineRequest) -> None:
        """Raises AlreadyExists (REQUEST_RUNNING), ResourceExhausted (QUEUE_FULL), or what it was closed with."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if request.id in self._known:
                raise AlreadyExists("this reservation has a running request", reason="REQUEST_RUNNING")
            if len(self._known) >= self._max_known:
                raise ResourceExhausted(
                    f"{len(self._known)} requests run or wait at this rank already; retry later or at another rank",
                    reason="QUEUE_FULL",
                    retry_after_s=1.0,
                    metadata={"max_requests": str(self._max_known)},
                )
            self._known.add(request.id)
            self._num_arrivals += 1
            self._submitted.append(Sequence(request=request, arrival=self._num_arrivals, submitted_at=time.monotonic()))

    def abort(self, request_id: str) -> bool:
        """False, and nothing to do, if the request is not known (any more)."""
        with self._lock:
            if request_id in self._known:
                self._aborted.append(request_id)
                return True
            return False

    def take(self) -> News:
        """Everything since the last call."""
        if not (self._submitted or self._aborted):  # the common case in mid-stream; what comes now rings again
            return News()
        with self._lock:
            news = News(submitted=tuple(self._submitted), aborted=tuple(self._aborted))
            self._submitted.clear()
            self._aborted.clear()
            return news

    def forget(self, request_id: str) -> None:
        """The request is over; its id may come again."""
        with self._lock:
            self._known.discard(request_id)

    def close(self, error: SeamountError) -> None:
        """Refuse further requests with ``error``; the first call's error stays."""
        with self._lock:
            self._closed = self._closed or error

    def waiting(self) -> tuple[Sequence, ...]:
        """Those that no step has taken yet."""
        with self._lock:
            return tuple(self._submitted)
