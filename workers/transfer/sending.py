"""The sending end of a transfer: rows are gathered from the planes and queued on the link."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import grpc
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout, CachePlanes, gather_slots
from seamount.v1 import transfer_pb2
from seamount.wire import failpoints
from seamount.wire.errors import Unavailable, from_rpc_error
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.transfer.frames import MAX_FRAME_TOKENS, Frame, data_frame
from seamount.workers.transfer.link import Outbound

PushCall = grpc.aio.UnaryStreamCall[transfer_pb2.PushRequest, transfer_pb2.PushResponse]


def gather_frame(
    transfer_id: int, layer: int, first: int, slots: list[int], planes: CachePlanes, layout: CacheLayout
) -> Frame:
    """The frame of one layer's rows of the positions from ``first`` on, whose slots are given: a copy."""
    at = torch.tensor(slots, dtype=torch.int64, device=planes.latent[layer].device)
    latent = to_host(gather_slots(planes.latent[layer], at, layout, "latent"))
    index = to_host(gather_slots(planes.index[layer], at, layout, "index"))
    frame = data_frame(transfer_id, layer, first, latent, index)
    if failpoints.reached("rank.frame", f"{layer}:{first}") and frame.payload is not None:
        frame.payload[0] ^= 1
    return frame


def to_host(rows: Tensor) -> Tensor:
    """Rows on the CPU: themselves, or a copy through pinned memory, complete when this returns."""
    if rows.device.type == "cpu":
        return rows
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    pinned.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return pinned


def send_slots(
    outbound: Outbound, first: int, slots: list[int], planes: CachePlanes, layout: CacheLayout, timeout_s: float
) -> None:
    """Queue all layers of the positions from ``first`` on, then END; blocks, each wait for at most ``timeout_s``.

    All layers of one stretch of positions go before the next stretch, so that a transfer that breaks leaves a prefix.
    """
    for at in range(0, len(slots), MAX_FRAME_TOKENS):
        stretch = slots[at : at + MAX_FRAME_TOKENS]
        for layer in range(len(planes.latent)):
            frame = gather_frame(outbound.transfer_id, layer, first + at, stretch, planes, layout)
            outbound.put(frame, timeout_s)
    outbound.end()


class PushStream:
    """Cache entries of token positions [first, end) on their way to another rank while they are computed.

    Made by ``Transfer.push``; ended by ``finish`` or ``close``. The engine's thread calls ``on_layer`` and never waits
    there: what finds no room in the queue stays in the pages and follows later, at the latest in ``finish``. Once the
    link is lost, ``on_layer`` does nothing and ``finish`` raises.
    """

    def __init__(
        self,
        *,
        call: PushCall,
        outbound: Outbound,
        reservations: Reservations,
        reservation: Reservation,
        planes: CachePlanes,
        layout: CacheLayout,
        first: int,
        end: int,
        timeout_s: float,
        on_finished: Callable[[Outbound], None],
    ) -> None:
        self.first, self.end = first, end
        self._call, self._outbound = call, outbound
        self._reservations, self._reservation = reservations, reservation
        self._planes, self._layout = planes, layout
        self._timeout_s = timeout_s
        self._on_finished = on_finished
        self._lock = threading.Lock()
        self._closed = False
        self._computed = [first] * len(planes.latent)
        self._queued = [first] * len(planes.latent)

    @property
    def failed(self) -> bool:
        """Whether the link is lost or the peer gave up: nothing will arrive any more."""
        return self._call.done() or (self._outbound.ended.done() and self._outbound.ended.exception() is not None)

    def on_layer(self, layer: int, first: int, end: int) -> None:
        """A layer's entries of the positions before ``end`` are in the pages. Called on the engine's thread."""
        with self._lock:
            if self._closed:
                return
            self._computed[layer] = max(self._computed[layer], min(end, self.end))
            while self._queued[layer] < self._computed[layer] and self._outbound.has_room():
                frame, stop = self._gather_next(layer)
                try:
                    self._outbound.put(frame)
                except Unavailable:  # lost since the line before: finish tells
                    return
                self._queued[layer] = stop

    async def finish(self) -> int:
        """Send what is computed and not sent yet, wait until the peer has verified it, and return its verified length.

        Raises ``Unavailable`` (LINK_LOST, LINK_STALLED), NotFound (the reservation ended) or the peer's typed error;
        what had arrived stays with the peer.
        """
        try:
            await self._flush()
            self._outbound.end()
            await asyncio.wrap_future(self._outbound.ended)
            async with asyncio.timeout(self._timeout_s):
                response = await self._call.read()
            if not isinstance(response, transfer_pb2.PushResponse):
                raise Unavailable("the peer ended the push without an answer", reason="LINK_LOST", retry_after_s=0.0)
            self._on_finished(self._outbound)
            return response.verified_len
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except TimeoutError:
            raise Unavailable(
                "the peer took the entries and did not answer", reason="LINK_STALLED", retry_after_s=0.0
            ) from None
        finally:
            self.close()

    def close(self) -> None:
        """Give up what is not sent; idempotent. The peer keeps what has arrived and verified."""
        with self._lock:
            self._closed = True
        self._outbound.end()
        self._call.cancel()

    async def _flush(self) -> None:
        self._reservations.uses.begin(self._reservation.id)  # its pages stay while the rest is gathered
        try:
            await asyncio.to_thread(self._queue_rest)
        except BaseException:
            self.close()  # the thread may still run: it gathers nothing more before the use ends
            raise
        finally:
            self._reservations.uses.end(self._reservation.id)

    def _queue_rest(self) -> None:
        for target in range(self.first + MAX_FRAME_TOKENS, self.end + MAX_FRAME_TOKENS, MAX_FRAME_TOKENS):
            for layer, computed in enumerate(self._computed):
                while self._queued[layer] < min(target, computed):
                    with self._lock:
                        if self._closed:
                            return
                        frame, stop = self._gather_next(layer)
                    self._outbound.put(frame, self._timeout_s)
                    self._queued[layer] = stop

    def _gather_next(self, layer: int) -> tuple[Frame, int]:
        first = self._queued[layer]
        stop = min(first + MAX_FRAME_TOKENS, self._computed[layer])
        slots = self._reservation.slots(first, stop)
        return gather_frame(self._outbound.transfer_id, layer, first, slots, self._planes, self._layout), stop
