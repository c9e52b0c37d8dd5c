"""Sessions whose caches a leaving rank has handed over: where they are now, until a turn there is committed.

Sessions name the rank of their last turn. What moved since stands in Redis beside them for a while: it is only a hint,
and where it is lost, a turn computes more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from contextlib import aclosing, suppress

from seamount.router.directory import Role
from seamount.router.rank_client import RankLost
from seamount.router.ranks import Ranks
from seamount.router.store import Store
from seamount.v1 import admin_pb2, worker_pb2
from seamount.wire.durations import duration
from seamount.wire.errors import FailedPrecondition, NotFound, SeamountError
from seamount.wire.ids import RankId, SessionId

_LOG = logging.getLogger(__name__)
KEPT_S = 6 * 3600
_ANSWER_S = 0.5
"""Of a drain's time, for telling what has moved."""


class Moves:
    """Of one cluster. Errors as ``Store.command``."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store = store
        self._prefix = store.key(f"{{directory/{cluster}}}", "moved")

    async def note(self, session_id: SessionId, rank_id: RankId) -> None:
        """The session's caches are at this rank now."""
        await self._store.command("SET", f"{self._prefix}:{session_id}", rank_id, "EX", KEPT_S)

    async def find(self, session_id: SessionId) -> RankId | None:
        """Where a rank that leaves or left handed the session over to; None where nobody noted it, or Redis is away."""
        with suppress(SeamountError):
            found: bytes | None = await self._store.command("GET", f"{self._prefix}:{session_id}", budget_s=0.0)
            return RankId(found.decode()) if found is not None else None
        return None


async def drained(
    ranks: Ranks,
    moves: Moves,
    rank_id: RankId,
    *,
    deadline_s: float,
    turns_s: float | None = None,
    excluded: Collection[RankId] = (),
) -> admin_pb2.DrainRankResponse:
    """Have a decode rank hand its sessions to the others, and note where they went; for at most ``deadline_s``.

    turns_s: what running turns have before they are ended there and go on elsewhere (None = until their own end);
    excluded: ranks that are to take none.
    Raises ``NotFound`` for a rank that is not there, ``FailedPrecondition`` where no other decode rank is, and as
    ``RankClient.drain`` does.
    """
    until = time.monotonic() + deadline_s - min(_ANSWER_S, deadline_s / 2)
    if ranks.source(rank_id) is None:
        raise NotFound("there is no such decode rank; ListRanks names those there are", reason="RANK_NOT_FOUND")
    peers = [peer for peer in ranks.loads(Role.DECODE) if peer.rank_id != rank_id and peer.rank_id not in excluded]
    if not peers:
        raise FailedPrecondition("there is no other decode rank to take the sessions", reason="NO_OTHER_RANK")
    request = worker_pb2.DrainRequest(
        peers=[
            worker_pb2.DrainPeer(
                rank_id=peer.rank_id,
                address=peer.address,
                num_usable_pages=peer.num_free_pages + peer.num_cached_pages,
            )
            for peer in peers
        ],
        turns_time=None if turns_s is None else duration(turns_s),
    )
    answer = admin_pb2.DrainRankResponse()
    frames = ranks.client(rank_id).drain(request, timeout_s=until - time.monotonic())
    try:
        async with aclosing(frames):
            async for moved in frames:
                if moved.session_id:
                    await moves.note(SessionId(moved.session_id), RankId(moved.rank_id))
                    answer.num_sessions += 1
                    answer.num_tokens += moved.num_tokens
        answer.is_empty = True
    except RankLost as lost:
        if lost.cause is not None or time.monotonic() < until - 0.1:
            raise
        _LOG.info("drain_not_finished", extra={"rank_id": rank_id, "num_sessions": answer.num_sessions})
    return answer
