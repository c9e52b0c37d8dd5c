"""The routers that a client knows: one connection at a time, the next router where one does not answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from seamount.v1 import admin_pb2_grpc, inference_pb2_grpc, session_pb2_grpc
from seamount.wire import limits
from seamount.wire.credentials import channel_credentials
from seamount.wire.errors import InvalidArgument, Unavailable

CONNECT_TIMEOUT_S = 1.0
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", -1),  # a long history may be larger than any one request
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A router that hangs keeps its connections: pings find it out, also under a stream that is rightly silent.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),  # a minute by default, whatever the keepalive's timeout is
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """ca_file: PEM authorities that sign the router's certificate (None = the usual ones); the pair: for mutual TLS."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None


class Router:
    """One router: its channel and stubs."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            credentials = channel_credentials(tls.ca_file, certificate_file=tls.certificate_file, key_file=tls.key_file)
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self.sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def connect(self) -> None:
        """Raises ``Unavailable``: a router that hangs still accepts connections for a while."""
        if self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Unavailable(
                f"no connection to {self.address} within {CONNECT_TIMEOUT_S:g} s: is a router running there?",
                reason="NO_CONNECTION",
                retry_after_s=0.1,
            ) from None

    async def close(self) -> None:
        await self._channel.close()


class Routers:
    """Belongs to one event loop."""

    def __init__(self, addresses: str, tls: Tls | None) -> None:
        """addresses: host:port, separated by commas. Raises ``InvalidArgument`` for none."""
        names = [name for part in addresses.split(",") if (name := part.strip())]
        if not names:
            raise InvalidArgument("give a router's host:port, or several separated by commas", field="address")
        self._routers = [Router(name, tls) for name in names]
        self._current = 0

    @property
    def current(self) -> Router:
        """The one that calls go to; connect before a call."""
        return self._routers[self._current]

    def move_on(self, failed: Router) -> None:
        """It does not answer: the next call goes to the next router, unless another call has moved on already."""
        if self.current is failed:
            self._current = (self._current + 1) % len(self._routers)

    async def close(self) -> None:
        """End every call and every connection."""
        await asyncio.gather(*(router.close() for router in self._routers))
