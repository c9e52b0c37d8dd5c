"""One rank over gRPC: typed calls, deadlines, and a watchdog on frames instead of sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf import duration_pb2

from seamount.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire.durations import duration
from seamount.wire.errors import NotFound, SeamountError, Unavailable, from_rpc_error
from seamount.wire.ids import Epoch, RankId, ReservationId, SessionId, TurnId

Request = TypeVar("Request")
Response = TypeVar("Response")

RESERVED_FOR_S = 10.0
"""What a reservation lives without a word of its router: the pages of one that died before it let the rank generate, or
whose turn went on at another rank, are free by then."""

_LOST_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAUTHENTICATED,  # of the router, not of its client
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
_ENGINE_IS_GONE = frozenset({"ENGINE_FAILED", "ENGINE_STALLED"})


class RankLost(Unavailable):
    """Place the work anew, at another rank.

    cause: the rank's own typed error, where it gave one; None where it died, hangs or left. died: its process ended, or
    its engine failed or hangs, and the process will end.
    """

    cause: SeamountError | None = None
    died: bool = False


class ReservationGone(Unavailable):
    """The rank is well but no longer knows the reservation: reserve again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a rank must know of the turn it works for."""

    session_id: SessionId
    turn_id: TurnId
    epoch: Epoch
    attempt: int
    cache_salt: bytes
    token_ids: Sequence[int]


class RankClient:
    """Calls of one rank. The channel belongs to the caller's ``Ranks``; closing it ends every call here."""

    def __init__(
        self,
        rank_id: RankId,
        address: str,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...],
        call_timeout_s: float,
        progress_timeout_s: float,
    ) -> None:
        self.rank_id = rank_id
        self.address = address
        self.num_calls = 0
        """Calls in flight: the channel of a rank that left is closed when there is none."""
        self._stub = worker_pb2_grpc.WorkerServiceStub(channel)
        self._metadata = metadata
        self._call_timeout_s = call_timeout_s
        self._progress_timeout_s = progress_timeout_s

    async def reserve(self, work: Work) -> worker_pb2.ReserveResponse:
        """Reserve, or renew and ask what has arrived. Raises ``RankLost`` or the rank's own typed error."""
        request = worker_pb2.ReserveRequest(
            session_id=work.session_id,
            turn_id=work.turn_id,
            epoch=work.epoch,
            attempt=work.attempt,
            cache_salt=work.cache_salt,
            token_ids=work.token_ids,
            time_to_live=duration_pb2.Duration(seconds=int(RESERVED_FOR_S)),
        )
        with self._typed():
            return await self._stub.Reserve(request, timeout=self._call_timeout_s, metadata=self._metadata)

    async def release(
        self, reservation_id: ReservationId, *, keep_len: int | None, reuse_len: int | None = None
    ) -> None:
        """End a reservation. Raises as ``reserve`` does."""
        request = worker_pb2.ReleaseRequest(reservation_id=reservation_id, keep_len=keep_len, reuse_len=reuse_len)
        with self._typed():
            await self._stub.Release(request, timeout=self._call_timeout_s, metadata=self._metadata)

    async def restore(self, session_id: SessionId) -> None:
        """A turn of the session is about to come. Raises as ``reserve`` does."""
        request = worker_pb2.RestoreRequest(session_id=session_id)
        with self._typed():
            await self._stub.Restore(request, timeout=self._call_timeout_s, metadata=self._metadata)

    async def retain(
        self, session_id: SessionId, *, epoch: Epoch, duration_s: float, importance: common_pb2.LeaseImportance
    ) -> worker_pb2.RetainResponse:
        """Ask for a lease on what the session's turn of that epoch left there. Raises as ``reserve`` does."""
        request = worker_pb2.RetainRequest(
            session_id=session_id, epoch=epoch, duration=duration(duration_s), importance=importance
        )
        with self._typed():
            return await self._stub.Retain(request, timeout=self._call_timeout_s, metadata=self._metadata)

    def prefill(
        self, request: worker_pb2.PrefillRequest, *, timeout_s: float
    ) -> AsyncGenerator[worker_pb2.PrefillResponse, None]:
        """Frames of a remote prefill, ``finished`` last, for at most ``timeout_s``; the rank knows that time too.

        Raises ``RankLost`` when no frame comes in time.
        """
        return self._frames(lambda: self._stub.Prefill(request, metadata=self._metadata, timeout=timeout_s))

    def migrate(
        self, request: worker_pb2.MigrateRequest, *, timeout_s: float
    ) -> AsyncGenerator[worker_pb2.MigrateResponse, None]:
        """Frames of a move of pages to this rank, as ``prefill``. Its own typed errors are about the rank that has
        them, which is then as it was."""
        return self._frames(lambda: self._stub.Migrate(request, metadata=self._metadata, timeout=timeout_s))

    def drain(
        self, request: worker_pb2.DrainRequest, *, timeout_s: float
    ) -> AsyncGenerator[worker_pb2.DrainResponse, None]:
        """Sessions as the rank hands them over, as ``prefill``."""
        return self._frames(lambda: self._stub.Drain(request, metadata=self._metadata, timeout=timeout_s))

    async def prepare(self, request: worker_pb2.PrepareRequest) -> None:
        """Ask for work ahead of time. Raises as ``reserve`` does."""
        with self._typed():
            await self._stub.Prepare(request, timeout=self._call_timeout_s, metadata=self._metadata)

    def generate(
        self, request: worker_pb2.WorkerServiceGenerateRequest, *, timeout_s: float
    ) -> AsyncGenerator[worker_pb2.WorkerServiceGenerateResponse, None]:
        """Frames of a generation, as ``prefill``. Closing the iterator ends the call, which frees the slot."""
        return self._frames(lambda: self._stub.Generate(request, metadata=self._metadata, timeout=timeout_s))

    async def _frames(
        self, begin: Callable[[], grpc.aio.UnaryStreamCall[Request, Response]]
    ) -> AsyncGenerator[Response, None]:
        with self._typed():
            call = begin()
            try:
                while True:
                    try:
                        async with asyncio.timeout(self._progress_timeout_s):
                            frame = await call.read()
                    except TimeoutError:
                        raise self._lost(f"it sent nothing for {self._progress_timeout_s:g} s") from None
                    if frame is grpc.aio.EOF:
                        return
                    yield frame  # type: ignore[misc]
            finally:
                call.cancel()

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Errors of a call, typed. While it lasts, the channel stays open (``num_calls``)."""
        task = asyncio.current_task()
        num_cancelled = task.cancelling() if task is not None else 0
        self.num_calls += 1
        try:
            yield
        except grpc.RpcError as error:
            raise self._error(from_rpc_error(error)) from error
        except grpc.aio.UsageError as error:
            raise self._lost("its channel is closed") from error
        except asyncio.CancelledError:
            if task is None or task.cancelling() > num_cancelled:
                raise
            raise self._lost("its channel was closed under the call") from None  # nobody cancelled this task
        finally:
            self.num_calls -= 1

    def _error(self, typed: SeamountError) -> SeamountError:
        if isinstance(typed, NotFound) and typed.reason == "RESERVATION_NOT_FOUND":
            return ReservationGone(typed.message, reason=typed.reason, retry_after_s=0.1)
        if typed.code not in _LOST_CODES:
            return typed
        lost = self._lost(typed.message)
        if typed.reason != typed.code.name:  # gRPC's own errors have no reason but their code
            lost.cause = typed
            lost.died = typed.reason in _ENGINE_IS_GONE
        else:
            lost.died = isinstance(typed, Unavailable)  # the connection broke: a closed one does not speak of a process
        return lost

    def _lost(self, why: str) -> RankLost:
        return RankLost(
            f"rank {self.rank_id} is lost: {why}",
            reason="RANK_LOST",
            retry_after_s=1.0,
            metadata={"rank": self.rank_id},
        )
