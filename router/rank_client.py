"""One rank over gRPC: typed calls, deadlines, and a watchdog on frames instead of sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf import duration_pb2

from seamount.v1 import worker_pb2, worker_pb2_grpc
from seamount.wire import limits
from seamount.wire.errors import SeamountError, Unavailable, from_rpc_error
from seamount.wire.ids import Epoch, RankId, ReservationId, SessionId, TurnId

Request = TypeVar("Request")
Response = TypeVar("Response")

_LOST_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.NOT_FOUND,
    }
)


class RankLost(Unavailable):
    """The rank died, hangs, or no longer knows the reservation: place the work anew."""


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
            time_to_live=duration_pb2.Duration(seconds=int(limits.MAX_RESERVATION_S)),
        )
        try:
            return await self._stub.Reserve(request, timeout=self._call_timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._typed(error) from error

    async def release(self, reservation_id: ReservationId, *, keep_len: int | None) -> None:
        """End a reservation. Raises as ``reserve`` does."""
        request = worker_pb2.ReleaseRequest(reservation_id=reservation_id, keep_len=keep_len)
        try:
            await self._stub.Release(request, timeout=self._call_timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._typed(error) from error

    def prefill(self, request: worker_pb2.PrefillRequest) -> AsyncGenerator[worker_pb2.PrefillResponse, None]:
        """Frames of a remote prefill, ``finished`` last. Raises ``RankLost`` when none comes in time."""
        return self._frames(self._stub.Prefill(request, metadata=self._metadata))

    def generate(
        self, request: worker_pb2.WorkerServiceGenerateRequest
    ) -> AsyncGenerator[worker_pb2.WorkerServiceGenerateResponse, None]:
        """Frames of a generation, ``finished`` last. Closing the iterator ends the call, which frees the slot."""
        return self._frames(self._stub.Generate(request, metadata=self._metadata))

    async def _frames(self, call: grpc.aio.UnaryStreamCall[Request, Response]) -> AsyncGenerator[Response, None]:
        try:
            while True:
                async with asyncio.timeout(self._progress_timeout_s):
                    frame = await call.read()
                if frame is grpc.aio.EOF:
                    return
                yield frame  # type: ignore[misc]
        except TimeoutError as error:
            raise self._lost(f"sent nothing for {self._progress_timeout_s:g} s") from error
        except grpc.RpcError as error:
            raise self._typed(error) from error
        finally:
            call.cancel()

    def _typed(self, error: grpc.RpcError) -> SeamountError:
        typed = from_rpc_error(error)
        return self._lost(typed.message) if typed.code in _LOST_CODES else typed

    def _lost(self, why: str) -> RankLost:
        return RankLost(
            f"rank {self.rank_id} is lost: {why}",
            reason="RANK_LOST",
            retry_after_s=1.0,
            metadata={"rank": self.rank_id},
        )
