"""The links of one rank: opened to peers on first use, accepted from peers, capped together, rebuilt after an error."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from seamount.v1 import transfer_pb2, transfer_pb2_grpc
from seamount.wire.credentials import CallMetadata
from seamount.wire.errors import (
    Aborted,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    SeamountError,
    Unavailable,
    from_rpc_error,
)
from seamount.wire.ids import RankId
from seamount.workers.transfer.frames import PROTOCOL_VERSION, FrameShape
from seamount.workers.transfer.link import PairLink
from seamount.workers.transfer.rendezvous import Rendezvous, build_group

Connect = Callable[[str], grpc.aio.Channel]
"""Makes a channel to a peer's address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What two ranks must have in common before a byte moves."""

    shape: FrameShape
    layout_signature: str
    fingerprint: str

    def check(self, request: transfer_pb2.OpenLinkRequest) -> None:
        """Raises ``FailedPrecondition`` naming the first difference and both values."""
        pairs = {
            "protocol_version": (request.protocol_version, PROTOCOL_VERSION),
            "layout_signature": (request.layout_signature, self.layout_signature),
            "num_layers": (request.num_layers, self.shape.num_layers),
            "fingerprint": (request.fingerprint, self.fingerprint),
        }
        for name, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise FailedPrecondition(
                    f"{name} is {str(theirs)[:80]!r} at the calling rank and {ours!r} here: they cannot exchange pages",
                    reason="LINK_MISMATCH",
                    metadata={"field": name, "caller": str(theirs)[:80], "callee": str(ours)},
                )


@dataclass(slots=True, eq=False, kw_only=True)
class OpenedLink:
    """A link that this rank opened. Transfer ids on it are this rank's."""

    link: PairLink
    channel: grpc.aio.Channel
    stub: transfer_pb2_grpc.TransferServiceAsyncStub
    last_transfer_id: int = 0

    def next_transfer_id(self) -> int:
        self.last_transfer_id += 1
        return self.last_transfer_id


@dataclass(slots=True, eq=False, kw_only=True)
class _Accepted:
    caller: str
    epoch: int
    built: asyncio.Task[PairLink]

    @property
    def link(self) -> PairLink | None:
        done = self.built.done() and not self.built.cancelled() and self.built.exception() is None
        return self.built.result() if done else None


@dataclass(slots=True, kw_only=True)
class Links:
    """All of one event loop. timeout_s: for building one, and the longest stall of a peer. host: where links listen.

    max_links: opened and accepted together; beyond it the least recently used idle one is closed.
    """

    rank_id: RankId
    host: str
    agreement: Agreement
    metadata: CallMetadata
    connect: Connect
    timeout_s: float
    max_links: int
    _opened: dict[RankId, OpenedLink] = field(default_factory=dict)
    _accepted: dict[str, _Accepted] = field(default_factory=dict)
    _opening: dict[RankId, asyncio.Lock] = field(default_factory=dict)
    _leaving: set[asyncio.Task[None]] = field(default_factory=set)
    _builders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="link-build")
    )
    _last_epoch: int = 0

    async def get(self, peer: RankId, address: str) -> OpenedLink:
        """The link to a peer, opened if there is none that works.

        Raises the peer's typed refusal (FailedPrecondition LINK_MISMATCH …), Unavailable (LINK_NOT_BUILT),
        ResourceExhausted (LINKS_BUSY).
        """
        async with self._opening.setdefault(peer, asyncio.Lock()):
            opened = self._opened.get(peer)
            if opened is not None and opened.link.error is None:
                return opened
            self.drop(peer)
            self._make_room()
            channel = self.connect(address)
            try:
                opened = await self._open(channel)
            except BaseException:
                await channel.close()
                raise
            self._opened[peer] = opened
            return opened

    def drop(self, peer: RankId, only: OpenedLink | None = None) -> None:
        """Close the link to a peer with all that is in flight on it; the next use builds another.

        only: do nothing if it is another one by now.
        """
        opened = self._opened.get(peer)
        if opened is not None and only in (None, opened):
            del self._opened[peer]
            opened.link.close()
            self._leave(opened.channel.close())

    async def accept(self, request: transfer_pb2.OpenLinkRequest) -> transfer_pb2.OpenLinkResponse:
        """The callee's side of ``get``. Raises FailedPrecondition (LINK_MISMATCH), Aborted (STALE_LINK),
        ResourceExhausted (LINKS_BUSY), InvalidArgument (address)."""
        self.agreement.check(request)
        for link_id, older in list(self._accepted.items()):
            if older.caller == request.caller_rank_id:
                if older.epoch >= request.epoch:
                    raise Aborted("the calling rank has opened a newer link", reason="STALE_LINK")
                self._drop_accepted(link_id)
        self._make_room()
        rendezvous = Rendezvous(self.timeout_s)
        built = asyncio.create_task(self._build(rendezvous, 1, request.link_id))
        try:
            async with asyncio.timeout(self.timeout_s):
                own = await asyncio.wrap_future(rendezvous.own)
            rendezvous.put_peer(request.address)
        except BaseException:
            rendezvous.give_up()
            self._leave(_outcome_unwanted(built))
            raise
        self._accepted[request.link_id] = _Accepted(caller=request.caller_rank_id, epoch=request.epoch, built=built)
        return transfer_pb2.OpenLinkResponse(callee_rank_id=self.rank_id, address=own)

    async def accepted(self, link_id: str) -> PairLink:
        """A link that a peer opened. Raises NotFound (LINK_NOT_FOUND) for one that is lost or unknown."""
        entry = self._accepted.get(link_id)
        if entry is not None:
            try:
                link = await asyncio.shield(entry.built)
                link.check()
                return link
            except SeamountError:
                self._drop_accepted(link_id)
        raise NotFound("no such link here any more: open another", reason="LINK_NOT_FOUND")

    async def close(self) -> None:
        """Close every link and wait for their threads, at most ``timeout_s``."""
        links = [
            link
            for link in (*(o.link for o in self._opened.values()), *(a.link for a in self._accepted.values()))
            if link
        ]
        for peer in list(self._opened):
            self.drop(peer)
        for link_id in list(self._accepted):
            self._drop_accepted(link_id)
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=self.timeout_s)
        for link in links:
            await asyncio.to_thread(link.join, self.timeout_s)
        self._builders.shutdown(wait=False, cancel_futures=True)

    # ---- building and dropping

    async def _open(self, channel: grpc.aio.Channel) -> OpenedLink:
        stub: Any = transfer_pb2_grpc.TransferServiceStub(channel)
        link_id = secrets.token_hex(16)
        self._last_epoch = max(self._last_epoch + 1, time.time_ns())
        rendezvous = Rendezvous(self.timeout_s)
        built = asyncio.create_task(self._build(rendezvous, 0, link_id))
        try:
            async with asyncio.timeout(self.timeout_s):
                own = await asyncio.wrap_future(rendezvous.own)
                request = transfer_pb2.OpenLinkRequest(
                    caller_rank_id=self.rank_id,
                    link_id=link_id,
                    epoch=self._last_epoch,
                    address=own,
                    protocol_version=PROTOCOL_VERSION,
                    layout_signature=self.agreement.layout_signature,
                    num_layers=self.agreement.shape.num_layers,
                    fingerprint=self.agreement.fingerprint,
                )
                response = await stub.OpenLink(request, timeout=self.timeout_s, metadata=self.metadata)
            rendezvous.put_peer(response.address)
            return OpenedLink(link=await asyncio.shield(built), channel=channel, stub=stub)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except TimeoutError:
            raise _not_built() from None
        finally:
            if not built.done():
                rendezvous.give_up()
                self._leave(_outcome_unwanted(built))

    async def _build(self, rendezvous: Rendezvous, rank: int, link_id: str) -> PairLink:
        loop = asyncio.get_running_loop()
        build = partial(build_group, rendezvous, rank, self.host, self.timeout_s)
        try:
            return PairLink(
                link_id,
                await loop.run_in_executor(self._builders, build),
                self.agreement.shape,
                stall_timeout_s=self.timeout_s,
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            raise _not_built() from error

    def _make_room(self) -> None:
        for peer, opened in list(self._opened.items()):
            if opened.link.error is not None:
                self.drop(peer)
        for link_id, entry in list(self._accepted.items()):
            if entry.built.done() and (entry.link is None or entry.link.error is not None):
                self._drop_accepted(link_id)
        if len(self._opened) + len(self._accepted) < self.max_links:
            return
        idle = [(opened.link, partial(self.drop, peer)) for peer, opened in self._opened.items()]
        idle += [
            (entry.link, partial(self._drop_accepted, link_id))
            for link_id, entry in self._accepted.items()
            if entry.link
        ]
        idle = [(link, drop) for link, drop in idle if link.is_idle]
        if not idle:
            raise ResourceExhausted(
                f"all {self.max_links} links of this rank are in use", reason="LINKS_BUSY", retry_after_s=1.0
            )
        min(idle, key=lambda entry: entry[0].last_used_at)[1]()

    def _drop_accepted(self, link_id: str) -> None:
        entry = self._accepted.pop(link_id, None)
        if entry is not None:
            self._leave(_outcome_unwanted(entry.built))

    def _leave(self, last: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(last)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


async def _outcome_unwanted(built: asyncio.Task[PairLink]) -> None:
    await asyncio.wait({built})
    if not built.cancelled() and built.exception() is None:
        built.result().close()


def _not_built() -> Unavailable:
    return Unavailable("no link to the peer could be built in time", reason="LINK_NOT_BUILT", retry_after_s=0.0)
