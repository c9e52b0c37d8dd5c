"""Gangs that are on their way out: their ranks hand over turns and sessions, then their application may go.

Decode ranks are told to drain (``WorkerService.Drain``): no new sessions, idle ones move at once, running turns have
their time and go on elsewhere then. Prefill gangs hold nothing that a turn could not compute again: they may go at
once, and end what runs there in their own shutdown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from seamount.cluster.fleet_meter import SeenRank, gang_name
from seamount.cluster.fleet_plan import Cause
from seamount.v1 import admin_pb2
from seamount.wire.errors import NotFound, SeamountError
from seamount.wire.ids import RankId

_LOG = logging.getLogger("seamount.fleet")
_AGAIN_S = 0.5
"""Until a rank that could not hand over now is asked again: others may have room by then."""
_CALL_S = 30.0
"""Of one call: peers that came meanwhile are told with the next."""
MIN_CALL_S = 1.0
_ANSWER_S = 5.0
"""Beyond a call's own deadline."""
MAX_AT_ONCE = 64


class Draining(Protocol):
    """What this needs of ``FleetView``."""

    def drain(
        self, rank_id: RankId, *, deadline_s: float, turns_s: float, excluded: Collection[RankId]
    ) -> Future[admin_pb2.DrainRankResponse]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """A gang that may go now. is_empty: everything was handed over in time."""

    name: str
    cause: Cause
    is_empty: bool
    took_s: float


@dataclass(slots=True)
class _Leaving:
    cause: Cause
    begun_s: float
    until_s: float
    tasks: list[Future[bool]]


class GangDrains:
    """All of one fleet; called by its thread, works on threads of its own."""

    def __init__(self, view: Draining, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._clock = clock
        self._leaving: dict[str, _Leaving] = {}
        self._threads = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="drain")
        self._stop = threading.Event()

    def __contains__(self, name: object) -> bool:
        return name in self._leaving

    @property
    def names(self) -> Sequence[str]:
        return list(self._leaving)

    def begin(
        self,
        name: str,
        cause: Cause,
        ranks: Sequence[SeenRank],
        *,
        turns_s: float,
        timeout_s: float,
        excluded_gangs: Collection[str],
    ) -> None:
        """Empty the gang; a second call for it changes nothing. ranks: all of this Ray cluster; excluded_gangs: those
        whose ranks are to take nothing."""
        if name in self._leaving:
            return
        excluded = frozenset(
            RankId(rank.record.peer_id)
            for rank in ranks
            if gang_name(rank.record.gang_id) in {*excluded_gangs, *self._leaving, name}
        )
        now = self._clock()
        leaving = _Leaving(cause=cause, begun_s=now, until_s=now + timeout_s, tasks=[])
        self._leaving[name] = leaving
        for rank in ranks:
            if gang_name(rank.record.gang_id) == name and rank.record.role == "decode":
                leaving.tasks.append(self._threads.submit(self._empty, rank, leaving, turns_s, excluded))

    def ended(self) -> list[Drained]:
        """Gangs that are empty, or whose time is over; each is told until ``forget``."""
        now = self._clock()
        ended = []
        for name, leaving in self._leaving.items():
            is_empty = all(task.done() and task.result() for task in leaving.tasks)
            if is_empty or now >= leaving.until_s:
                ended.append(Drained(name=name, cause=leaving.cause, is_empty=is_empty, took_s=now - leaving.begun_s))
        return ended

    def hasten(self, name: str, *, timeout_s: float) -> None:
        """No later than ``timeout_s`` from now."""
        leaving = self._leaving.get(name)
        if leaving is not None:
            leaving.until_s = min(leaving.until_s, self._clock() + timeout_s)

    def forget(self, name: str) -> None:
        self._leaving.pop(name, None)

    def stop(self) -> None:
        """Calls under way end by themselves; nothing new is asked for."""
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _empty(self, rank: SeenRank, leaving: _Leaving, turns_s: float, excluded: Collection[RankId]) -> bool:
        """Ask the rank to drain until it is empty, gone, or the time is over. Whether it is empty."""
        rank_id = RankId(rank.record.peer_id)
        while not self._stop.is_set() and self._clock() < leaving.until_s:
            left_s = leaving.until_s - self._clock()
            turns_left_s = max(0.0, turns_s - (self._clock() - leaving.begun_s))
            call_s = max(MIN_CALL_S, min(_CALL_S, left_s))
            try:
                answer = self._view.drain(rank_id, deadline_s=call_s, turns_s=turns_left_s, excluded=excluded).result(
                    call_s + _ANSWER_S
                )
                _LOG.info("rank_drained", extra={"rank_id": rank_id, "sessions": answer.num_sessions})
                if answer.is_empty:
                    return True
            except NotFound:
                return True
            except SeamountError as error:  # nobody there to take the sessions yet, say
                _LOG.info("rank_not_drained", extra={"rank_id": rank_id, "reason": error.reason})
            except Exception:  # a defect here must not keep the fleet from its other work; the time goes on
                _LOG.exception("rank_not_drained", extra={"rank_id": rank_id})
            self._stop.wait(_AGAIN_S)
        return False
