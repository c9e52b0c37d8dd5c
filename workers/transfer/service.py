"""``TransferService``: a rank's caches for its peers, which pull from them, push into them and hold them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.v1 import transfer_pb2, transfer_pb2_grpc
from seamount.wire import limits
from seamount.wire.errors import Aborted, OutOfRange, SeamountError
from seamount.wire.hashes import ROOT_BYTES
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.waiting import until_restored
from seamount.workers.transfer.incoming import Incoming
from seamount.workers.transfer.link import Inbound, Outbound
from seamount.workers.transfer.links import Links
from seamount.workers.transfer.sending import send_slots

_log = logging.getLogger("seamount.transfer")
_HANDOVER_S, _HANDOVER_POLL_S = 1.0, 0.005

Context = grpc.aio.ServicerContext[Any, Any]


class TransferService(transfer_pb2_grpc.TransferServiceServicer):
    """Made by ``Transfer``, whose links and incoming transfers it shares. timeout_s: longest stall of a peer."""

    def __init__(
        self,
        *,
        links: Links,
        incoming: Incoming,
        reservations: Reservations,
        planes: CachePlanes,
        layout: CacheLayout,
        timeout_s: float,
    ) -> None:
        self._links, self._incoming, self._reservations = links, incoming, reservations
        self._planes, self._layout, self._timeout_s = planes, layout, timeout_s
        self._sending: set[asyncio.Task[None]] = set()
        self._senders = ThreadPoolExecutor(4, thread_name_prefix="pull-send")

    async def close(self) -> None:
        """What peers pull ends; the links have been closed."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=self._timeout_s)
        self._senders.shutdown(wait=False, cancel_futures=True)

    async def OpenLink(self, request: transfer_pb2.OpenLinkRequest, context: Context) -> transfer_pb2.OpenLinkResponse:
        return await self._links.accept(request)

    async def Pull(self, request: transfer_pb2.PullRequest, context: Context) -> transfer_pb2.PullResponse:
        link = await self._links.accepted(request.link_id)
        reservation = self._reservations.uses.begin(request.reservation_id)
        try:
            await until_restored(reservation, self._timeout_s)
            if not request.first < request.end <= reservation.computed_len:
                raise OutOfRange(
                    f"positions [{request.first}, {request.end}) were asked for; those before "
                    f"{reservation.computed_len} are present",
                    reason="NOT_PRESENT",
                )
            slots = self._reservations.slots(reservation.id, request.first, request.end)
            outbound = link.send(request.transfer_id)
        except BaseException:
            self._reservations.uses.end(request.reservation_id)
            raise
        task = asyncio.create_task(self._send(reservation.id, outbound, request.first, slots))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        return transfer_pb2.PullResponse()

    async def Push(
        self, request: transfer_pb2.PushRequest, context: Context
    ) -> AsyncIterator[transfer_pb2.PushResponse]:
        link = await self._links.accepted(request.link_id)
        reservation = self._reservations.get(request.reservation_id)
        if request.reservation_epoch != reservation.epoch:
            raise Aborted(
                f"epoch {request.reservation_epoch} does not own the reservation",
                reason="STALE_EPOCH",
                metadata={"epoch": str(reservation.epoch)},
            )
        await self._end_earlier_push(reservation)
        await until_restored(reservation, self._timeout_s)
        receive = self._incoming.begin(reservation.id, request.first, request.end)
        inbound: Inbound | None = None
        try:
            inbound = link.expect(request.transfer_id, receive)
            with self._incoming.abortable(reservation.id, inbound):
                link.start(inbound)
                yield transfer_pb2.PushResponse(verified_len=request.first)
                await asyncio.wrap_future(inbound.ended)
        finally:
            self._incoming.end(reservation.id, receive, inbound)
        yield transfer_pb2.PushResponse(verified_len=receive.verified_len)

    async def Hold(self, request: transfer_pb2.HoldRequest, context: Context) -> transfer_pb2.HoldResponse:
        limits.check_length(request.session_id.encode(), field="session_id", high=limits.MAX_NAME_BYTES, unit="bytes")
        limits.check_length(request.token_ids, field="token_ids", low=1, high=limits.MAX_CONTEXT_TOKENS, unit="tokens")
        limits.check_length(request.cache_root, field="cache_root", low=ROOT_BYTES, high=ROOT_BYTES, unit="bytes")
        held = self._reservations.handover.hold(
            session_id=request.session_id,
            epoch=request.epoch,
            attempt=request.attempt,
            root=request.cache_root,
            token_ids=request.token_ids,
            time_to_live_s=request.time_to_live.ToNanoseconds() / 1e9,
        )
        if held.restored is not None:
            with suppress(TimeoutError):  # what is not there in time is not told
                async with asyncio.timeout(self._timeout_s / 2):
                    await asyncio.shield(asyncio.wrap_future(held.restored))
        return transfer_pb2.HoldResponse(reservation_id=held.id, cached_len=held.computed_len)

    async def EndHold(self, request: transfer_pb2.EndHoldRequest, context: Context) -> transfer_pb2.EndHoldResponse:
        self._reservations.release(request.reservation_id)
        if request.is_moved:
            await self._until_settled(request.reservation_id)
            self._reservations.handover.give_up(request.session_id, request.epoch)
        return transfer_pb2.EndHoldResponse()

    async def _end_earlier_push(self, reservation: Reservation) -> None:
        """Routers send one prefill rank at a time: they gave up the one whose push is still open."""
        until = time.monotonic() + _HANDOVER_S
        if reservation.receive is not None:
            self._incoming.abort(reservation.id)
        while reservation.receive is not None and time.monotonic() < until:  # noqa: ASYNC110 - bounded, and rare
            await asyncio.sleep(_HANDOVER_POLL_S)

    async def _until_settled(self, reservation_id: str) -> None:
        """The peer may have all before the thread that sent it has let go of the pages."""
        until = time.monotonic() + _HANDOVER_S
        while self._reservations.handover.is_settling(reservation_id) and time.monotonic() < until:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(_HANDOVER_POLL_S)

    async def _send(self, reservation_id: str, outbound: Outbound, first: int, slots: list[int]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(
                self._senders, send_slots, outbound, first, slots, self._planes, self._layout, self._timeout_s
            )
            await asyncio.wrap_future(outbound.ended)
        except SeamountError as error:
            _log.info("pull_not_sent", extra={"reservation_id": reservation_id, "reason": error.reason})
        finally:
            outbound.end()  # where it broke off: the puller must not wait for more
            self._reservations.uses.end(reservation_id)
