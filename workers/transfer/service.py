"""Moves cache entries between this rank and others; the rank's own side and ``TransferService`` for its peers.

pull:  OpenLink if needed -> expect the transfer -> Pull -> receive -> entries verified into the reservation
hold:  OpenLink if needed -> Hold -> pull -> EndHold
push:  OpenLink if needed -> Push, whose initial metadata says that the peer expects it -> frames while the engine
       computes -> END -> the answer tells the verified length
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import grpc
import torch

from seamount.kernels.layout import PAGE_SIZE, CacheLayout, CachePlanes
from seamount.v1 import transfer_pb2, transfer_pb2_grpc
from seamount.wire import limits
from seamount.wire.durations import duration
from seamount.wire.errors import Aborted, DeadlineExceeded, OutOfRange, SeamountError, Unavailable, from_rpc_error
from seamount.wire.hashes import ROOT_BYTES
from seamount.wire.ids import RankId
from seamount.wire.protocol import rank_call
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.waiting import until_restored
from seamount.workers.transfer.frames import FrameShape
from seamount.workers.transfer.link import Inbound, Outbound, complete
from seamount.workers.transfer.links import Agreement, Connect, Links, OpenedLink
from seamount.workers.transfer.receiving import Receive
from seamount.workers.transfer.sending import PushCall, PushStream, send_slots

_log = logging.getLogger("seamount.transfer")
_LINK_IS_GONE = frozenset({"LINK_NOT_FOUND", "LINK_LOST", "LINK_CLOSED"})
_HANDOVER_S, _HANDOVER_POLL_S = 1.0, 0.005
_MIN_MEASURED_BYTES = 64 << 10
"""Smaller transfers tell the latency, not the speed."""

Result = TypeVar("Result")
Context = grpc.aio.ServicerContext[Any, Any]


class Transfer(transfer_pb2_grpc.TransferServiceServicer):
    """One rank's transfers. Make it on the event loop of the rank's gRPC server and register it there.

    host: the address that links listen on. layout, planes, reservations: the rank's caches. fingerprint: the model's.
    worker_token: shown to peers; None where none is asked for. connect: makes a channel to a peer.
    timeout_s: longest stall of a peer, and time for building a link; a transfer that moves may take any time.
    """

    def __init__(
        self,
        *,
        rank_id: RankId,
        host: str,
        reservations: Reservations,
        planes: CachePlanes,
        layout: CacheLayout,
        fingerprint: str,
        worker_token: str | None,
        timeout_s: float,
        max_links: int = 32,
        connect: Connect = grpc.aio.insecure_channel,
    ) -> None:
        num_layers = len(planes.latent)
        self.kv_bytes_per_token = layout.bytes_per_token * num_layers
        self.pull_bytes_per_s = 0.0
        """Smoothed; 0 = not measured yet."""
        self.push_bytes_per_s = 0.0
        """Smoothed, of the time that the link was busy; 0 = not measured yet."""
        self._reservations, self._planes, self._layout = reservations, planes, layout
        self._metadata = rank_call(worker_token)
        self._timeout_s = timeout_s
        shape = FrameShape(
            num_layers=num_layers, latent_bytes=layout.latent_bytes_per_token, index_bytes=layout.index_bytes_per_token
        )
        agreement = Agreement(shape=shape, layout_signature=layout.signature, fingerprint=fingerprint)
        self._links = Links(
            rank_id=rank_id,
            host=host,
            agreement=agreement,
            metadata=self._metadata,
            connect=connect,
            timeout_s=timeout_s,
            max_links=max_links,
        )
        self._receiving: dict[str, Inbound] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._senders = ThreadPoolExecutor(4, thread_name_prefix="pull-send")

    # ---- for this rank

    async def pull(
        self,
        *,
        peer: RankId,
        address: str,
        remote_reservation_id: str,
        reservation: Reservation,
        first: int,
        end: int,
    ) -> int:
        """Fetch the entries of positions [first, end) from a peer's reservation of the same tokens into ours.

        Returns the verified length: positions before it are present now; less than ``end`` if a frame was damaged.
        Raises the peer's typed error, or ``Unavailable`` (LINK_LOST …); what had verified by then is kept all the same.
        """
        receive = self._begin_receive(reservation.id, first, end)
        inbound: Inbound | None = None

        async def announce(opened: OpenedLink) -> Inbound:
            request = transfer_pb2.PullRequest(
                link_id=opened.link.link_id,
                transfer_id=opened.next_transfer_id(),
                reservation_id=remote_reservation_id,
                first=first,
                end=end,
            )
            expected = opened.link.expect(request.transfer_id, receive)
            try:
                await opened.stub.Pull(request, timeout=self._timeout_s, metadata=self._metadata)
            except BaseException:
                opened.link.forget(expected)
                raise
            opened.link.start(expected)
            return expected

        try:
            inbound = await self._on_link(peer, address, announce)
            started = time.monotonic()
            with self._abortable(reservation.id, inbound):
                await asyncio.wrap_future(inbound.ended)
            num_bytes, seconds = inbound.num_bytes_received, time.monotonic() - started
            self.pull_bytes_per_s = _smoothed(self.pull_bytes_per_s, num_bytes, seconds)
        finally:
            if inbound is not None:
                inbound.detach()
            self._reservations.uses.end_receive(reservation.id, receive.verified_len)
        return receive.verified_len

    async def push(
        self,
        *,
        peer: RankId,
        address: str,
        remote_reservation_id: str,
        remote_epoch: int,
        reservation: Reservation,
        first: int,
        end: int,
    ) -> PushStream:
        """Begin to send the entries of positions [first, end) into a peer's reservation of the same tokens.

        Returns once the peer expects them; the caller ends the stream by ``finish`` or ``close``. Raises the peer's
        typed error (Aborted STALE_EPOCH, NotFound, OutOfRange …) or ``Unavailable``.
        """

        async def announce(opened: OpenedLink) -> tuple[PushCall, Outbound]:
            transfer_id = opened.next_transfer_id()
            request = transfer_pb2.PushRequest(
                link_id=opened.link.link_id,
                transfer_id=transfer_id,
                reservation_id=remote_reservation_id,
                reservation_epoch=remote_epoch,
                first=first,
                end=end,
            )
            call = opened.stub.Push(request, metadata=self._metadata)
            try:
                async with asyncio.timeout(self._timeout_s):
                    if await call.read() is grpc.aio.EOF:
                        raise Unavailable("the peer ended a push before it began", reason="LINK_LOST")
                return call, opened.link.send(transfer_id)
            except BaseException:
                call.cancel()
                raise

        call, outbound = await self._on_link(peer, address, announce)
        return PushStream(
            call=call,
            outbound=outbound,
            reservations=self._reservations,
            reservation=reservation,
            planes=self._planes,
            layout=self._layout,
            first=first,
            end=end,
            timeout_s=self._timeout_s,
            on_finished=self._measure_push,
        )

    async def hold(
        self, *, peer: RankId, address: str, session_id: str, attempt: int, reservation: Reservation
    ) -> transfer_pb2.HoldResponse:
        """Have a peer pin what it has of the reservation's tokens, for ``MAX_RESERVATION_S``. Raises as ``pull``."""
        request = transfer_pb2.HoldRequest(
            session_id=session_id,
            epoch=reservation.epoch,
            attempt=attempt,
            cache_root=reservation.root,
            token_ids=reservation.token_ids,
            time_to_live=duration(limits.MAX_RESERVATION_S),
        )

        async def ask(opened: OpenedLink) -> transfer_pb2.HoldResponse:
            return await opened.stub.Hold(request, timeout=self._timeout_s, metadata=self._metadata)

        return await self._on_link(peer, address, ask)

    async def end_hold(self, *, peer: RankId, address: str, request: transfer_pb2.EndHoldRequest) -> None:
        """Tell a peer that its hold is over. Raises as ``pull``."""

        async def tell(opened: OpenedLink) -> None:
            await opened.stub.EndHold(request, timeout=self._timeout_s, metadata=self._metadata)

        await self._on_link(peer, address, tell)

    def abort(self, reservation_id: str) -> None:
        """A reservation ended, or computes itself from now on: stop receiving into it without waiting for the peer.

        Once this returns nothing more is written. Callable from any thread; harmless where nothing is received.
        """
        inbound = self._receiving.get(reservation_id)
        if inbound is not None:
            inbound.detach()
            complete(inbound.ended, Aborted("the reservation ended", reason="RESERVATION_ENDED"))

    async def close(self) -> None:
        """End all transfers and links; what had verified stays in the caches."""
        await self._links.close()
        if self._sending:
            await asyncio.wait(self._sending, timeout=self._timeout_s)
        self._senders.shutdown(wait=False, cancel_futures=True)

    # ---- for peers

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
        receive = self._begin_receive(reservation.id, request.first, request.end)
        inbound: Inbound | None = None
        try:
            inbound = link.expect(request.transfer_id, receive)
            with self._abortable(reservation.id, inbound):
                link.start(inbound)
                yield transfer_pb2.PushResponse(verified_len=request.first)
                await asyncio.wrap_future(inbound.ended)
        finally:
            if inbound is not None:
                inbound.detach()
            self._reservations.uses.end_receive(reservation.id, receive.verified_len)
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

    # ---- parts of both

    async def _on_link(
        self, peer: RankId, address: str, begin: Callable[[OpenedLink], Coroutine[Any, Any, Result]]
    ) -> Result:
        """``begin`` on the link to a peer; once more on a new one where the old one turns out to be lost."""
        for may_retry in (True, False):
            opened = await self._links.get(peer, address)
            try:
                return await begin(opened)
            except grpc.aio.AioRpcError as broken:
                error = from_rpc_error(broken)
            except TimeoutError:
                error = Unavailable("the peer does not answer", reason="PEER_STALLED", retry_after_s=0.0)
            except SeamountError as refused:
                error = refused
            if error.reason not in _LINK_IS_GONE and not isinstance(error, Unavailable | DeadlineExceeded):
                raise error
            self._links.drop(peer, opened)
            if not may_retry or error.reason not in _LINK_IS_GONE:
                raise error
        raise AssertionError("the last try returns or raises")

    def _begin_receive(self, reservation_id: str, first: int, end: int) -> Receive:
        self._reservations.uses.begin_receive(reservation_id, first, end)
        try:
            slots = torch.tensor(self._reservations.slots(reservation_id, first, end), dtype=torch.int64)
        except BaseException:
            self._reservations.uses.end_receive(reservation_id, first)
            raise
        num_full_pages = first // PAGE_SIZE

        def on_progress(verified_len: int) -> None:
            nonlocal num_full_pages
            if verified_len // PAGE_SIZE > num_full_pages:
                num_full_pages = verified_len // PAGE_SIZE
                self._reservations.advance(reservation_id, verified_len)  # what arrived counts, whatever comes next

        return Receive(
            planes=self._planes, layout=self._layout, slots=slots, first=first, end=end, on_progress=on_progress
        )

    async def _end_earlier_push(self, reservation: Reservation) -> None:
        """Routers send one prefill rank at a time: they gave up the one whose push is still open."""
        until = time.monotonic() + _HANDOVER_S
        if reservation.receive is not None:
            self.abort(reservation.id)
        while reservation.receive is not None and time.monotonic() < until:  # noqa: ASYNC110 - bounded, and rare
            await asyncio.sleep(_HANDOVER_POLL_S)

    async def _until_settled(self, reservation_id: str) -> None:
        """The peer may have all before the thread that sent it has let go of the pages."""
        until = time.monotonic() + _HANDOVER_S
        while self._reservations.handover.is_settling(reservation_id) and time.monotonic() < until:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(_HANDOVER_POLL_S)

    @contextmanager
    def _abortable(self, reservation_id: str, inbound: Inbound) -> Iterator[None]:
        """While it lasts, ``abort`` finds the transfer."""
        self._receiving[reservation_id] = inbound
        try:
            yield
        finally:
            self._receiving.pop(reservation_id, None)

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

    def _measure_push(self, outbound: Outbound) -> None:
        self.push_bytes_per_s = _smoothed(self.push_bytes_per_s, outbound.num_bytes_sent, outbound.busy_s)


def _smoothed(before: float, num_bytes: int, seconds: float) -> float:
    if num_bytes < _MIN_MEASURED_BYTES:
        return before
    rate = num_bytes / max(seconds, 1e-6)
    return rate if before == 0 else 0.8 * before + 0.2 * rate
