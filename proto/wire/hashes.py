"""Chained page hashes: the identity of a full page of tokens and everything before it (DESIGN: caches)."""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections.abc import Sequence

from seamount.wire.ids import TenantId

PAGE_SIZE = 64
"""Tokens in a page."""
SALT_BYTES = 32
"""Of ``tenant_salt``."""
ROOT_BYTES = 32
"""Of ``root_hash``."""


def tenant_salt(server_secret: bytes, tenant: TenantId) -> bytes:
    """HMAC-SHA256(server secret, tenant): 32 bytes. Chosen by the server, so no tenant can name another's pages."""
    return hmac.new(server_secret, tenant.encode(), hashlib.sha256).digest()


def root_hash(salt: bytes, fingerprint: str, layout: str) -> bytes:
    """The parent of every first page: one for each (tenant salt, model fingerprint, cache layout)."""
    parts = (salt, fingerprint.encode(), layout.encode())
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()


def page_hashes(parent: bytes, token_ids: Sequence[int], page_size: int = PAGE_SIZE) -> list[bytes]:
    """SHA-256(parent, ids) of each *full* page of ``token_ids``; ids are packed as little-endian uint32.

    Returns ``len(token_ids) // page_size`` hashes of 32 bytes; empty for fewer tokens than a page.
    """
    packed = array("I", token_ids)
    if packed.itemsize != 4:  # pragma: no cover - the C standard allows it, no supported platform does it
        raise RuntimeError("array('I') is not 32 bits wide on this platform")
    data = memoryview(packed).cast("B")
    hashes: list[bytes] = []
    step = page_size * 4
    for start in range(0, len(data) - step + 1, step):
        parent = hashlib.sha256(parent + data[start : start + step]).digest()
        hashes.append(parent)
    return hashes
