"""Bearer secrets in call metadata, secrets in files, TLS from PEM files: the same on both sides of gRPC."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import grpc

from seamount.wire.errors import InvalidArgument

MIN_SECRET_CHARACTERS = 16
MAX_SECRET_CHARACTERS = 512
_HEADER = "authorization"
_SCHEME = "bearer "

CallMetadata = tuple[tuple[str, str], ...]


def bearer(secret: str | None) -> CallMetadata:
    """The metadata that shows ``secret`` to the callee; empty for None."""
    return () if secret is None else ((_HEADER, f"Bearer {secret}"),)


def presented_secret(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The bearer secret of a call's metadata; None where there is none, several, or one of another scheme."""
    values = [value for key, value in metadata or () if key == _HEADER]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
        return None
    return values[0][len(_SCHEME) :].strip()


def digest(secret: str) -> bytes:
    """SHA-256 of a secret: what is stored and compared instead of it. 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def read_secret(path: Path, *, field: str) -> str:
    """The secret that is the whole content of a file, surrounding white space cut off.

    Raises ``InvalidArgument`` (of ``field``) for a file that cannot be read, or holds anything but 16 to 512 printable
    ASCII characters.
    """
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{field}: cannot read {path}: {type(error).__name__}", field=field) from None
    if not MIN_SECRET_CHARACTERS <= len(secret) <= MAX_SECRET_CHARACTERS or not secret.isprintable() or " " in secret:
        raise InvalidArgument(
            f"{field}: {path} must hold one secret of {MIN_SECRET_CHARACTERS} to {MAX_SECRET_CHARACTERS} printable "
            "ASCII characters, such as the output of: openssl rand -hex 32",
            field=field,
        )
    return secret


def server_credentials(
    certificate_file: Path, key_file: Path, *, client_ca_file: Path | None = None
) -> grpc.ServerCredentials:
    """TLS of a listener; with ``client_ca_file`` clients must show a certificate that those authorities signed.

    Raises ``InvalidArgument`` for a file that cannot be read.
    """
    pair = (_pem(key_file, "tls_key_file"), _pem(certificate_file, "tls_certificate_file"))
    authorities = None if client_ca_file is None else _pem(client_ca_file, "client_ca_file")
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )


def channel_credentials(
    ca_file: Path | None, *, certificate_file: Path | None = None, key_file: Path | None = None
) -> grpc.ChannelCredentials:
    """TLS of a channel. ca_file: PEM authorities of the server (None = those of gRPC); the pair: for mutual TLS.

    Raises ``InvalidArgument`` for a file that cannot be read, or half a pair.
    """
    if (certificate_file is None) != (key_file is None):
        raise InvalidArgument("a client certificate needs its key, and a key its certificate", field="tls_key_file")
    return grpc.ssl_channel_credentials(
        root_certificates=None if ca_file is None else _pem(ca_file, "tls_ca_file"),
        private_key=None if key_file is None else _pem(key_file, "tls_key_file"),
        certificate_chain=None if certificate_file is None else _pem(certificate_file, "tls_certificate_file"),
    )


def _pem(path: Path, field: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{field}: cannot read {path}: {error.strerror}", field=field) from None
    if b"-----BEGIN" not in content:
        raise InvalidArgument(f"{field}: {path} is not a PEM file", field=field)
    return content
