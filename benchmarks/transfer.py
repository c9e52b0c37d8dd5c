"""Pull and push of cache entries between two rank processes, against a bare gloo send between the same two.

Each process has what a rank has for this: paged caches, reservations, a gRPC server with the transfer service. Entries
are random bytes, and what arrived is compared once in each case. A push here sends entries that are all computed
already: in service it overlaps with the prefill that computes them.

``limit``: the same number of bytes in one tensor over a gloo group of the same kind, until one byte has come back.
``first_ms``: from the call until the first token's entries stand in the receiver's pages, verified: the announcement
over gRPC, then one frame. Links are open already, as after the first turn between two ranks.

    python -m benchmarks.transfer                                 the table of docs/performance.md, in a minute
    python -m benchmarks.transfer --tokens 1024 --repeats 3       a quick look
    python -m benchmarks.transfer --layout fp8 --json             one layout, as JSON lines
"""

from __future__ import annotations

import asyncio
import itertools
import json as json_lines
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Annotated, Any

import grpc
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks._report import Row, load_average, publish
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, CachePlanes, gather_slots
from seamount.v1 import transfer_pb2_grpc
from seamount.wire.ids import RankId
from seamount.wire.interceptors import rank_interceptors
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.model.random_checkpoint import GEOMETRIES
from seamount.workers.transfer.frames import MAX_FRAME_TOKENS
from seamount.workers.transfer.rendezvous import Rendezvous, build_group
from seamount.workers.transfer.transfer import Transfer

TIMEOUT_S = 60.0
HOST = "127.0.0.1"
LAYOUTS = ("fp8", "bf16", "exact")
POLL_S = 0.0002
WARM_REPEATS = 2
_WAIT = timedelta(seconds=TIMEOUT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A rank without an engine, in this process."""

    address: str
    transfer: Transfer
    reservations: Reservations
    planes: CachePlanes
    layout: CacheLayout

    def reserve(self, number: int, num_tokens: int) -> Reservation:
        """A fresh reservation: the salt keeps it from finding what earlier ones left in the cache."""
        return self.reservations.reserve(
            session_id=f"session-{number}",
            turn_id="turn",
            epoch=1,
            attempt=1,
            salt=number.to_bytes(32, "little"),
            token_ids=list(range(num_tokens + 1)),
            time_to_live_s=TIMEOUT_S,
        )

    def checksum(self, reservation: Reservation, num_tokens: int) -> list[int]:
        """A number for each plane that tells whether two ranks hold the same entries in the same order."""
        at = torch.tensor(self.reservations.slots(reservation.id, 0, num_tokens))
        factors = torch.arange(num_tokens).unsqueeze(1) * 2 + 1
        rows = [gather_slots(plane, at, self.layout, "latent") for plane in self.planes.latent]
        rows += [gather_slots(plane, at, self.layout, "index") for plane in self.planes.index]
        return [int((row.long() * factors).sum()) for row in rows]

    async def first_arrival(self, reservation: Reservation) -> float:
        """When the first token's entries stand in the pages, on the clock that all processes share."""
        while reservation.computed_len == 0:  # noqa: ASYNC110 - the rank has no event for it, nor needs one
            await asyncio.sleep(POLL_S)
        return time.monotonic()


@asynccontextmanager
async def serve(name: str, layout_name: str, max_tokens: int) -> AsyncIterator[Rank]:
    """A rank that listens on a free port of this machine; its pages hold random bytes."""
    sizes = GEOMETRIES["demo"]
    layout = CacheLayout.create(
        layout_name,
        kv_lora_rank=sizes["kv_lora_rank"],
        qk_rope_head_dim=sizes["qk_rope_head_dim"],
        index_head_dim=sizes["index_head_dim"],
        dtype=torch.float32,
    )
    num_pages = 2 * (max_tokens // PAGE_SIZE + 1)
    planes = layout.allocate(sizes["num_hidden_layers"], num_pages)
    for plane in (*planes.latent, *planes.index):
        plane.random_(256)
    reservations = Reservations(num_pages=num_pages, fingerprint="random", layout=layout.signature)
    transfer = Transfer(
        rank_id=RankId(name),
        host=HOST,
        reservations=reservations,
        planes=planes,
        layout=layout,
        fingerprint="random",
        worker_token=None,
        timeout_s=TIMEOUT_S,
    )
    reservations.on_abort = transfer.abort
    server = grpc.aio.server(interceptors=rank_interceptors(None))
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(transfer.service, server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield Rank(address=f"{HOST}:{port}", transfer=transfer, reservations=reservations, planes=planes, layout=layout)
    finally:
        await transfer.close()
        await server.stop(0)


class BareLink:
    """One tensor at a time over a gloo group of two, as a pair link has, with nothing around it."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self._rendezvous, self._rank = rendezvous, rank
        self._group: Any = None  # torch's stubs lack send and recv of the group object
        self._ack = torch.zeros(1, dtype=torch.uint8)

    def build(self) -> None:
        self._group = build_group(self._rendezvous, self._rank, HOST, TIMEOUT_S)

    def send(self, buffer: torch.Tensor) -> float:
        """Seconds until the peer has said that it has all of it."""
        began = time.perf_counter()
        self._group.send([buffer], 1 - self._rank, 0).wait(_WAIT)
        self._group.recv([self._ack], 1 - self._rank, 0).wait(_WAIT)
        return time.perf_counter() - began

    def receive(self, buffer: torch.Tensor) -> None:
        self._group.recv([buffer], 1 - self._rank, 0).wait(_WAIT)
        self._group.send([self._ack], 1 - self._rank, 0).wait(_WAIT)


# ---- the other process


async def answer(layout_name: str, max_tokens: int) -> None:
    """The peer: one JSON line in, one out, until the input ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(**content: object) -> None:
        print(json_lines.dumps(content), flush=True)

    async with serve("peer", layout_name, max_tokens) as rank:
        say(address=rank.address)
        rendezvous = Rendezvous(TIMEOUT_S)
        bare = BareLink(rendezvous, 1)
        building = asyncio.create_task(asyncio.to_thread(bare.build))
        say(bare=(await asyncio.wrap_future(rendezvous.own)).hex())
        rendezvous.put_peer(bytes.fromhex(json_lines.loads(await reader.readline())["bare"]))
        await building
        buffer = torch.zeros(rank.transfer.kv_bytes_per_token * max_tokens, dtype=torch.uint8)
        reservation: Reservation | None = None
        while line := await reader.readline():
            command: dict[str, Any] = json_lines.loads(line)
            count = int(command.get("tokens", 0))
            if command["do"] == "bare":
                part = buffer[: count * rank.transfer.kv_bytes_per_token]
                say(ready=True)
                await asyncio.to_thread(bare.receive, part)
            elif command["do"] == "reserve":
                reservation = rank.reserve(int(command["number"]), count)
                rank.reservations.advance(reservation.id, int(command["present"]))
                say(id=reservation.id, epoch=reservation.epoch)
            elif command["do"] == "first" and reservation is not None:
                say(ready=True)
                say(at=await rank.first_arrival(reservation))
            elif command["do"] == "release" and reservation is not None:
                sums = rank.checksum(reservation, count) if command["check"] else []
                rank.reservations.release(reservation.id)
                say(sums=sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The other process, seen from this one."""

    process: asyncio.subprocess.Process
    address: str
    bare: BareLink

    async def ask(self, **command: object) -> dict[str, Any]:
        await write_line(self.process, command)
        return await read_line(self.process)


@asynccontextmanager
async def spawn(layout_name: str, max_tokens: int) -> AsyncIterator[Peer]:
    command = [sys.executable, "-m", "benchmarks.transfer", "--peer", "--layout", layout_name]
    process = await asyncio.create_subprocess_exec(
        *command, "--tokens", str(max_tokens), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        address = (await read_line(process))["address"]
        rendezvous = Rendezvous(TIMEOUT_S)
        bare = BareLink(rendezvous, 0)
        building = asyncio.create_task(asyncio.to_thread(bare.build))
        await write_line(process, {"bare": (await asyncio.wrap_future(rendezvous.own)).hex()})
        rendezvous.put_peer(bytes.fromhex((await read_line(process))["bare"]))
        await building
        yield Peer(process=process, address=address, bare=bare)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def write_line(process: asyncio.subprocess.Process, content: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json_lines.dumps(content).encode() + b"\n")
    await process.stdin.drain()


async def read_line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the peer process ended; its error is above")
    content: dict[str, Any] = json_lines.loads(line)
    return content


# ---- what is timed


async def pull(rank: Rank, peer: Peer, number: int, *, num_tokens: int, first: bool, check: bool) -> float:
    """Seconds of a pull, or until its first entries."""
    theirs = await peer.ask(do="reserve", number=number, tokens=num_tokens, present=num_tokens)
    ours = rank.reserve(number, num_tokens)
    arrival = asyncio.create_task(rank.first_arrival(ours)) if first else None
    began = time.monotonic()
    verified = await rank.transfer.pull(
        peer=RankId("peer"),
        address=peer.address,
        remote_reservation_id=theirs["id"],
        reservation=ours,
        first=0,
        end=num_tokens,
    )
    ended = time.monotonic() if arrival is None else await arrival
    await finish(rank, peer, ours, num_tokens, verified, check)
    return ended - began


async def push(rank: Rank, peer: Peer, number: int, *, num_tokens: int, first: bool, check: bool) -> float:
    """Seconds of a push of computed entries until the peer has confirmed them, or until the first ones stand there."""
    theirs = await peer.ask(do="reserve", number=number, tokens=num_tokens, present=0)
    ours = rank.reserve(number, num_tokens)
    rank.reservations.advance(ours.id, num_tokens)
    if first:
        await peer.ask(do="first")
    began = time.monotonic()
    stream = await rank.transfer.push(
        peer=RankId("peer"),
        address=peer.address,
        remote_reservation_id=theirs["id"],
        remote_epoch=theirs["epoch"],
        reservation=ours,
        first=0,
        end=num_tokens,
    )
    for end in range(MAX_FRAME_TOKENS, num_tokens + MAX_FRAME_TOKENS, MAX_FRAME_TOKENS):
        for layer in range(len(rank.planes.latent)):
            stream.on_layer(layer, 0, min(end, num_tokens))
    verified = await stream.finish()
    ended = float((await read_line(peer.process))["at"]) if first else time.monotonic()
    await finish(rank, peer, ours, num_tokens, verified, check)
    return ended - began


async def finish(rank: Rank, peer: Peer, ours: Reservation, num_tokens: int, verified: int, check: bool) -> None:
    sums = rank.checksum(ours, num_tokens) if check else []
    rank.reservations.release(ours.id)
    theirs = await peer.ask(do="release", tokens=num_tokens, check=check)
    if verified != num_tokens or theirs["sums"] != sums:
        raise RuntimeError(f"{verified} of {num_tokens} tokens arrived, or other bytes than were sent")


async def bare_send(peer: Peer, buffer: torch.Tensor, num_tokens: int) -> float:
    await peer.ask(do="bare", tokens=num_tokens)
    return await asyncio.to_thread(peer.bare.send, buffer)


Way = Callable[..., Awaitable[float]]


async def measure(layout_name: str, tokens: list[int], repeats: int, advance: Callable[[], None]) -> list[Row]:
    """All cases of one layout; pull, push and the bare send alternate."""
    ways: dict[str, Way] = {"pull": pull, "push": push}
    rows: list[Row] = []
    numbers = itertools.count(1)
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(spawn(layout_name, max(tokens)))
        rank = await stack.enter_async_context(serve("rank", layout_name, max(tokens)))
        for num_tokens in tokens:
            num_bytes = rank.transfer.kv_bytes_per_token * num_tokens
            buffer = torch.zeros(num_bytes, dtype=torch.uint8)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            firsts: dict[str, list[float]] = {name: [] for name in ways}
            limit: list[float] = []
            for repeat in range(-WARM_REPEATS, repeats):
                limit.append(await bare_send(peer, buffer, num_tokens))
                for name, way in ways.items():
                    call = partial(way, rank, peer, num_tokens=num_tokens)
                    seconds[name].append(await call(next(numbers), first=False, check=repeat == -1))
                    firsts[name].append(await call(next(numbers), first=True, check=False))
                advance()
            limit_s = median(limit[WARM_REPEATS:])
            for name in ways:
                whole_s = median(seconds[name][WARM_REPEATS:])
                rows.append(
                    {
                        "way": name,
                        "layout": layout_name,
                        "tokens": num_tokens,
                        "mb": num_bytes / 1e6,
                        "repeats": repeats,
                        "ms": whole_s * 1e3,
                        "mb_per_s": num_bytes / whole_s / 1e6,
                        "limit_mb_per_s": num_bytes / limit_s / 1e6,
                        "of_limit": limit_s / whole_s,
                        "first_ms": median(firsts[name][WARM_REPEATS:]) * 1e3,
                    }
                )
    return rows


async def run(layouts: list[str], tokens: list[int], repeats: int) -> list[Row]:
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("repeats", total=len(layouts) * len(tokens) * (repeats + WARM_REPEATS))
        for layout_name in layouts:
            rows += await measure(layout_name, tokens, repeats, lambda: progress.advance(task))
    return rows


def main(
    layout: Annotated[list[str] | None, typer.Option(help="fp8, bf16 or exact; repeatable. All by default.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable. 1024 and 16384 by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Transfers of each kind, after two to warm up.")] = 15,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
    peer: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time pull and push between two processes of this machine.

    Examples: python -m benchmarks.transfer --tokens 1024 · python -m benchmarks.transfer --layout fp8 --json
    """
    load = load_average()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    torch.set_num_threads(1)
    layouts, counts = layout or list(LAYOUTS), tokens or [1024, 16384]
    if peer:
        asyncio.run(answer(layouts[0], counts[0]))
    else:
        publish("transfer", asyncio.run(run(layouts, counts, repeats)), as_json=json, load=load)


if __name__ == "__main__":
    typer.run(main)
