"""A client's calls of whichever router answers: each with a deadline, repeated where that is safe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from seamount.router.client_routers import Router, Routers, Tls
from seamount.router.client_turn import Retries
from seamount.wire.credentials import bearer
from seamount.wire.errors import SeamountError, Unavailable, from_rpc_error

Response = TypeVar("Response")
Request = TypeVar("Request")
Request_contra = TypeVar("Request_contra", contravariant=True)
Response_co = TypeVar("Response_co", covariant=True)


class _Method(Protocol[Request_contra, Response_co]):
    def __call__(
        self, request: Request_contra, /, *, timeout: float, metadata: Sequence[tuple[str, str]]
    ) -> Awaitable[Response_co]: ...


class Calls:
    """Of one client. address, api_key, tls: as of ``AsyncClient``; timeout_s: of a call that answers once."""

    def __init__(
        self, address: str, *, api_key: str | None, tls: Tls | None, timeout_s: float, retries: Retries
    ) -> None:
        self.metadata = bearer(api_key)
        self.retries = retries
        self._timeout_s = timeout_s
        self._routers = Routers(address, tls)

    async def close(self) -> None:
        """End every call and the connections."""
        await self._routers.close()

    async def once(
        self,
        method: Callable[[Router], _Method[Request, Response]],
        request: Request,
        *,
        repeatable: bool = True,
        timeout_s: float | None = None,
    ) -> Response:
        """The answer. Raises typed errors. repeatable: whether it may be sent again where nobody knows what became of
        it; timeout_s: of each attempt, None = the client's."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        attempt = 1
        while True:
            router = self._routers.current
            try:
                await router.connect()
                return await method(router)(request, timeout=timeout_s, metadata=self.metadata)
            except grpc.RpcError as error:
                failure: SeamountError = from_rpc_error(error)
            except Unavailable as error:
                failure = error
            if isinstance(failure, Unavailable):
                self._routers.move_on(router)
            delay_s = self.retries.delay_s(failure, attempt) if repeatable else None
            if delay_s is None:
                raise failure
            attempt += 1
            await asyncio.sleep(delay_s)

    async def stream(
        self, begin: Callable[[Router], grpc.aio.UnaryStreamCall[Any, Response]]
    ) -> AsyncGenerator[Response, None]:
        """The answers of one attempt; it ends with the iterator. Raises typed errors."""
        router = self._routers.current
        try:
            await router.connect()
            call = begin(router)
            try:
                async for answer in call:
                    yield answer
            finally:
                call.cancel()
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if isinstance(failure, Unavailable):
                self._routers.move_on(router)
            raise failure from None
        except Unavailable:
            self._routers.move_on(router)
            raise
