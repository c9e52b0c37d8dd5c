"""Waiting for a restore from the event loop."""

from __future__ import annotations

import asyncio

from seamount.workers.cache.reservation import Reservation


async def until_restored(reservation: Reservation, timeout_s: float | None = None) -> None:
    """Returns when nothing of the reservation is being restored any more, whatever has come of it, or after
    ``timeout_s``."""
    if reservation.is_restoring and reservation.restored is not None:
        await asyncio.wait({asyncio.wrap_future(reservation.restored)}, timeout=timeout_s)
