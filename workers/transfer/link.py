"""A pair link: one gloo group of two ranks, a thread for each direction, several transfers over it at a time.

A receive is posted only while an announced transfer has not ended. Every wait is bounded by ``stall_timeout_s``: a
sender with an open transfer but nothing to send says so several times within it. After any error the link is lost with
all its transfers and is never used again; the owner builds a new one. Nothing of another link or the gang is touched.

gloo offers no way to cancel an operation. A wait that runs out closes the pair, which ends every other wait on it at
once and shows at the peer as a broken connection: ``close`` uses that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from seamount.wire.errors import DataLoss, SeamountError, Unavailable
from seamount.workers.transfer.frames import (
    HEADER_BYTES,
    MAX_FRAME_TOKENS,
    Frame,
    FrameHeader,
    FrameKind,
    FrameShape,
    alive_frame,
    end_frame,
    is_intact,
    split_payload,
)

_HEADER_TAG: Final = 0
_PAYLOAD_TAG: Final = 1
_CLOSE_TAG: Final = 2
_log = logging.getLogger("seamount.transfer")


class Sink(Protocol):
    """Where the rows of a transfer go. Called on the link's receiving thread; must not block."""

    def accept(self, layer: int, first: int, latent: Tensor, index: Tensor) -> None:
        """Rows [n, bytes] uint8 that verified; they are only valid during the call."""

    def damaged(self, layer: int, first: int, count: int) -> None:
        """These rows arrived with a wrong checksum."""


class Outbound:
    """One transfer's way out. ``ended`` completes when its END has been sent, or fails with the link's error."""

    def __init__(self, link: PairLink, transfer_id: int, max_queued_bytes: int) -> None:
        self.transfer_id = transfer_id
        self.ended: Future[None] = Future()
        self.num_bytes_sent = 0
        self.busy_s = 0.0
        self._link = link
        self._max_queued_bytes = max_queued_bytes
        self._num_queued_bytes = 0
        self._closing = False

    def has_room(self) -> bool:
        """Whether ``put`` would return at once. False once the link is lost."""
        with self._link.changed:
            return self._link.error is None and self._fits()

    def put(self, frame: Frame, timeout_s: float = 0.0) -> None:
        """Queue a frame, waiting for room. Raises ``Unavailable`` if the link is lost or no room came in time."""
        with self._link.changed:
            deadline = time.monotonic() + timeout_s
            while self._link.error is None and not self._fits():
                if not self._link.changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            self._link.check()
            if not self._fits():
                raise Unavailable("the peer does not take frames in time", reason="LINK_STALLED", retry_after_s=0.0)
            assert not self._closing, "put after end"
            self._queue(frame)

    def end(self) -> None:
        """Queue END after what is queued; idempotent, and harmless on a lost link."""
        with self._link.changed:
            if not self._closing and self._link.error is None:
                self._closing = True
                self._queue(end_frame(self.transfer_id))

    def _fits(self) -> bool:
        return self._num_queued_bytes < self._max_queued_bytes

    def _queue(self, frame: Frame) -> None:
        self._num_queued_bytes += frame.num_bytes
        self._link.queue.append((self, frame))
        self._link.changed.notify_all()

    def sent(self, frame: Frame, busy_s: float) -> None:
        """Called by the link, under its lock."""
        self._num_queued_bytes -= frame.num_bytes
        self.num_bytes_sent += frame.num_bytes
        self.busy_s += busy_s


class Inbound:
    """One transfer's way in. ``ended`` completes at its END, or fails with the link's error."""

    def __init__(self, transfer_id: int, sink: Sink) -> None:
        self.transfer_id = transfer_id
        self.ended: Future[None] = Future()
        self.num_bytes_received = 0
        self.started = False
        self._lock = threading.Lock()
        self._sink: Sink | None = sink

    def detach(self) -> None:
        """Once this returns, the sink is not called any more; frames that still come are read and dropped."""
        with self._lock:
            self._sink = None

    def take(self, header: FrameHeader, payload: Tensor) -> None:
        """Called by the link for each DATA frame."""
        self.num_bytes_received += payload.numel()
        with self._lock:
            if self._sink is None:
                return
            if is_intact(header, payload):
                self._sink.accept(header.layer, header.first, *split_payload(header, payload))
            else:
                self._sink.damaged(header.layer, header.first, header.count)


class PairLink:
    """Both directions between two ranks over ``group`` (size 2), of which it must get the only reference.

    shape: of the frames, the same on both sides. stall_timeout_s: the longest wait for the peer.
    max_queued_bytes: of frames that wait to be sent, for each transfer.
    """

    def __init__(
        self,
        link_id: str,
        group: ProcessGroupGloo,
        shape: FrameShape,
        *,
        stall_timeout_s: float,
        max_queued_bytes: int = 64 << 20,
    ) -> None:
        self.link_id = link_id
        self.changed = threading.Condition()
        self.queue: deque[tuple[Outbound, Frame]] = deque()
        self.error: SeamountError | None = None
        self.last_used_at = time.monotonic()
        self._group: Any = group  # torch's stubs lack send and recv of the group object
        self._peer = 1 - group.rank()
        self._shape = shape
        self._timeout = timedelta(seconds=stall_timeout_s)
        self._stall_timeout_s = stall_timeout_s
        self._max_queued_bytes = max_queued_bytes
        self._outbound: dict[int, Outbound] = {}
        self._inbound: dict[int, Inbound] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"link-{name}-{link_id[:8]}", daemon=True)
            for name, loop in (("send", self._send_loop), ("receive", self._receive_loop))
        ]
        self._last_sent_at = time.monotonic()
        self._num_running = len(self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def is_idle(self) -> bool:
        with self.changed:
            return not self._outbound and not self._inbound

    def check(self) -> None:
        """Raise what ended the link, if anything did."""
        if self.error is not None:
            raise self.error

    def send(self, transfer_id: int) -> Outbound:
        """Open a transfer to the peer, which must have announced that it expects it. Raises if the link is lost."""
        with self.changed:
            self.check()
            outbound = Outbound(self, transfer_id, self._max_queued_bytes)
            assert transfer_id not in self._outbound, "transfer ids are not reused"
            self._outbound[transfer_id] = outbound
            self._touch()
            return outbound

    def expect(self, transfer_id: int, sink: Sink) -> Inbound:
        """Know a transfer, before the peer may send it. Raises if the link is lost or the id is in use."""
        with self.changed:
            self.check()
            if transfer_id in self._inbound:
                raise DataLoss(f"transfer {transfer_id} is in flight already", reason="TRANSFER_ID_REUSED")
            inbound = Inbound(transfer_id, sink)
            self._inbound[transfer_id] = inbound
            self._touch()
            return inbound

    def start(self, inbound: Inbound) -> None:
        """The peer sends it: receive until its END. A receive, once posted, cannot be taken back."""
        with self.changed:
            inbound.started = True
            self._touch()

    def forget(self, inbound: Inbound) -> None:
        """The peer refused a transfer that was never started."""
        with self.changed:
            assert not inbound.started, "only its END ends a started transfer"
            self._inbound.pop(inbound.transfer_id, None)

    def close(self) -> None:
        """End the link and all its transfers now; the peer sees a broken connection. Idempotent; returns at once."""
        self._fail(Unavailable("the link was closed", reason="LINK_CLOSED", retry_after_s=0.0))

    def join(self, timeout_s: float) -> bool:
        """Wait for both threads of a closed link; whether they are gone."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _touch(self) -> None:
        self.last_used_at = time.monotonic()
        self.changed.notify_all()

    # ---- the two threads

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            self._guarded(loop)
        finally:
            with self.changed:
                self._num_running -= 1
                if self._num_running == 0:
                    self._group = None  # the last reference: gloo closes its sockets and thread

    def _take(self, inbound: Inbound, header: FrameHeader, payload: Tensor) -> None:
        self._guarded(partial(inbound.take, header, payload))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Whatever goes wrong in ``work`` ends the link, and is told to its transfers."""
        try:
            work()
        except SeamountError as error:
            self._fail(error)
        except RuntimeError as error:  # gloo's: the peer is gone, or a wait ran out
            _log.info("link_lost", extra={"link_id": self.link_id, "error": str(error)[:200]})
            self._fail(Unavailable("the link to the peer broke or stalled", reason="LINK_LOST", retry_after_s=0.0))
        except Exception:
            _log.exception("link_failed", extra={"link_id": self.link_id})
            self._fail(Unavailable("a defect ended the link; the log says more", reason="LINK_LOST", retry_after_s=0.0))

    def _send_loop(self) -> None:
        while True:
            with self.changed:
                chosen = self._next_frame()
            if chosen is None:
                return
            outbound, frame = chosen
            started = time.monotonic()
            self._send(frame)
            self._last_sent_at = time.monotonic()
            if outbound is None:
                continue
            with self.changed:
                outbound.sent(frame, self._last_sent_at - started)
                if frame.payload is None:
                    self._outbound.pop(outbound.transfer_id, None)
                    self._touch()
                self.changed.notify_all()
            if frame.payload is None:
                complete(outbound.ended)

    def _next_frame(self) -> tuple[Outbound | None, Frame] | None:
        """Under the lock: what to send next, ALIVE after a quarter of the peer's patience; None on a lost link."""
        while self.error is None:
            if self.queue:
                return self.queue.popleft()
            patience_s = self._last_sent_at + self._stall_timeout_s / 4 - time.monotonic()
            if self._outbound and patience_s <= 0:
                return None, alive_frame()
            self.changed.wait(patience_s if self._outbound else None)
        return None

    def _send(self, frame: Frame) -> None:
        works = [self._group.send([frame.header], self._peer, _HEADER_TAG)]
        if frame.payload is not None:
            works.append(self._group.send([frame.payload], self._peer, _PAYLOAD_TAG))
        for work in works:
            work.wait(self._timeout)

    def _receive_loop(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix=f"link-take-{self.link_id[:8]}") as taker:
            self._receive_into(taker)

    def _receive_into(self, taker: ThreadPoolExecutor) -> None:
        """Verifies and stores one payload while the next one arrives in the other buffer."""
        header_bytes = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        buffer, other = torch.empty((2, self._shape.payload_bytes(MAX_FRAME_TOKENS)), dtype=torch.uint8)
        taking: Future[None] = taker.submit(lambda: None)
        while True:
            with self.changed:
                while self.error is None and not any(inbound.started for inbound in self._inbound.values()):
                    self.changed.wait()
                if self.error is not None:
                    return
            self._group.recv([header_bytes], self._peer, _HEADER_TAG).wait(self._timeout)
            header = FrameHeader.unpack(header_bytes.numpy().tobytes(), self._shape)
            if header.kind is not FrameKind.DATA and not is_intact(header, None):
                raise DataLoss("a frame on the link is damaged: its checksum is wrong", reason="BAD_FRAME")
            if header.kind is FrameKind.ALIVE:
                continue
            with self.changed:
                inbound = self._inbound.get(header.transfer_id)
            if inbound is None:
                raise DataLoss(
                    f"a frame came for transfer {header.transfer_id}, which nobody awaits", reason="BAD_FRAME"
                )
            if header.kind is FrameKind.DATA:
                payload = buffer[: self._shape.payload_bytes(header.count)]
                self._group.recv([payload], self._peer, _PAYLOAD_TAG).wait(self._timeout)
                taking.result(self._stall_timeout_s)
                taking = taker.submit(self._take, inbound, header, payload)
                buffer, other = other, buffer
            else:
                taking.result(self._stall_timeout_s)
                with self.changed:
                    self._inbound.pop(header.transfer_id, None)
                    self._touch()
                complete(inbound.ended)

    def _fail(self, error: SeamountError) -> None:
        with self.changed:
            if self.error is not None:
                return
            self.error = error
            open_ends = [out.ended for out in self._outbound.values()] + [into.ended for into in self._inbound.values()]
            self._outbound.clear()
            self._inbound.clear()
            self.queue.clear()
            group = self._group
            self.changed.notify_all()
        if group is not None:
            # A receive that nobody answers: when its wait runs out the pair closes, and both threads wake.
            with suppress(RuntimeError):
                group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _CLOSE_TAG).wait(timedelta(milliseconds=1))
        for ended in open_ends:
            complete(ended, error)


def complete(future: Future[None], error: SeamountError | None = None) -> None:
    """End a future once; what comes later is ignored."""
    with suppress(InvalidStateError):  # its waiter gave up
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
