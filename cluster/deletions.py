"""A rank hears of deleted sessions: all that are kept before it takes over a disk, then each second those that are
new."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from seamount.router.deletions import Deletion, Deletions
from seamount.wire.errors import SeamountError

FOLLOW_EVERY_S = 1.0
_LOG = logging.getLogger("seamount.rank")


class DeletionFollower:
    """``earlier`` or ``skip_earlier`` before the rank starts, ``start`` when it serves, ``stop`` in the end (harmless
    to repeat)."""

    def __init__(self, deletions: Deletions, on_deleted: Callable[[Deletion], None]) -> None:
        """on_deleted: called on the event loop, for some sessions more than once; must not block."""
        self._deletions, self._on_deleted = deletions, on_deleted
        self._place = ""
        self._task: asyncio.Task[None] | None = None

    async def earlier(self) -> list[Deletion]:
        """All that are kept. Raises as ``Store.command`` does."""
        found: list[Deletion] = []
        while some := await self._next():
            found += some
        return found

    async def skip_earlier(self) -> None:
        """The rank begins with nothing: only what is deleted from now on concerns it. Raises as ``Store.command``."""
        self._place = await self._deletions.last()

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="deleted sessions")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            try:
                while deleted := await self._next():
                    for one in deleted:
                        self._tell(one)
            except SeamountError as error:  # what comes meanwhile is read when the store is back
                _LOG.info("deletions_not_read", extra={"reason": error.reason})

    def _tell(self, deletion: Deletion) -> None:
        try:
            self._on_deleted(deletion)
        except Exception:  # a defect: the others are told all the same
            _LOG.exception("deletion_failed", extra={"session_id": deletion.session_id})

    async def _next(self) -> list[Deletion]:
        deleted, self._place = await self._deletions.after(self._place)
        return deleted
