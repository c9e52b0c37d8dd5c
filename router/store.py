"""Redis, seen from a router: typed errors, bounded retries, the Function library of ``functions.lua``.

Every mutation goes through a Function that is idempotent under its key, nonce or epoch, so whatever failed in doubt is
simply sent again. Keys begin with a namespace, which lets several systems share one server. One primary is assumed:
the keys of one call always share a hash tag, the client itself knows no cluster redirections.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from seamount.router.store_line import Command, Line
from seamount.wire.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    SeamountError,
    Unavailable,
)

LIBRARY = "seamount_1"
MIN_MAJOR_VERSION = 7
RETRY_AFTER_S = 1.0
FULL_RETRY_AFTER_S = 5.0

_CODE = (Path(__file__).parent / "functions.lua").read_text("utf-8")
_NAMESPACE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Reply = list[Any]
"""A Function's answer: nested lists of bytes and ints, the first element a constant name."""
Keys = Sequence[str]
Arguments = Sequence[bytes | str | int]
OnAttempt = Callable[[str, float, bool], None]
"""Told of each attempt: name of the Function (``plain`` for other commands), seconds, whether it was answered."""


class _Busy(Exception):
    """The server is there but cannot answer now: a script blocks it, its disk is full, its replicas are away."""


_RETRIED = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.BusyLoadingError,
    redis_errors.InvalidResponse,
    redis_errors.ReadOnlyError,  # a demoted primary: the next connection finds the new one
    _Busy,
    TimeoutError,  # of one attempt as a whole
)
_PLAIN = "plain"
_BUSY_PREFIXES = ("BUSY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN", "LOADING", "READONLY")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What the server said of itself when the store was opened."""

    version: str
    append_only: bool
    eviction_policy: str


class Store:
    """One connection pool to one Redis. Opened by ``open``, closed by ``close``; bound to one event loop."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        *,
        namespace: str,
        command_timeout_s: float,
        retry_budget_s: float,
        facts: ServerFacts,
        on_attempt: OnAttempt | None = None,
    ) -> None:
        self._client = client
        self._line = Line(client.connection_pool)
        self._on_attempt = on_attempt
        self._command_timeout_s = command_timeout_s
        self._retry_budget_s = retry_budget_s
        self.namespace = namespace
        self.facts = facts

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        namespace: str = "seamount",
        command_timeout_s: float = 1.0,
        retry_budget_s: float = 5.0,
        max_connections: int = 64,
        on_attempt: OnAttempt | None = None,
    ) -> Store:
        """Connect, check the server, load the Functions.

        command_timeout_s: one try, connecting included; retry_budget_s: all tries, unless a call brings its own.
        Raises ``InvalidArgument`` for a malformed URL or namespace, ``FailedPrecondition`` for a server that is too
        old or may evict sessions, ``Unavailable`` where nobody answers.
        """
        if not _NAMESPACE.fullmatch(namespace):
            raise InvalidArgument(
                "the store's namespace must be 1 to 64 characters of A-Z a-z 0-9 _ . : -", field="namespace"
            )
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=max_connections,
                timeout=command_timeout_s,
                socket_timeout=command_timeout_s,
                socket_connect_timeout=command_timeout_s,
                retry=Retry(NoBackoff(), 0),  # retried here, within one budget
                protocol=2,
                driver_info=None,
            )
        except ValueError as error:
            raise InvalidArgument(
                "the Redis URL is malformed; give redis://, rediss:// or unix://", field="redis_url"
            ) from error
        client = redis.asyncio.Redis.from_pool(pool)
        unchecked = ServerFacts(version="", append_only=False, eviction_policy="")
        store = cls(
            client,
            namespace=namespace,
            command_timeout_s=command_timeout_s,
            retry_budget_s=retry_budget_s,
            facts=unchecked,
            on_attempt=on_attempt,
        )
        try:
            store.facts = check_server(await store.command("INFO", "everything"))
            await store._load_library()
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Close every connection. Harmless when repeated."""
        await self._line.close()
        await self._client.aclose()

    def key(self, *parts: str) -> str:
        """``namespace:part:part``."""
        return ":".join((self.namespace, *parts))

    async def function(
        self, name: str, keys: Keys, arguments: Arguments, *, read_only: bool = False, budget_s: float | None = None
    ) -> Any:
        """Call ``seamount_1_<name>``; loads the library where the server has lost it (a new, empty server).

        Raises ``Unavailable`` (reason STORE_UNAVAILABLE: the outcome is unknown, call again with the same
        arguments), ``ResourceExhausted`` (STORE_FULL), ``DataLoss`` (a key holds something else).
        """
        command = called(name, keys, arguments, read_only=read_only)
        return await self._retried(lambda: self._with_library(lambda: self._send(command)), budget_s, name)

    async def command(self, *arguments: bytes | str | int | float, budget_s: float | None = None) -> Any:
        """One plain command that may be repeated harmlessly; errors as ``function``."""
        return await self._retried(lambda: self._send(arguments), budget_s)

    async def pipeline(self, commands: Sequence[Command], *, budget_s: float | None = None) -> list[Any]:
        """Several repeatable commands, also those of ``called``, in order, in one round trip, without a transaction;
        ``[]`` for none. Errors as ``function``: of the first that failed, the others have been done all the same."""
        if not commands:
            return []
        about = _first_function(commands)
        return await self._retried(lambda: self._with_library(lambda: self._send_all(commands)), budget_s, about)

    async def functions(self, commands: Sequence[Command]) -> list[Any]:
        """As ``pipeline``, of Functions alone (``called``), tried once, on a connection kept for this: for callers that
        come many times a second and repeat what failed themselves."""
        try:
            return await self._attempt(
                lambda: self._with_library(lambda: self._line.exchange(commands)), _first_function(commands)
            )
        except _RETRIED as error:
            raise _unavailable() from error

    async def _with_library(self, call: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await call()
        except redis_errors.ResponseError as error:
            if "Function not found" not in str(error):
                raise
        await self._load_library_once()
        return await call()

    async def _send_all(self, commands: Sequence[Command]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for arguments in commands:
                pipe.execute_command(*arguments)
            replies: list[Any] = await pipe.execute(raise_on_error=False)  # it would put the command before the error
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _send(self, arguments: Sequence[bytes | str | int | float]) -> Any:
        return await self._client.execute_command(*arguments)  # type: ignore[no-untyped-call]

    async def _retried(self, call: Callable[[], Awaitable[_T]], budget_s: float | None, operation: str = _PLAIN) -> _T:
        budget = self._retry_budget_s if budget_s is None else budget_s
        retrying = AsyncRetrying(
            stop=stop_after_delay(budget),
            wait=wait_random_exponential(multiplier=0.02, max=0.5),
            retry=retry_if_exception_type(_RETRIED),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, call, operation)
        except _RETRIED as error:
            raise _unavailable() from error

    async def _attempt(self, call: Callable[[], Awaitable[_T]], operation: str) -> _T:
        began = time.monotonic()
        try:
            reply = await self._tried(call)
        except _RETRIED:
            self._told(operation, began, False)
            raise
        self._told(operation, began, True)
        return reply

    async def _tried(self, call: Callable[[], Awaitable[_T]]) -> _T:
        try:
            with _kept_cancellation():
                async with asyncio.timeout(self._command_timeout_s):
                    return await call()
        except RuntimeError as error:  # uvloop's word for a connection that was reset while nobody used it
            if "handler is closed" not in str(error):
                raise
            raise redis_errors.ConnectionError(str(error)) from error
        except (redis_errors.AuthenticationError, redis_errors.NoPermissionError) as error:
            raise _refused_access(error) from error
        except redis_errors.ResponseError as error:
            if str(error).startswith(_BUSY_PREFIXES):
                raise _Busy(str(error)) from error
            raise _typed(error) from error

    def _told(self, operation: str, began: float, is_answered: bool) -> None:
        if self._on_attempt is not None:
            self._on_attempt(operation, time.monotonic() - began, is_answered)

    async def _load_library(self) -> None:
        await self._retried(self._load_library_once, None)

    async def _load_library_once(self) -> None:
        listed = await self._send(("FUNCTION", "LIST", "LIBRARYNAME", LIBRARY, "WITHCODE"))
        if _CODE.encode() in _flattened(listed):
            return
        await self._send(("FUNCTION", "LOAD", "REPLACE", _CODE))


def called(name: str, keys: Keys, arguments: Arguments, *, read_only: bool = False) -> tuple[bytes | str | int, ...]:
    """The command that calls a Function, for ``Store.pipeline``."""
    return ("FCALL_RO" if read_only else "FCALL", f"{LIBRARY}_{name}", len(keys), *keys, *arguments)


def _first_function(commands: Sequence[Command]) -> str:
    """The Function that the commands are about; ``plain`` where none of them calls one."""
    for command in commands:
        if command[0] in ("FCALL", "FCALL_RO"):
            return str(command[1]).removeprefix(f"{LIBRARY}_")
    return _PLAIN


@contextmanager
def _kept_cancellation() -> Iterator[None]:
    """Raise the cancellation that came during the block, should the block have lost it: before Python 3.12
    ``asyncio.wait_for``, which the client uses for every command, drops one that comes together with its result."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


def check_server(facts: dict[str, Any]) -> ServerFacts:
    """What INFO says, if the server will do; else ``FailedPrecondition`` that names what it is and the remedy."""
    version = str(facts.get("redis_version", "0"))
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) < MIN_MAJOR_VERSION:
        raise FailedPrecondition(
            f"the Redis given by URL is version {version}; version {MIN_MAJOR_VERSION} or newer, or Valkey, is needed "
            "(Functions): upgrade it, or set SEAMOUNT_REDIS_URL to another",
            reason="REDIS_TOO_OLD",
            metadata={"version": version},
        )
    policy = str(facts.get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        raise FailedPrecondition(
            f"the Redis given by URL has maxmemory-policy {policy}, which deletes sessions when memory is short: "
            "set it to noeviction",
            reason="REDIS_EVICTS",
        )
    append_only = str(facts.get("aof_enabled", "0")) == "1"
    if not append_only:
        _log.warning("store_not_durable", extra={"remedy": "appendonly yes, appendfsync always"})
    return ServerFacts(version=version, append_only=append_only, eviction_policy=policy)


def _flattened(value: Any) -> set[bytes]:
    if isinstance(value, (list, tuple)):
        return set().union(*map(_flattened, value))
    if isinstance(value, dict):
        return _flattened([*value.keys(), *value.values()])
    return {value} if isinstance(value, bytes) else set()


def _unavailable() -> Unavailable:
    return Unavailable(
        "the session store does not answer; what was asked may still take effect: retry under the same key",
        reason="STORE_UNAVAILABLE",
        retry_after_s=RETRY_AFTER_S,
    )


def _refused_access(error: Exception) -> FailedPrecondition:
    return FailedPrecondition(
        f"the session store refuses this router ({type(error).__name__}): check the user and password of the URL, and "
        "that the user may call Functions",
        reason="STORE_ACCESS",
    )


def _typed(error: redis_errors.ResponseError) -> SeamountError:
    text = str(error)
    if isinstance(error, redis_errors.OutOfMemoryError) or text.startswith("OOM"):
        return ResourceExhausted(
            "the session store's memory is full; delete sessions or raise its maxmemory",
            reason="STORE_FULL",
            retry_after_s=FULL_RETRY_AFTER_S,
        )
    if "WRONGTYPE" in text:
        return DataLoss("a key of the session store holds another type than it should", reason="STORE_DAMAGED")
    return Internal(f"the session store refused a command: {text.partition(' ')[0]}", reason="STORE_PROTOCOL")
