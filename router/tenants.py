"""Who calls: API keys, tenants, and an interceptor that refuses every method to everyone it does not know.

The key file holds one key a line, as ``tenant:sha256``, with ``:admin`` behind it for operators; ``#`` begins comments.
A tenant may have several keys. The keys themselves are nowhere: ``seamount key`` makes one and prints both forms.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from seamount.wire.credentials import digest, presented_secret
from seamount.wire.errors import InvalidArgument, PermissionDenied, Unauthenticated
from seamount.wire.ids import TenantId
from seamount.wire.interceptors import Continuation, ErrorInterceptor, refusal

MAX_KEYS = 10_000
LOCAL_TENANT = TenantId("local")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PROBED_METHOD = "/grpc.health.v1.Health/Check"
"""Open to everyone: Kubernetes and load balancers have no key. It tells whether the router serves, no more."""
_TENANT_SERVICES = frozenset(
    {
        "seamount.v1.SessionService",
        "seamount.v1.InferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }
)
"""What every tenant may call. Anything else, known or not, takes the admin role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """An authenticated caller. The tenant never comes from a request's field."""

    tenant: TenantId
    admin: bool = False


LOCAL = Identity(tenant=LOCAL_TENANT, admin=True)
"""Everyone, where there is no key file: settings allow that on loopback only."""

_caller: ContextVar[Identity] = ContextVar("seamount_caller")


def caller() -> Identity:
    """Who called the method that runs in this context. Raises ``Unauthenticated`` outside of an intercepted call."""
    try:
        return _caller.get()
    except LookupError:
        raise Unauthenticated("no authenticated caller here", reason="NO_CALLER") from None


class ApiKeys:
    """Known keys, by hash. A lookup takes the same work for every key, known or not, and however many there are."""

    def __init__(self, entries: Iterable[tuple[bytes, Identity]]) -> None:
        """entries: (SHA-256 of a key, who shows it)."""
        # The index is by a keyed hash that changes with each start: its timing tells nothing about the stored hashes.
        self._index_key = secrets.token_bytes(32)
        self._by_index = {self._index(key_digest): (key_digest, who) for key_digest, who in entries}
        self._nobody = (secrets.token_bytes(32), None)

    def __len__(self) -> int:
        return len(self._by_index)

    def find(self, key: str) -> Identity | None:
        """Whose key it is; None for an unknown one."""
        shown = digest(key)
        stored, who = self._by_index.get(self._index(shown), self._nobody)
        return who if hmac.compare_digest(shown, stored) else None

    def _index(self, key_digest: bytes) -> bytes:
        return hmac.digest(self._index_key, key_digest, "sha256")


def read_api_keys(path: Path) -> ApiKeys:
    """Read a key file.

    Raises ``InvalidArgument``, naming the line, for one that cannot be read, is empty, has a malformed line or the same
    key twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(f"cannot read {path}: {type(error).__name__}") from None
    entries: dict[bytes, Identity] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        key_digest, who = _entry(text, f"{path}, line {number}")
        if key_digest in entries:
            raise _refused(f"{path}, line {number}: this key stands in the file twice")
        entries[key_digest] = who
    if not 1 <= len(entries) <= MAX_KEYS:
        raise _refused(f"{path} holds {len(entries)} keys; it must hold at least 1 and at most {MAX_KEYS}")
    return ApiKeys(entries.items())


def new_key(tenant: str, *, admin: bool = False) -> tuple[str, str]:
    """A fresh API key (256 random bits) and its line for the key file. Raises ``InvalidArgument`` for a bad tenant."""
    key = secrets.token_urlsafe(32)
    line = f"{tenant}:{digest(key).hex()}" + (":admin" if admin else "")
    _entry(line, "tenant")
    return key, line


def _entry(text: str, place: str) -> tuple[bytes, Identity]:
    tenant, *rest = text.split(":")
    if not _TENANT.fullmatch(tenant):
        raise _refused(
            f"{place}: a tenant has 1 to 64 letters, digits, '.', '_' or '-', and starts with a letter or digit"
        )
    if len(rest) not in (1, 2) or not re.fullmatch(r"[0-9a-f]{64}", rest[0]) or rest[1:] not in ([], ["admin"]):
        raise _refused(f"{place}: expected tenant:sha256 or tenant:sha256:admin, the hash as 64 hexadecimal digits")
    return bytes.fromhex(rest[0]), Identity(tenant=TenantId(tenant), admin=bool(rest[1:]))


def _refused(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="router.api_key_file", reason="INVALID_KEY_FILE")


class TenantInterceptor(grpc.aio.ServerInterceptor):
    """Deny by default: without a known key a call ends before any of it is read, on all methods but the probed one.

    keys: None = no key file, everyone is ``LOCAL``. Within the method ``caller()`` tells who it is.
    """

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys
        self._unknown = refusal(
            Unauthenticated(
                "send an API key of this deployment as the metadata 'authorization: Bearer <key>'", reason="UNKNOWN_KEY"
            )
        )
        self._no_admin = refusal(PermissionDenied("this method needs a key with the admin role", reason="NEEDS_ADMIN"))

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == PROBED_METHOD:
            return await continuation(handler_call_details)
        who = self._who(handler_call_details)
        if who is None:
            return self._unknown
        service = handler_call_details.method.removeprefix("/").rpartition("/")[0]
        if service not in _TENANT_SERVICES and not who.admin:
            return self._no_admin
        _caller.set(who)  # each call has a task, and so a context, of its own
        return await continuation(handler_call_details)

    def _who(self, details: grpc.HandlerCallDetails) -> Identity | None:
        if self._keys is None:
            return LOCAL
        shown = presented_secret(details.invocation_metadata)
        return None if shown is None else self._keys.find(shown)


def router_interceptors(keys: ApiKeys | None) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """What a router's server is built with, outermost first."""
    return (ErrorInterceptor(), TenantInterceptor(keys))
