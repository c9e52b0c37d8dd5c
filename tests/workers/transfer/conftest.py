"""Real ranks without an engine: caches, planes, a gRPC server and its transfers, here or in a process of their own."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from seamount.kernels.layout import CacheLayout, CachePlanes, gather_slots
from seamount.v1 import transfer_pb2_grpc
from seamount.wire.ids import RankId
from seamount.wire.interceptors import rank_interceptors
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.transfer.transfer import Transfer

torch.set_num_threads(1)
TOKEN = "a-token-of-the-tests"
SALT = bytes(32)


def layout_of(name: str, dtype: torch.dtype = torch.float32) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=128, qk_rope_head_dim=16, index_head_dim=64, dtype=dtype)


@dataclass
class Rank:
    rank_id: RankId
    address: str
    transfer: Transfer
    reservations: Reservations
    planes: CachePlanes
    layout: CacheLayout

    def reserve(
        self, token_ids: list[int], *, epoch: int = 1, turn_id: str = "turn", session_id: str = "session"
    ) -> Reservation:
        return self.reservations.reserve(
            session_id=session_id,
            turn_id=turn_id,
            epoch=epoch,
            attempt=1,
            salt=SALT,
            token_ids=token_ids,
            time_to_live_s=60,
        )

    def rows(self, reservation: Reservation, first: int, end: int) -> list[torch.Tensor]:
        """The bytes of these positions, latent and index of every layer."""
        at = torch.tensor(self.reservations.slots(reservation.id, first, end))
        found = [gather_slots(plane, at, self.layout, "latent") for plane in self.planes.latent]
        return found + [gather_slots(plane, at, self.layout, "index") for plane in self.planes.index]

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for plane in (*self.planes.latent, *self.planes.index):
            plane.copy_(torch.randint(256, plane.shape, dtype=torch.uint8, generator=generator))


async def start_rank(stack: AsyncExitStack, name: str, **options: Any) -> Rank:
    layout = options.pop("layout", None) or layout_of("fp8")
    num_layers, num_pages = options.pop("num_layers", 3), options.pop("num_pages", 64)
    arguments = {"fingerprint": "model", "worker_token": TOKEN, "timeout_s": 4.0} | options
    reservations = Reservations(num_pages=num_pages, fingerprint=arguments["fingerprint"], layout=layout.signature)
    planes = layout.allocate(num_layers, num_pages)
    server = grpc.aio.server(interceptors=rank_interceptors(TOKEN))
    transfer = Transfer(
        rank_id=RankId(name), host="127.0.0.1", reservations=reservations, planes=planes, layout=layout, **arguments
    )
    reservations.on_abort = transfer.abort
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(transfer.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def stop() -> None:
        await transfer.close()
        await server.stop(0)

    stack.push_async_callback(stop)
    return Rank(RankId(name), f"127.0.0.1:{port}", transfer, reservations, planes, layout)


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


@pytest.fixture
async def new_rank() -> AsyncIterator[Callable[..., Awaitable[Rank]]]:
    """Starts ranks in this process; afterwards every reservation must be releasable and all pages come back."""
    ranks: list[Rank] = []
    async with AsyncExitStack() as stack:

        async def start(name: str, **options: Any) -> Rank:
            ranks.append(await start_rank(stack, name, **options))
            return ranks[-1]

        yield start
    for rank in ranks:
        for reservation in list(rank.reservations._live.by_id.values()):
            rank.reservations.release(reservation.id)
        rank.reservations.check_invariants()
        state = rank.reservations.state()
        assert (state.num_reservations, state.num_free + state.num_cached) == (0, state.num_pages)


@dataclass
class Peer:
    """A rank in a process of its own (``peer_rank.py``), whose one reservation is full of known bytes."""

    process: subprocess.Popen[str]
    rank_id: RankId
    address: str
    reservation_id: str

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def spawn(*arguments: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("peer_rank.py")), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
async def new_peer() -> AsyncIterator[Callable[..., Awaitable[Peer]]]:
    peers: list[Peer] = []

    async def start(num_tokens: int, *, present: int, seed: int) -> Peer:
        process = await asyncio.to_thread(spawn, num_tokens, present, seed)
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        address, reservation_id = line.split()
        peers.append(Peer(process, RankId("peer"), address, reservation_id))
        return peers[-1]

    yield start
    for peer in peers:
        peer.process.kill()
        peer.process.wait()
        for pipe in (peer.process.stdin, peer.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def layouts() -> Callable[..., CacheLayout]:
    return layout_of
