"""Idle connections to the other routers: a killed one is dead at once, not after its counter stood still.

A connection says more than a counter only where it leads to that very process. Routers that share an address (one port
on one node) hold connections of another kind to each other (``near_links.py``), and the others leave them to their
counters: they need not notice first. So are those whose listener speaks TLS.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import grpc

from seamount.router.directory import Role
from seamount.router.near_links import NearLink, NearListener
from seamount.router.watcher import DirectoryWatcher
from seamount.wire.ids import RouterId

_LOOK_EVERY_S = 0.5
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.client_idle_timeout_ms", 2**31 - 1),  # a connection that was dropped for being idle would look broken
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(slots=True, kw_only=True)
class RouterLinks:
    """Of one router, to all others. ``start`` before use, ``stop`` at the end. address: its own; speaks_tls: of all."""

    router_id: RouterId
    address: str
    speaks_tls: bool
    watcher: DirectoryWatcher
    _links: dict[tuple[str, str], _Link | NearLink] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None
    _listener: NearListener | None = None

    async def start(self) -> None:
        self._listener = NearListener(self.router_id)
        await self._listener.start()
        self._task = asyncio.create_task(self._run(), name="router links")

    async def stop(self) -> None:
        """Close every connection. Harmless to repeat."""
        if self._listener is not None:
            await self._listener.stop()
        links, self._links = list(self._links.values()), {}
        tasks = [link.task for link in links] + ([self._task] if self._task is not None else [])
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._sync()
            await self.watcher.wait_changed(_LOOK_EVERY_S)

    def _sync(self) -> None:
        routers = self.watcher.peers(Role.ROUTER, alive_only=False)
        at_address = Counter(peer.record.address for peer in routers)
        wanted = {
            (peer.record.peer_id, peer.record.address)
            for peer in routers
            if peer.record.peer_id != self.router_id
            and (peer.record.address == self.address or (at_address[peer.record.address] == 1 and not self.speaks_tls))
        }
        for known in [known for known in self._links if known not in wanted]:
            self._links.pop(known).task.cancel()
        for peer_id, address in wanted - self._links.keys():
            near = address == self.address
            link = NearLink(peer_id, self.watcher) if near else _Link(peer_id, address, self.watcher)
            self._links[peer_id, address] = link


class _Link:
    """One connection, kept; a refused one after one that stood says that the router has died."""

    def __init__(self, peer_id: str, address: str, watcher: DirectoryWatcher) -> None:
        self.is_ready = False
        self.task = asyncio.create_task(self._hold(peer_id, address, watcher), name=f"link {peer_id}")

    async def _hold(self, peer_id: str, address: str, watcher: DirectoryWatcher) -> None:
        async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
            while True:
                state = channel.get_state(try_to_connect=True)
                if state is grpc.ChannelConnectivity.READY and not self.is_ready:
                    self.is_ready = True
                    watcher.mark_connected(peer_id)
                elif state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and self.is_ready:
                    self.is_ready = False
                    watcher.mark_broken(peer_id)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await channel.wait_for_state_change(state)
