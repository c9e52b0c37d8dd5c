"""Pages of a session on their way to the decode rank that got its turn, from the one that had the last."""

from __future__ import annotations

import time
from contextlib import aclosing

from seamount.router.placement import RankLoad
from seamount.router.rank_client import RankClient, RankLost, ReservationGone
from seamount.v1 import worker_pb2
from seamount.wire.errors import SeamountError
from seamount.wire.ids import Epoch, ReservationId

MIGRATE_TIMEOUT_S = 30.0
"""How long they may be on their way: what has not come is computed."""
MIGRATE_STALL_S = 2.0
"""How long nothing may arrive: the rank that has them may be hung."""


async def fetched(
    decode: RankClient, source: RankLoad, *, reservation_id: ReservationId, epoch: Epoch, remaining_s: float
) -> worker_pb2.MigrateFinished | None:
    """Let ``decode`` fetch what ``source`` has of a reservation; None where that failed, and the source keeps what it
    has: Reserve tells what arrived. Raises ``RankLost`` for ``decode`` itself, and ``ReservationGone``."""
    request = worker_pb2.MigrateRequest(
        reservation_id=reservation_id,
        epoch=epoch,
        source_rank_id=source.rank_id,
        source_address=source.address,
    )
    progress, moved = worker_pb2.MigrateProgress(), time.monotonic()
    try:
        async with aclosing(decode.migrate(request, timeout_s=min(MIGRATE_TIMEOUT_S, remaining_s))) as frames:
            async for frame in frames:
                if frame.WhichOneof("event") == "finished":
                    return frame.finished
                if frame.progress != progress:
                    progress, moved = frame.progress, time.monotonic()
                elif time.monotonic() - moved > MIGRATE_STALL_S:
                    break
    except RankLost as lost:
        if lost.cause is None:
            raise
    except ReservationGone:
        raise
    except SeamountError:
        pass
    return None
