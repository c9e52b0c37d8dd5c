"""Server interceptors that routers and ranks share: errors to Status, malformed input, the token between them."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Never

import grpc
from google.protobuf.message import DecodeError

from seamount.wire.credentials import digest, presented_secret
from seamount.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    SeamountError,
    Unauthenticated,
    defect,
    trailing_metadata,
)
from seamount.wire.protocol import check_protocol

_log = logging.getLogger("seamount.rpc")

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Context = Any  # grpc.aio.ServicerContext; generic over messages that are bytes here
Parse = Callable[[bytes], Any]


def listening(add_port: Callable[[str], int], address: str, *, field: str) -> int:
    """The port that a server listens on. Raises ``InvalidArgument`` where the address cannot be used."""
    try:
        port = add_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InvalidArgument(
            f"cannot listen on {address}: it is taken, or no address of this machine; set {field} to another",
            field=field,
            reason="ADDRESS_UNUSABLE",
        )
    return port


async def abort(context: Context, error: SeamountError) -> Never:
    """End the call with the error's code, message and Status details."""
    await context.abort(error.code, error.message, trailing_metadata(error))
    raise AssertionError("context.abort returned")  # pragma: no cover - it always raises


def refusal(error: SeamountError) -> Any:
    """A method handler, good for every kind of method, that answers with ``error`` and reads nothing of the request."""

    async def refuse(_requests: object, context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses, on every method, calls without the token that routers and ranks share."""

    def __init__(self, token: str) -> None:
        self._digest = digest(token)
        self._refusal = refusal(
            Unauthenticated(
                "this method needs the token that routers and ranks share: see router.worker_token_file",
                reason="WRONG_TOKEN",
            )
        )

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        shown = presented_secret(handler_call_details.invocation_metadata)
        if shown is None or not hmac.compare_digest(digest(shown), self._digest):
            return self._refusal
        return await continuation(handler_call_details)


class ProtocolInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of Seamount's own services from callers that speak another version of them."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method.startswith("/seamount."):
            try:
                check_protocol(handler_call_details.invocation_metadata)
            except FailedPrecondition as error:
                return refusal(error)
        return await continuation(handler_call_details)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Outermost: no exception of a method reaches gRPC.

    A ``SeamountError`` becomes its Status; any other exception INTERNAL, logged by type and place; requests that are no
    message of the method's type INVALID_ARGUMENT; cancellation passes through. One log line a call.
    """

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = await continuation(handler_call_details)
        return None if method is None else _guarded(method, handler_call_details.method)


def _guarded(method: Any, name: str) -> Any:
    # Messages come and go as bytes here: to malformed ones gRPC itself would answer INTERNAL.
    parse = _parser(method.request_deserializer)

    async def unary_unary(request: bytes, context: Context) -> Any:
        return await _watched(name, context, lambda: method.unary_unary(parse(request), context))

    async def unary_stream(request: bytes, context: Context) -> None:
        await _watched(name, context, lambda: _written(method.unary_stream, parse(request), context))

    async def stream_unary(requests: AsyncIterator[bytes], context: Context) -> Any:
        return await _watched(name, context, lambda: method.stream_unary(_each(parse, requests), context))

    async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> None:
        await _watched(name, context, lambda: _written(method.stream_stream, _each(parse, requests), context))

    # gRPC's own annotations know synchronous methods only.
    make: Any
    make, behaviour = {
        (False, False): (grpc.unary_unary_rpc_method_handler, unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream_stream),
    }[bool(method.request_streaming), bool(method.response_streaming)]
    return make(behaviour, None, method.response_serializer)


def _parser(deserializer: Parse | None) -> Parse:
    def parse(received: bytes) -> Any:
        try:
            return received if deserializer is None else deserializer(received)
        except (DecodeError, ValueError, RecursionError):
            raise InvalidArgument(
                f"the request ({len(received)} bytes) is not a message of this method's type: compare the versions of "
                "client and server",
                field="request",
                reason="MALFORMED_MESSAGE",
            ) from None

    return parse


async def _each(parse: Parse, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield parse(request)


async def _written(behaviour: Any, request: Any, context: Context) -> None:
    if inspect.iscoroutinefunction(behaviour):  # it writes to the context itself
        await behaviour(request, context)
        return
    async with aclosing(behaviour(request, context)) as responses:  # closed at once when the client goes
        async for response in responses:
            await context.write(response)


async def _watched(name: str, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
    started = time.monotonic()
    outcome = grpc.StatusCode.OK
    try:
        return await run()
    except asyncio.CancelledError:
        outcome = grpc.StatusCode.CANCELLED
        raise
    except grpc.aio.AbortError:
        outcome = context.code()
        raise
    except SeamountError as error:
        outcome = error.code
        await abort(context, error)
    except Exception:
        outcome = grpc.StatusCode.INTERNAL
        _log.exception("rpc_failed", extra={"method": name})
        await abort(context, defect())
    finally:
        extra = {"method": name, "code": getattr(outcome, "name", str(outcome)), "s": time.monotonic() - started}
        _log.info("rpc_finished", extra=extra)


def rank_interceptors(token: str | None) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """What a rank's server is built with, outermost first. token: None = none asked for (loopback only)."""
    common = (ErrorInterceptor(), ProtocolInterceptor())
    return common if token is None else (*common, TokenInterceptor(token))
