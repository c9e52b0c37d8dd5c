"""Turns whose router is gone: every router looks for them, the first one to come goes on with them.

A router is gone when the directory says so (``directory.py``: its counter stands still while Redis answers, or the
connection to it broke), or when it has not been in the directory for a while: one that just starts is not there yet.
Its turns stand in the running index. Taking one over raises the session's epoch, so that of several routers one gets
it, and whatever the old owner still says is refused: by the store, and by the ranks as soon as they hear the new epoch.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from seamount.router.directory import Liveness
from seamount.router.running_index import RELEASED, IndexedTurn, RunningIndex
from seamount.router.turns import Turns
from seamount.router.watcher import DirectoryWatcher
from seamount.wire.errors import NotFound, SeamountError
from seamount.wire.ids import RouterId

_LOG = logging.getLogger(__name__)
SCAN_EVERY_S = 1.0
MAX_AT_ONCE = 8
"""Turns that are taken over together: each is rendered, reserved and computed again from where it stood."""


class OwnerJudge:
    """Which owners of turns are gone. Pure: what the directory says and the clock are passed in."""

    def __init__(self, *, absent_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._absent_after_s = absent_after_s
        self._clock = clock
        self._absent_since: dict[RouterId, float] = {}

    def is_gone(self, owner: RouterId, liveness: Liveness) -> bool:
        """Whether to take this owner's turns; ask at each look."""
        if liveness is not Liveness.ABSENT:
            self._absent_since.pop(owner, None)
            return liveness is Liveness.DEAD
        since = self._absent_since.setdefault(owner, self._clock())
        return self._clock() - since >= self._absent_after_s


@dataclass(slots=True, kw_only=True)
class TakeOver:
    """One router's look-out. ``start`` once it serves, ``stop`` before it stops serving."""

    router_id: RouterId
    index: RunningIndex
    turns: Turns
    watcher: DirectoryWatcher
    judge: OwnerJudge
    _own_unknown: set[IndexedTurn] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="take over")

    async def stop(self) -> None:
        """Harmless to repeat."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def scan(self) -> int:
        """Look once; returns how many turns were taken over."""
        found: list[IndexedTurn] = []
        for owner in await self.index.owners():
            if owner == self.router_id:
                found += await self._unknown_of_our_own()
            elif owner == RELEASED:
                found += await self.index.turns_of(owner)
            elif self._is_gone(owner):
                found += await self._orphans(owner)
        random.shuffle(found)  # other routers look, too
        slots = asyncio.Semaphore(MAX_AT_ONCE)

        async def take(turn: IndexedTurn) -> bool:
            async with slots:
                return await self._take(turn)

        return sum(await asyncio.gather(*map(take, found)))

    async def _run(self) -> None:
        while True:
            await self.watcher.wait_changed(SCAN_EVERY_S)
            if not self.watcher.is_answered:
                continue
            try:
                await self.scan()
            except SeamountError as error:
                _LOG.warning("take_over_scan_failed", extra={"reason": error.reason})

    def _is_gone(self, owner: RouterId) -> bool:
        return self.judge.is_gone(owner, self.watcher.liveness(owner))

    async def _orphans(self, owner: RouterId) -> list[IndexedTurn]:
        """The turns of an owner that is judged gone, and still is by a poll after they were found: a router that was
        stopped beats as it wakes, and what it begins from then on is its own."""
        turns = await self.index.turns_of(owner)
        return turns if turns and await self.watcher.look() and self._is_gone(owner) else []

    async def _unknown_of_our_own(self) -> list[IndexedTurn]:
        """Turns that the store knows as ours and nobody here works on, at two looks in a row: the answer to their
        begin, or to their end, was lost."""
        unknown = {turn for turn in await self.index.turns_of(self.router_id) if not self.turns.runs(turn.turn_id)}
        again, self._own_unknown = unknown & self._own_unknown, unknown
        return list(again)

    async def _take(self, turn: IndexedTurn) -> bool:
        """Whether it was taken over. An entry of the index that leads nowhere goes, any other one stays."""
        leads_nowhere, taken = False, False
        if self.turns.runs(turn.turn_id):
            leads_nowhere = turn.owner != self.router_id  # of an owner from whom it was taken before
        else:
            try:
                taken = await self.turns.take_over(turn)
                leads_nowhere = not taken or turn.owner != self.router_id
            except SeamountError as error:
                _LOG.warning("turn_not_taken_over", extra={"turn_id": turn.turn_id, "reason": error.reason})
                leads_nowhere = isinstance(error, NotFound) or error.reason == "STALE_EPOCH"
        if taken:
            _LOG.info("turn_taken_over", extra={"turn_id": turn.turn_id, "from": turn.owner})
        if leads_nowhere:
            with suppress(SeamountError):  # found again at the next look
                await self.index.remove(turn)
        return taken
