"""A rank that leaves hands the caches of its sessions to peers: leased ones first, then the most recent.

For each session it does at a peer what a router does for a turn: Reserve, Migrate (with itself as the source), Release,
and Retain where a lease is to go on. A session whose turn runs here is handed over when that has ended, or, where turns
have a time of their own, ended here when it is over: its router then places the rest elsewhere, and has the caches
fetched from here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import grpc

from seamount.v1 import worker_pb2, worker_pb2_grpc
from seamount.wire import limits
from seamount.wire.credentials import CallMetadata
from seamount.wire.durations import duration
from seamount.wire.errors import Aborted, DataLoss, SeamountError, Unavailable, from_rpc_error
from seamount.wire.hashes import PAGE_SIZE
from seamount.workers.cache.handover import LeftSession
from seamount.workers.cache.reservations import Reservations
from seamount.workers.engine_stream import KEEP_ALIVE_S
from seamount.workers.spec import RankSpec

_LOG = logging.getLogger(__name__)
MAX_PEERS = 4_096
MAX_ATTEMPTS = 2
"""At different peers, before a session is left to die with the rank: its history is durable, its caches are not."""
MIN_TURNS_S = 1.0
"""Routers have heard by then that this rank is leaving, and place nothing here any more."""
FETCHED_WITHIN_S = 5.0
"""What the router of a turn that was ended here has to fetch its session, before it is handed over like any other."""
_LOOK_AGAIN_S = 0.05
_CALL_TIMEOUT_S = 5.0
_CHANNEL_OPTIONS = [("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES)]


@dataclass(slots=True, kw_only=True)
class _Peer:
    rank_id: str
    stub: worker_pb2_grpc.WorkerServiceAsyncStub
    num_usable_pages: int
    is_lost: bool = False


@dataclass(slots=True, kw_only=True)
class Draining:
    """Runs ``WorkerService.Drain``. address: where peers reach this rank, once it serves; active: reservations whose
    answer is in the making here, kept up to date by their owner; abort: ends one of those."""

    spec: RankSpec
    reservations: Reservations
    active: set[str]
    abort: Callable[[str], None]
    metadata: CallMetadata
    address: str = ""
    has_begun: bool = False
    """From then on this rank takes no new sessions."""
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, request: worker_pb2.DrainRequest) -> AsyncGenerator[worker_pb2.DrainResponse, None]:
        """One response a session, and one each second. Ends when no session with caches is left here that a peer would
        take; the caller's deadline ends it before. Repeating it goes on. Raises ``InvalidArgument``."""
        limits.check_length(request.peers, field="peers", high=MAX_PEERS)
        self.has_begun = True
        responses: asyncio.Queue[worker_pb2.DrainResponse | None] = asyncio.Queue()
        task = asyncio.create_task(self._empty(request, responses.put_nowait), name="drain")
        task.add_done_callback(lambda _: responses.put_nowait(None))
        try:
            while not (task.done() and responses.empty()):
                response: worker_pb2.DrainResponse | None = worker_pb2.DrainResponse()
                with suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        response = await responses.get()
                if response is not None:
                    yield response
            task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _empty(
        self, request: worker_pb2.DrainRequest, on_moved: Callable[[worker_pb2.DrainResponse], None]
    ) -> None:
        """One drain at a time; it takes as long as it takes."""
        turns_s = request.turns_time.ToNanoseconds() / 1e9 if request.HasField("turns_time") else math.inf
        turns_until = time.monotonic() + max(turns_s, MIN_TURNS_S)
        async with self._lock, AsyncExitStack() as stack:
            peers = [await self._connect(stack, peer) for peer in request.peers if peer.rank_id != self.spec.rank_id]
            refused: dict[str, set[str]] = {}  # by session: peers that did not take it
            fetched_until: dict[str, float] = {}  # by session: its router is about to fetch it
            while True:
                if time.monotonic() >= turns_until:
                    self._end_turns(fetched_until)
                waiting = self.reservations.handover.left_behind()
                expected = {one.session_id for one in waiting if _is_ahead(fetched_until, one)}
                waiting = [one for one in waiting if one.session_id not in expected]
                movable = [one for one in waiting if _fitting(one, peers, refused)]
                moved = await self._hand_over(movable[0], peers, refused) if movable else None
                if moved is not None:
                    on_moved(moved)
                elif not movable:
                    if not expected and not self.reservations.handover.has_turns():
                        return
                    await asyncio.sleep(_LOOK_AGAIN_S)

    def _end_turns(self, fetched_until: dict[str, float]) -> None:
        for reservation_id in tuple(self.active):
            with suppress(SeamountError):  # it has ended meanwhile
                session_id = self.reservations.get(reservation_id).session_id
                fetched_until[session_id] = time.monotonic() + FETCHED_WITHIN_S
            self.abort(reservation_id)

    async def _connect(self, stack: AsyncExitStack, peer: worker_pb2.DrainPeer) -> _Peer:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(peer.address, options=_CHANNEL_OPTIONS))
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return _Peer(rank_id=peer.rank_id, stub=stub, num_usable_pages=peer.num_usable_pages)

    async def _hand_over(
        self, left: LeftSession, peers: Sequence[_Peer], refused: dict[str, set[str]]
    ) -> worker_pb2.DrainResponse | None:
        """To the peer with the most usable pages; None where it did not take the session."""
        peer = max(_fitting(left, peers, refused), key=lambda one: one.num_usable_pages)
        try:
            num_tokens = await self._move(left, peer)
        except (grpc.aio.AioRpcError, SeamountError) as broken:
            error = broken if isinstance(broken, SeamountError) else from_rpc_error(broken)
            _LOG.info("session_not_handed_over", extra={"peer": peer.rank_id, "reason": error.reason})
            peer.is_lost = isinstance(error, Unavailable)
            refused.setdefault(left.session_id, set()).add(peer.rank_id)
            return None
        peer.num_usable_pages -= num_tokens // PAGE_SIZE + 1
        return worker_pb2.DrainResponse(session_id=left.session_id, rank_id=peer.rank_id, num_tokens=num_tokens)

    async def _move(self, left: LeftSession, peer: _Peer) -> int:
        """Returns how many tokens' entries are at the peer now. Raises ``AioRpcError`` and typed errors."""
        token_ids = self.reservations.handover.tokens_of(left.session_id)
        if not token_ids:
            raise Aborted("a turn of the session came, or its pages went", reason="SESSION_LEFT")
        reserved = await peer.stub.Reserve(
            worker_pb2.ReserveRequest(
                session_id=left.session_id,
                turn_id=f"drain/{self.spec.rank_id}",
                epoch=left.epoch,
                attempt=1,
                cache_salt=left.salt,
                token_ids=token_ids,
                time_to_live=duration(limits.MAX_RESERVATION_S),
            ),
            timeout=_CALL_TIMEOUT_S,
            metadata=self.metadata,
        )
        kept = 0
        try:
            kept = await self._migrated_len(reserved.reservation_id, left, peer)
        finally:
            released = worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id, keep_len=kept or None)
            await peer.stub.Release(released, timeout=_CALL_TIMEOUT_S, metadata=self.metadata)
        if left.leased_s > 0:
            retained = worker_pb2.RetainRequest(
                session_id=left.session_id, epoch=left.epoch, duration=duration(left.leased_s)
            )
            with suppress(grpc.aio.AioRpcError):
                await peer.stub.Retain(retained, timeout=_CALL_TIMEOUT_S, metadata=self.metadata)
        return kept

    async def _migrated_len(self, reservation_id: str, left: LeftSession, peer: _Peer) -> int:
        asked = worker_pb2.MigrateRequest(
            reservation_id=reservation_id,
            epoch=left.epoch,
            source_rank_id=self.spec.rank_id,
            source_address=self.address,
        )
        call = peer.stub.Migrate(asked, metadata=self.metadata, timeout=limits.MAX_RESERVATION_S)
        async for frame in call:
            if frame.WhichOneof("event") == "finished":
                if not frame.finished.is_complete:
                    raise DataLoss("not all of it has arrived and verified", reason="MOVE_INCOMPLETE")
                return frame.finished.cached_len
        raise Unavailable("the peer ended a move early", reason="LINK_LOST")


def _fitting(left: LeftSession, peers: Sequence[_Peer], refused: dict[str, set[str]]) -> list[_Peer]:
    """Who may still be asked."""
    by = refused.get(left.session_id, set())
    return [p for p in peers if not p.is_lost and p.rank_id not in by] if len(by) < MAX_ATTEMPTS else []


def _is_ahead(fetched_until: dict[str, float], left: LeftSession) -> bool:
    return time.monotonic() < fetched_until.get(left.session_id, 0.0)
