"""What touches pages of a reservation outside the lock: steps, sends, receives. The pages are not reused meanwhile."""

from __future__ import annotations

from seamount.wire.errors import FailedPrecondition, OutOfRange
from seamount.workers.cache.admission import check_span
from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.live import LiveReservations
from seamount.workers.cache.reservation import Reservation


class Uses:
    """Made by ``Reservations``, whose lock it takes; calls may come from any thread."""

    def __init__(self, live: LiveReservations, holdings: Holdings) -> None:
        self._live, self._holdings = live, holdings

    def begin(self, reservation_id: str) -> Reservation:
        """A step or a send is about to touch its pages: they are not reused before ``end``. Raises NotFound.

        Uses nest; each needs its ``end``. Raises FailedPrecondition (PREEMPTED).
        """
        with self._live.lock:
            reservation = self._live.get_active(reservation_id)
            reservation.num_uses += 1
            return reservation

    def end(self, reservation_id: str) -> None:
        """One use is over. Raises NotFound if there was none."""
        with self._live.lock:
            reservation = self._live.get_used(reservation_id)
            if reservation.num_uses - (reservation.receive is not None) < 1:
                raise FailedPrecondition("the reservation is not in use", reason="NOT_IN_USE")
            self._live.end_use(reservation)

    def begin_receive(self, reservation_id: str, first: int, end: int) -> None:
        """Entries of the positions [first, end) are about to be written by a transfer; one at a time a reservation.

        Raises NotFound, OutOfRange (empty or beyond tokens and pages; leaves a gap after ``computed_len``; falls into
        pages that are shared already: reserve again to learn what is present), FailedPrecondition (PREEMPTED,
        RECEIVE_IN_FLIGHT, RESTORING).
        """
        with self._live.lock:
            reservation = self._live.get_active(reservation_id)
            if reservation.receive is not None:
                raise FailedPrecondition(
                    "a receive into this reservation is in flight; retry when it has ended", reason="RECEIVE_IN_FLIGHT"
                )
            if reservation.is_restoring:
                raise FailedPrecondition("pages of this reservation are being restored; retry", reason="RESTORING")
            check_span(first, end, min(reservation.capacity, len(reservation.token_ids)))
            shared_len = len(reservation.nodes) * reservation.page_size
            if first == end or not shared_len <= first <= reservation.computed_len:
                raise OutOfRange(
                    f"a receive of [{first}, {end}) must not be empty and must begin in [{shared_len}, "
                    f"{reservation.computed_len}]; reserve again to learn what is present",
                    reason="RECEIVE_OUT_OF_RANGE",
                )
            reservation.receive = (first, end)
            reservation.num_uses += 1

    def end_receive(self, reservation_id: str, verified_len: int) -> None:
        """The transfer is over, or its link destroyed: nothing of it writes any more.

        verified_len: positions before it are present and verified in every plane of every layer; anything up to the
        receive's ``first`` says that nothing arrived. Raises NotFound, FailedPrecondition (NO_RECEIVE), OutOfRange
        (``verified_len`` beyond the receive).
        """
        with self._live.lock:
            reservation = self._live.get_used(reservation_id)
            if reservation.receive is None:
                raise FailedPrecondition("no receive into this reservation is in flight", reason="NO_RECEIVE")
            end, reservation.receive = reservation.receive[1], None
            if verified_len <= end:
                self._holdings.advance(reservation, verified_len)
            self._live.end_use(reservation)
        if verified_len > end:
            raise OutOfRange(
                f"verified_len is {verified_len} and the receive ended at {end}: nothing of it is taken as present",
                reason="VERIFIED_LEN_OUT_OF_RANGE",
            )
