"""Errors, malformed input and the shared token, over a real server with real stubs."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from seamount.v1 import worker_pb2, worker_pb2_grpc
from seamount.wire import logs
from seamount.wire.credentials import bearer
from seamount.wire.errors import Internal, InvalidArgument, ResourceExhausted, Unauthenticated, from_rpc_error
from seamount.wire.interceptors import listening, rank_interceptors

TOKEN = "a-token-of-twenty-chars"
CANARY = "the user's own words 7c1e"


class Rank(worker_pb2_grpc.WorkerServiceServicer):
    """Answers as each test sets it; ``closed`` tells that a stream's generator was closed."""

    def __init__(self) -> None:
        self.reserve: Callable[[], worker_pb2.ReserveResponse] = worker_pb2.ReserveResponse
        self.num_frames = 2
        self.after_frames: Callable[[], None] = lambda: None
        self.endless = False
        self.closed = asyncio.Event()

    async def Reserve(self, request, context):
        return self.reserve()

    async def Generate(self, request, context):
        try:
            for index in range(self.num_frames):
                yield worker_pb2.WorkerServiceGenerateResponse(
                    tokens=worker_pb2.TokenBatch(first_index=index, token_ids=[index])
                )
            if self.endless:
                await asyncio.Event().wait()
            self.after_frames()
        finally:
            self.closed.set()

    async def Prefill(self, request, context):
        raise AssertionError("not called")
        yield

    async def Release(self, request, context):
        return worker_pb2.ReleaseResponse()

    async def WatchState(self, request, context):
        yield worker_pb2.WatchStateResponse()


@asynccontextmanager
async def serving(rank: Rank, token: str | None = None) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=rank_interceptors(token))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(rank, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(["x.Y"]), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def out_of_pages() -> worker_pb2.ReserveResponse:
    raise ResourceExhausted("no pages", reason="NO_PAGES", retry_after_s=1.5, metadata={"missing": "3"})


def defect() -> worker_pb2.ReserveResponse:
    raise KeyError(CANARY)


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    (value,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    return status_pb2.Status.FromString(value)


async def test_unary_error_carries_its_status() -> None:
    rank = Rank()
    rank.reserve = out_of_pages
    async with serving(rank) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker_pb2_grpc.WorkerServiceStub(channel).Reserve(worker_pb2.ReserveRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = status_of(caught.value)
    detail = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(detail)
    assert (detail.reason, dict(detail.metadata)) == ("NO_PAGES", {"missing": "3"})
    typed = from_rpc_error(caught.value)
    assert isinstance(typed, ResourceExhausted)
    assert typed.retry_after_s == 1.5


async def test_stream_error_comes_after_what_was_sent() -> None:
    rank = Rank()
    rank.num_frames, rank.after_frames = 3, out_of_pages
    async with serving(rank) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Generate(worker_pb2.WorkerServiceGenerateRequest(), timeout=5)
        seen = [(await call.read()).tokens.first_index for _ in range(3)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert seen == [0, 1, 2]
    assert isinstance(from_rpc_error(caught.value), ResourceExhausted)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_defect_is_internal_and_its_text_stays_inside(streaming: bool) -> None:
    rank = Rank()
    rank.reserve = rank.after_frames = defect
    rank.num_frames = 0
    out = io.StringIO()
    logs.configure(stream=out)
    try:
        async with serving(rank) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            request = worker_pb2.WorkerServiceGenerateRequest()
            answer = (
                stub.Generate(request, timeout=5).read()
                if streaming
                else stub.Reserve(worker_pb2.ReserveRequest(), timeout=5)
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
    finally:
        logging.getLogger("seamount").handlers.clear()
        logging.getLogger("seamount").propagate = True
    assert isinstance(from_rpc_error(caught.value), Internal)
    assert CANARY not in str(caught.value)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    failed = [line for line in lines if line["event"] == "rpc_failed"]
    assert [line["error"] for line in failed] == ["KeyError"]
    assert any("defect" in place for place in failed[0]["at"])
    assert [line["code"] for line in lines if line["event"] == "rpc_finished"] == ["INTERNAL"]
    assert CANARY not in out.getvalue()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28"])
async def test_malformed_messages_are_invalid_arguments(garbage: bytes) -> None:
    """No varint, a truncated string, a string that is not UTF-8: on unary, streaming and both-ways methods."""
    async with serving(Rank()) as channel:
        for call in (
            channel.unary_unary("/seamount.v1.WorkerService/Reserve")(garbage, timeout=5),
            channel.unary_stream("/seamount.v1.WorkerService/Generate")(garbage, timeout=5).read(),
            channel.unary_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
                garbage, timeout=5
            ).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            typed = from_rpc_error(caught.value)
            assert isinstance(typed, InvalidArgument)
            assert typed.reason == "MALFORMED_MESSAGE"
            assert typed.field == "request"


async def test_a_cancelled_stream_closes_its_generator_at_once() -> None:
    rank = Rank()
    rank.endless = True
    async with serving(rank) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Generate(worker_pb2.WorkerServiceGenerateRequest())
        await call.read()
        assert not rank.closed.is_set()
        call.cancel()
        await asyncio.wait_for(rank.closed.wait(), 1.0)


async def test_health_and_reflection_pass_through() -> None:
    async with serving(Rank()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests, timeout=5)
        assert [s.name for s in (await call.read()).list_services_response.service] == ["x.Y"]


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("another-token-of-20-chars"),
        bearer(TOKEN + "x"),
        bearer(TOKEN[:-1]),
        (("authorization", TOKEN),),
        (("authorization", f"Basic {TOKEN}"),),
        bearer(TOKEN) + bearer(TOKEN),
        (("authorization-bin", f"Bearer {TOKEN}".encode()),),
    ],
    ids=["none", "other", "longer", "shorter", "bare", "basic", "twice", "binary"],
)
async def test_without_the_token_every_method_refuses(metadata: tuple) -> None:
    async with serving(Rank(), TOKEN) as channel:
        for method in (
            "/seamount.v1.WorkerService/Reserve",
            "/seamount.v1.WorkerService/Generate",
            "/grpc.health.v1.Health/Check",
            "/seamount.v1.WorkerService/NoSuchMethod",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_stream(method)(b"", metadata=metadata, timeout=5).read()
            assert isinstance(from_rpc_error(caught.value), Unauthenticated), method


async def test_with_the_token_methods_answer() -> None:
    async with serving(Rank(), TOKEN) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        assert await stub.Release(worker_pb2.ReleaseRequest(), metadata=bearer(TOKEN), timeout=5) is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/seamount.v1.WorkerService/NoSuchMethod")(b"", metadata=bearer(TOKEN), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_address_that_cannot_be_used_is_named() -> None:
    taken = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    port = listening(taken.add_insecure_port, "127.0.0.1:0", field="router.port")
    second = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for address in (f"127.0.0.1:{port}", "203.0.113.9:7"):
        with pytest.raises(InvalidArgument) as caught:
            listening(second.add_insecure_port, address, field="router.port")
        assert caught.value.field == "router.port"
        assert address in caught.value.message
    await taken.stop(None)
    await second.stop(None)
