"""Pages of a session on their way from one decode rank to another, at the rank that takes them.

    Hold at the source -> pull into the reservation -> EndHold, which says whether all of it has arrived and verified

The source pins what it has meanwhile and keeps everything where anything fails: nothing here changes it before the last
step. Pages enter this rank's tree as they verify, so a transfer that breaks leaves a prefix, and a repeated call moves
the rest alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field

from seamount.v1 import transfer_pb2, worker_pb2
from seamount.wire import failpoints, limits
from seamount.wire.durations import duration
from seamount.wire.errors import Aborted, FailedPrecondition, InvalidArgument, SeamountError
from seamount.wire.ids import RankId
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.engine_stream import KEEP_ALIVE_S
from seamount.workers.spec import RankSpec
from seamount.workers.transfer.transfer import Transfer

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Move:
    """One in progress. first: what was here when it began."""

    task: asyncio.Task[worker_pb2.MigrateFinished]
    first: int
    num_waiting: int = 0


@dataclass(slots=True, kw_only=True)
class Migration:
    """Runs ``WorkerService.Migrate`` on a decode rank. Owner of the moves in progress, one for each reservation."""

    spec: RankSpec
    reservations: Reservations
    transfer: Transfer
    _moves: dict[str, _Move] = field(default_factory=dict)

    async def run(self, request: worker_pb2.MigrateRequest) -> AsyncGenerator[worker_pb2.MigrateResponse, None]:
        """Progress each second, then ``finished``. Raises typed errors: the source is then as it was, and what has
        verified stays here. When the last caller leaves, the move ends."""
        move = self._moves.get(request.reservation_id)
        if move is None:
            move = self._begin(request)
        reservation = self.reservations.get(request.reservation_id)
        move.num_waiting += 1
        try:
            while not (await asyncio.wait({move.task}, timeout=KEEP_ALIVE_S))[0]:
                self.reservations.renew(reservation.id)
                progress = worker_pb2.MigrateProgress(num_migrated_tokens=reservation.computed_len - move.first)
                yield worker_pb2.MigrateResponse(progress=progress)
            yield worker_pb2.MigrateResponse(finished=move.task.result())
        finally:
            move.num_waiting -= 1
            if not move.num_waiting:
                move.task.cancel()
                with suppress(asyncio.CancelledError, SeamountError):
                    await move.task

    def _begin(self, request: worker_pb2.MigrateRequest) -> _Move:
        reservation = self.reservations.get(request.reservation_id)
        self._check(request, reservation)
        task = asyncio.create_task(self._move(request, reservation), name=f"migrate {reservation.id}")
        move = self._moves[reservation.id] = _Move(task=task, first=reservation.computed_len)
        task.add_done_callback(lambda _: self._moves.pop(reservation.id, None))
        return move

    def _check(self, request: worker_pb2.MigrateRequest, reservation: Reservation) -> None:
        if self.spec.pool != "decode":
            raise FailedPrecondition(f"{self.spec.rank_id} is no decode rank", reason="WRONG_POOL")
        for name in ("source_rank_id", "source_address"):
            value = getattr(request, name).encode()
            limits.check_length(value, field=name, low=1, high=limits.MAX_NAME_BYTES, unit="bytes")
        if request.source_rank_id == self.spec.rank_id:
            raise InvalidArgument("source_rank_id is this rank itself; name another", field="source_rank_id")
        if request.epoch != reservation.epoch:
            raise Aborted(
                f"epoch {request.epoch} does not own reservation {reservation.id}",
                reason="STALE_EPOCH",
                metadata={"epoch": str(reservation.epoch)},
            )

    async def _move(self, request: worker_pb2.MigrateRequest, reservation: Reservation) -> worker_pb2.MigrateFinished:
        began, first = time.monotonic(), reservation.computed_len
        peer, address = RankId(request.source_rank_id), request.source_address
        held = await self.transfer.hold(
            peer=peer,
            address=address,
            session_id=reservation.session_id,
            attempt=reservation.attempt,
            reservation=reservation,
        )
        is_complete = False
        try:
            failpoints.reached("migrate.held", reservation.session_id)
            end = min(held.cached_len, reservation.prompt_len - 1)
            if end > first:
                await self.transfer.pull(
                    peer=peer,
                    address=address,
                    remote_reservation_id=held.reservation_id,
                    reservation=reservation,
                    first=first,
                    end=end,
                )
            failpoints.reached("migrate.received", reservation.session_id)
            is_complete = 0 < end <= reservation.computed_len
        finally:
            await self._end_hold(request, reservation, held.reservation_id, is_moved=is_complete)
        return worker_pb2.MigrateFinished(
            num_migrated_tokens=max(0, min(reservation.computed_len, end) - first),
            cached_len=reservation.cached_len,
            is_complete=is_complete,
            transfer_time=duration(time.monotonic() - began),
        )

    async def _end_hold(
        self, request: worker_pb2.MigrateRequest, reservation: Reservation, held_id: str, *, is_moved: bool
    ) -> None:
        """Best effort: a hold ends by itself, and a source that does not hear of the move keeps what it has."""
        ended = transfer_pb2.EndHoldRequest(
            reservation_id=held_id,
            session_id=reservation.session_id,
            epoch=reservation.epoch,
            is_moved=is_moved,
        )
        try:
            await self.transfer.end_hold(
                peer=RankId(request.source_rank_id), address=request.source_address, request=ended
            )
        except SeamountError as error:
            _LOG.info("hold_not_ended", extra={"source": request.source_rank_id, "reason": error.reason})
