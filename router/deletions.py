"""Sessions that were deleted, for the ranks: each reads of them what it has not read yet.

A stream in Redis, which every rank follows: a rank with a disk reads all that is kept before it takes over what an
earlier process left there. Nobody has to know where a session's caches are, and nothing is lost with a message. Only
ids are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from seamount.router.store import Store
from seamount.wire.ids import Epoch, SessionId

MAX_KEPT = 100_000
"""Deletions, the last ones: some 10 MB. A rank that comes back after more of them has what else was deleted for as long
as adopted sessions are kept (``departures.ADOPTED_S``)."""
READ_AT_ONCE = 4_096
EPOCH_MARGIN = 1_000
"""A turn may be taken over while its session is deleted. A session that is made anew under the same id starts far
above: epochs begin at the microsecond of creation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """epoch: the session's own ones are not above it."""

    session_id: SessionId
    epoch: Epoch


class Deletions:
    """Of one namespace. Errors as ``Store.command``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = store.key("deleted_sessions")

    async def note(self, session_id: SessionId, epoch: int) -> None:
        """The session, whose epoch this was, is about to be deleted. Repeating it is harmless."""
        await self._store.command(
            "XADD", self._key, "MAXLEN", "~", MAX_KEPT, "*", "session", session_id, "epoch", epoch + EPOCH_MARGIN
        )

    async def last(self) -> str:
        """The place of the last one; '' where none is kept."""
        entries = await self._store.command("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return entries[0][0].decode() if entries else ""

    async def after(self, place: str) -> tuple[list[Deletion], str]:
        """At most ``READ_AT_ONCE`` behind the place ('' = from the first one kept), and the place where they end."""
        start = f"({place}" if place else "-"
        entries = await self._store.command("XRANGE", self._key, start, "+", "COUNT", READ_AT_ONCE)
        deleted = [
            Deletion(session_id=SessionId(fields[b"session"].decode()), epoch=Epoch(int(fields[b"epoch"])))
            for _, fields in entries
        ]
        return deleted, entries[-1][0].decode() if entries else place
