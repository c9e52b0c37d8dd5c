"""Moves cache entries between this rank and others.

pull:  OpenLink if needed -> expect the transfer -> Pull -> receive -> entries verified into the reservation
hold:  OpenLink if needed -> Hold -> pull -> EndHold
push:  OpenLink if needed -> Push, whose initial metadata says that the peer expects it -> frames while the engine
       computes -> END -> the answer tells the verified length
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.v1 import transfer_pb2
from seamount.wire import limits
from seamount.wire.durations import duration
from seamount.wire.errors import DeadlineExceeded, SeamountError, Unavailable, from_rpc_error
from seamount.wire.ids import RankId
from seamount.wire.protocol import rank_call
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.transfer.frames import FrameShape
from seamount.workers.transfer.incoming import Incoming
from seamount.workers.transfer.link import Inbound, Outbound
from seamount.workers.transfer.links import Agreement, Connect, Links, OpenedLink
from seamount.workers.transfer.sending import PushCall, PushStream
from seamount.workers.transfer.service import TransferService

_LINK_IS_GONE = frozenset({"LINK_NOT_FOUND", "LINK_LOST", "LINK_CLOSED"})
_MIN_MEASURED_BYTES = 64 << 10
"""Smaller transfers tell the latency, not the speed."""

Result = TypeVar("Result")


class Transfer:
    """One rank's transfers. Make it on the event loop of the rank's gRPC server and register its ``service`` there.

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
        self._incoming = Incoming(reservations=reservations, planes=planes, layout=layout)
        self.service = TransferService(
            links=self._links,
            incoming=self._incoming,
            reservations=reservations,
            planes=planes,
            layout=layout,
            timeout_s=timeout_s,
        )

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
        receive = self._incoming.begin(reservation.id, first, end)
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
            with self._incoming.abortable(reservation.id, inbound):
                await asyncio.wrap_future(inbound.ended)
            num_bytes, seconds = inbound.num_bytes_received, time.monotonic() - started
            self.pull_bytes_per_s = _smoothed(self.pull_bytes_per_s, num_bytes, seconds)
        finally:
            self._incoming.end(reservation.id, receive, inbound)
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
        self._incoming.abort(reservation_id)

    async def close(self) -> None:
        """End all transfers and links; what had verified stays in the caches."""
        await self._links.close()
        await self.service.close()

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

    def _measure_push(self, outbound: Outbound) -> None:
        self.push_bytes_per_s = _smoothed(self.push_bytes_per_s, outbound.num_bytes_sent, outbound.busy_s)


def _smoothed(before: float, num_bytes: int, seconds: float) -> float:
    if num_bytes < _MIN_MEASURED_BYTES:
        return before
    rate = num_bytes / max(seconds, 1e-6)
    return rate if before == 0 else 0.8 * before + 0.2 * rate
