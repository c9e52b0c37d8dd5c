"""Ids of sessions and tokens of their pages: what the server's secret is for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets

from seamount.router.session_replies import not_found
from seamount.router.store import Store
from seamount.wire.errors import DataLoss, InvalidArgument
from seamount.wire.ids import SessionId, TenantId

_SECRET_BYTES = 32
_TOKEN_MAC_BYTES = 16
_SESSION_ID = re.compile(r"ses_[a-z2-7]{32}")
_PLACE = re.compile(r"\d{15}/ses_[a-z2-7]{32}")


def random_name() -> str:
    """160 random bits, 32 characters of a-z 2-7."""
    return base64.b32encode(os.urandom(20)).decode().lower()


def is_session_id(session_id: str) -> bool:
    """Whether it has the form of one. Nothing else is ever looked up."""
    return _SESSION_ID.fullmatch(session_id) is not None


def check_session_id(session_id: str) -> None:
    """Raise ``NotFound``, as for any unknown session, where it isn't one."""
    if not is_session_id(session_id):
        raise not_found()


async def load_or_create_secret(store: Store) -> bytes:
    """The namespace's secret of 32 bytes, made by whoever comes first; for deployments that bring none of their own."""
    key = store.key("secret")
    await store.command("SET", key, secrets.token_bytes(_SECRET_BYTES), "NX")
    secret: bytes | None = await store.command("GET", key)
    if secret is None or len(secret) != _SECRET_BYTES:
        raise DataLoss(f"the server secret under {key} is missing or damaged; restore it", reason="SECRET_DAMAGED")
    return secret


class SessionNames:
    """Names under one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def session_id(self, tenant: TenantId, key: str) -> SessionId:
        """HMAC(secret, tenant, key), so that a retried creation finds its session; random for an empty key."""
        if not key:
            return SessionId(f"ses_{random_name()}")
        mac = self._mac("session", tenant, key)
        return SessionId(f"ses_{base64.b32encode(mac[:20]).decode().lower()}")

    def page_token(self, tenant: TenantId, place: str) -> str:
        """An opaque token for a place in the tenant's list, signed."""
        mac = self._mac("page", tenant, place)[:_TOKEN_MAC_BYTES]
        return base64.urlsafe_b64encode(mac + place.encode()).decode().rstrip("=")

    def opened_token(self, tenant: TenantId, token: str) -> str:
        """The place of a token. Raises ``InvalidArgument`` unless it was made here for this tenant."""
        try:
            opened = base64.b64decode(token.encode() + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
            place = opened[_TOKEN_MAC_BYTES:].decode()
        except (binascii.Error, UnicodeError):
            place = ""
        if not _PLACE.fullmatch(place) or not hmac.compare_digest(self.page_token(tenant, place), token):
            raise InvalidArgument(
                "page_token was not made by this service; pass next_page_token of the page before, or leave it empty",
                field="page_token",
            )
        return place

    def _mac(self, *parts: str) -> bytes:
        encoded = [part.encode() for part in parts]
        framed = b"".join(len(part).to_bytes(4, "little") + part for part in encoded)
        return hmac.new(self._secret, framed, hashlib.sha256).digest()
