"""A killed router is dead at once, by the connection that was held to it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import pytest

from seamount.router.directory import Liveness, PeerRecord, Role, new_instance
from seamount.router.near_links import NearListener
from seamount.router.router_links import RouterLinks
from seamount.router.watcher import DirectoryWatcher, Registration
from seamount.wire.ids import RouterId


async def listener() -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def registered(system: Any, peer_id: str, address: str) -> Registration:
    record = PeerRecord(
        peer_id=peer_id, role=Role.ROUTER, address=address, version="0", process_id=1, instance=new_instance()
    )
    registration = Registration(system.directory, record, interval_s=0.1)
    await registration.start()
    return registration


def links_of(router_id: str, address: str, watcher: DirectoryWatcher) -> RouterLinks:
    return RouterLinks(router_id=RouterId(router_id), address=address, speaks_tls=False, watcher=watcher)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
async def test_a_killed_router_of_the_same_address_is_dead_at_once(system: Any) -> None:
    address = "127.0.0.1:1"
    registrations = [await registered(system, name, address) for name in ("router-b", "router-c")]  # they beat on
    watcher = DirectoryWatcher(system.directory, dead_after_s=30.0, poll_interval_s=0.05)
    await watcher.start()
    here = links_of("router-a", address, watcher)
    script = (
        "import socket, time; s = socket.socket(socket.AF_UNIX); "
        "s.bind('\\0seamount/router-b'); s.listen(); time.sleep(60)"
    )
    peer = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    other = NearListener(RouterId("router-c"))
    try:
        await here.start()
        await other.start()
        await system.until(lambda: [link.is_ready for link in here._links.values()] == [True, True])
        peer.kill()
        await system.until(lambda: watcher.liveness("router-b") is Liveness.DEAD)
        assert watcher.liveness("router-c") is Liveness.ALIVE
    finally:
        await here.stop()
        await other.stop()
        await watcher.stop()
        for registration in registrations:
            await registration.stop()
        await peer.wait()


@pytest.mark.parametrize("shares_its_address", [False, True])
async def test_a_router_whose_port_is_closed_is_dead_at_once(system: Any, shares_its_address: bool) -> None:
    server, address = await listener()
    names = ["router-b", "router-c"] if shares_its_address else ["router-b"]
    registrations = [await registered(system, name, address) for name in names]  # they beat on
    watcher = DirectoryWatcher(system.directory, dead_after_s=30.0, poll_interval_s=0.05)
    await watcher.start()
    links = links_of("router-a", "127.0.0.1:1", watcher)
    await links.start()
    try:
        await system.until(lambda: watcher.liveness("router-b") is Liveness.ALIVE)
        if shares_its_address:
            assert not links._links, "a connection there may lead to either"
            return
        await system.until(lambda: any(link.is_ready for link in links._links.values()))
        await server.stop(0)
        await system.until(lambda: watcher.liveness("router-b") is Liveness.DEAD)
        again = grpc.aio.server()
        assert again.add_insecure_port(address)
        await again.start()
        await system.until(lambda: watcher.liveness("router-b") is Liveness.ALIVE)
        await again.stop(0)
    finally:
        await links.stop()
        await watcher.stop()
        for registration in registrations:
            await registration.stop()
        await server.stop(0)
