"""The client of a router: ``AsyncClient``, and ``Client``, which is the same one run on a thread of its own.

    with Client("127.0.0.1:7411") as client:
        session = client.create_session()
        for event in client.run_turn(session.id, [user("Hello")]):
            print(event.content_delta.text, end="")

Every call has a deadline. A turn's stream that breaks goes on where it broke, at another router if need be. What may
safely be repeated is, a bounded number of times: reads, and writes under an idempotency key (made by the client where
none is given). Errors are those of ``seamount.wire.errors``, nothing else.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from seamount.router.client_async import DEFAULT_TIMEOUT_S, AsyncClient
from seamount.router.client_routers import Tls
from seamount.router.client_turn import Retries, Turn, TurnStream
from seamount.router.client_values import History, Sampling, system, tool_result, user
from seamount.router.context_policy import ContextPolicy
from seamount.router.messages import Message, Role, ThinkingMode, Tool, ToolCall
from seamount.v1 import events_pb2

__all__ = [
    "AsyncClient",
    "BlockingTurnStream",
    "Client",
    "ContextPolicy",
    "History",
    "Message",
    "Retries",
    "Role",
    "Sampling",
    "ThinkingMode",
    "Tls",
    "Tool",
    "ToolCall",
    "Turn",
    "TurnStream",
    "system",
    "tool_result",
    "user",
]

P = ParamSpec("P")
R = TypeVar("R")

_CLOSE_TIMEOUT_S = 5.0


class BlockingTurnStream:
    """``TurnStream`` for ``for``, ``with`` and ``result()``."""

    def __init__(self, stream: TurnStream, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._stream = stream
        self._run = run

    def __iter__(self) -> Iterator[events_pb2.TurnEvent]:
        return self

    def __next__(self) -> events_pb2.TurnEvent:
        event: events_pb2.TurnEvent | None = self._run(self._next())
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> events_pb2.TurnEvent | None:
        return await anext(self._stream, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def result(self) -> Turn:
        """The whole turn, after waiting for its end."""
        turn: Turn = self._run(self._stream.result())
        return turn

    def close(self) -> None:
        """End the stream; repeating it is harmless."""
        self._run(self._stream.aclose())


def _waiting(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.run(method(self.core, *args, **kwargs))

    return call


def _streaming(
    method: Callable[Concatenate[AsyncClient, P], TurnStream],
) -> Callable[Concatenate[Client, P], BlockingTurnStream]:
    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> BlockingTurnStream:
        async def start() -> TurnStream:
            return method(self.core, *args, **kwargs)

        return BlockingTurnStream(self.run(start()), self.run)

    return call


class Client:
    """May be used from several threads. Close it, or use it in ``with``; arguments are those of ``AsyncClient``."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: Retries | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="seamount-client", daemon=True)
        self._thread.start()

        async def start() -> AsyncClient:  # a channel belongs to the loop that it is made on
            return AsyncClient(address, api_key=api_key, tls=tls, timeout_s=timeout_s, retries=retries)

        try:
            self.core = self.run(start())
        except BaseException:
            self._stop()
            raise

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Wait for a coroutine on the client's own loop; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every call, the connection and the thread; repeating it is harmless."""
        if not self._loop.is_closed():
            self.run(self.core.close())
            self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._loop.close()

    create_session = _waiting(AsyncClient.create_session)
    update_session = _waiting(AsyncClient.update_session)
    get_session = _waiting(AsyncClient.get_session)
    get_history = _waiting(AsyncClient.get_history)
    list_sessions = _waiting(AsyncClient.list_sessions)
    delete_session = _waiting(AsyncClient.delete_session)
    fork_session = _waiting(AsyncClient.fork_session)
    run_turn = _streaming(AsyncClient.run_turn)
    resume_turn = _streaming(AsyncClient.resume_turn)
    cancel_turn = _waiting(AsyncClient.cancel_turn)
    report_tool_wait = _waiting(AsyncClient.report_tool_wait)
    generate = _streaming(AsyncClient.generate)
    tokenize = _waiting(AsyncClient.tokenize)
    list_models = _waiting(AsyncClient.list_models)
    list_pools = _waiting(AsyncClient.list_pools)
    list_ranks = _waiting(AsyncClient.list_ranks)
    list_rank_sessions = _waiting(AsyncClient.list_rank_sessions)
    drain_rank = _waiting(AsyncClient.drain_rank)
