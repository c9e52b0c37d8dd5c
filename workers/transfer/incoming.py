"""Transfers into this rank's reservations, one at a time each, whichever side asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seamount.kernels.layout import PAGE_SIZE, CacheLayout, CachePlanes
from seamount.wire.errors import Aborted
from seamount.workers.cache.reservations import Reservations
from seamount.workers.transfer.link import Inbound, complete
from seamount.workers.transfer.receiving import Receive


class Incoming:
    """``begin``, then ``abortable`` while entries arrive, then ``end`` in any case. On the event loop, but for
    ``abort``."""

    def __init__(self, *, reservations: Reservations, planes: CachePlanes, layout: CacheLayout) -> None:
        self._reservations, self._planes, self._layout = reservations, planes, layout
        self._inbound: dict[str, Inbound] = {}

    def begin(self, reservation_id: str, first: int, end: int) -> Receive:
        """Entries of [first, end) may arrive. Raises as ``Uses.begin_receive``."""
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

    @contextmanager
    def abortable(self, reservation_id: str, inbound: Inbound) -> Iterator[None]:
        """While it lasts, ``abort`` finds the transfer."""
        self._inbound[reservation_id] = inbound
        try:
            yield
        finally:
            self._inbound.pop(reservation_id, None)

    def end(self, reservation_id: str, receive: Receive, inbound: Inbound | None) -> None:
        """Nothing of it is written any more. inbound: None where none came about."""
        if inbound is not None:
            inbound.detach()
        self._reservations.uses.end_receive(reservation_id, receive.verified_len)

    def abort(self, reservation_id: str) -> None:
        """Stop receiving into it without waiting for the peer: once this returns nothing more is written. Callable from
        any thread; harmless where nothing is received."""
        inbound = self._inbound.get(reservation_id)
        if inbound is not None:
            inbound.detach()
            complete(inbound.ended, Aborted("the reservation ended", reason="RESERVATION_ENDED"))
