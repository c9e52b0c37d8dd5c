"""Connections between routers of one address: they share a port, so a connection to it may lead to either of them.

Each router listens on a socket of its own name in Linux's abstract namespace, which processes of one network namespace
share: no port, no file, nothing is served there. It is gone with its process, and so are the connections to it.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress

from seamount.router.watcher import DirectoryWatcher
from seamount.wire.ids import RouterId

_RETRY_S = 0.5


class NearListener:
    """What other routers of this address hold connections to. ``start`` before use, ``stop`` at the end."""

    def __init__(self, router_id: RouterId) -> None:
        self._router_id = router_id
        self._server: asyncio.Server | None = None
        self._held: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """On systems without abstract sockets: nothing, and routers are judged by their counters."""
        if sys.platform == "linux":
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(_name(self._router_id))
            self._server = await asyncio.start_unix_server(self._hold, sock=listening)

    async def stop(self) -> None:
        """End all connections. Harmless to repeat."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for writer in list(self._held):
            writer.close()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._held.add(writer)
        try:
            with suppress(ConnectionError):
                await reader.read(1)  # nobody says anything: it ends with either process
        finally:
            self._held.discard(writer)
            writer.close()


class NearLink:
    """One connection, kept; one that ends after it stood says that the router has died."""

    def __init__(self, peer_id: str, watcher: DirectoryWatcher) -> None:
        self.is_ready = False
        self.task = asyncio.create_task(self._keep(peer_id, watcher), name=f"link {peer_id}")

    async def _keep(self, peer_id: str, watcher: DirectoryWatcher) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await _connected(_name(RouterId(peer_id)))
                try:
                    self.is_ready = True
                    watcher.mark_connected(peer_id)
                    with suppress(ConnectionError):
                        await reader.read(1)
                finally:
                    writer.close()
                    self.is_ready = False
                watcher.mark_broken(peer_id)
            await asyncio.sleep(_RETRY_S)


async def _connected(name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    client = socket.socket(socket.AF_UNIX)  # uvloop takes no abstract names, but takes sockets
    try:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, name)
        return await asyncio.open_unix_connection(sock=client)
    except BaseException:
        client.close()
        raise


def _name(router_id: RouterId) -> str:
    return f"\0seamount/{router_id}"
