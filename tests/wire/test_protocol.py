"""Routers and ranks of releases that would misunderstand each other do not work together, and say so."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from seamount.v1 import worker_pb2, worker_pb2_grpc
from seamount.wire import protocol
from seamount.wire.credentials import CallMetadata, bearer
from seamount.wire.errors import FailedPrecondition, Unauthenticated, from_rpc_error
from seamount.wire.interceptors import rank_interceptors
from seamount.wire.protocol import rank_call

TOKEN = "a-token-of-twenty-chars"


class Rank(worker_pb2_grpc.WorkerServiceServicer):
    async def Release(self, request: worker_pb2.ReleaseRequest, context: object) -> worker_pb2.ReleaseResponse:
        return worker_pb2.ReleaseResponse()

    async def WatchState(
        self, request: worker_pb2.WatchStateRequest, context: object
    ) -> AsyncIterator[worker_pb2.WatchStateResponse]:
        yield worker_pb2.WatchStateResponse()


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=rank_interceptors(TOKEN))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Rank(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def call(address: str, metadata: CallMetadata) -> None:
    """A unary call and a stream. Raises their typed error."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            assert [_ async for _ in stub.WatchState(worker_pb2.WatchStateRequest(), metadata=metadata)] != []
            await stub.Release(worker_pb2.ReleaseRequest(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


async def test_the_same_version_and_those_from_before_it_was_shown_are_taken(address: str) -> None:
    await call(address, rank_call(TOKEN))
    await call(address, bearer(TOKEN))


async def test_another_version_is_refused_before_anything_else(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WORKER_PROTOCOL", 2)
    newer = rank_call("not the token")
    monkeypatch.undo()
    with pytest.raises(FailedPrecondition, match="protocol 2 and this rank 1") as refused:
        await call(address, newer)
    assert refused.value.reason == "PROTOCOL_MISMATCH"
    assert refused.value.metadata["caller"] == "2"
    with pytest.raises(FailedPrecondition, match="protocol abc"):
        await call(address, (("seamount-protocol", "abc"),))
    with pytest.raises(Unauthenticated):
        await call(address, rank_call("not the token"))


async def test_health_is_for_everyone(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        metadata = (*bearer(TOKEN), ("seamount-protocol", "99"))
        answer = await stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
