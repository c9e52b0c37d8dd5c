"""The ranks as one router sees them: who is alive, by the directory; what they are doing, by their own streams."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field

import grpc

from seamount.router.directory import Role
from seamount.router.placement import RankLoad, tenant_weight
from seamount.router.quarantine import Deaths
from seamount.router.rank_client import RankClient, RankLost
from seamount.router.watcher import DirectoryWatcher, Peer
from seamount.v1 import worker_pb2, worker_pb2_grpc
from seamount.wire import limits
from seamount.wire.errors import SeamountError, from_rpc_error
from seamount.wire.ids import RankId, SessionId
from seamount.wire.protocol import rank_call

_LOG = logging.getLogger(__name__)
_RECONNECT_S = 0.25
_OTHER_VERSION_S = 10.0
"""Until a rank that speaks another protocol is asked again: it will go on doing so, and be gone one day."""
FIRST_LOOK_S = 1.0
"""How long a starting router waits for the states of registered ranks; some of them may be dead."""
_NUM_FOREIGN_LOOKS = 4
_RANK_ROLES = (Role.PREFILL, Role.DECODE)
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(slots=True, kw_only=True)
class _Link:
    """What this router holds of one rank's process."""

    instance: str
    channel: grpc.aio.Channel
    client: RankClient
    watch: asyncio.Task[None] | None = None
    state: worker_pb2.RankState | None = None
    foreign: deque[int] = field(default_factory=lambda: deque([0], maxlen=_NUM_FOREIGN_LOOKS))
    """Answers at the rank, as its last states came in, that were not this router's."""


@dataclass(slots=True, kw_only=True)
class Ranks:
    """Channels, state streams and liveness of all ranks. ``start`` before use, ``stop`` at the end."""

    watcher: DirectoryWatcher
    worker_token: str | None
    call_timeout_s: float
    progress_timeout_s: float
    _links: dict[RankId, _Link] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)
    _announcing: set[asyncio.Task[None]] = field(default_factory=set)
    deaths: Deaths = field(default_factory=Deaths)
    _num_assigned: Counter[RankId] = field(default_factory=Counter)
    _num_of_tenant: Counter[bytes] = field(default_factory=Counter)

    async def start(self) -> None:
        """Follow the directory, whose watcher has been started; a first look at the ranks' states is waited for."""
        self._sync()
        until = time.monotonic() + FIRST_LOOK_S
        while any(link.state is None for link in self._links.values()) and time.monotonic() < until:
            await self.wait_for_change(_RECONNECT_S)
        self._task = asyncio.create_task(self._follow(), name="ranks")

    async def stop(self) -> None:
        """Close every channel; calls in flight end. Harmless to repeat."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        for retiring in (*self._closing, *self._announcing):
            retiring.cancel()
        closing = [self._close(self._links.pop(rank_id)) for rank_id in list(self._links)]
        await asyncio.gather(*closing, *self._closing, *self._announcing, return_exceptions=True)

    def loads(self, pool: Role) -> list[RankLoad]:
        """Ranks of a pool (``PREFILL``, ``DECODE``) that are alive, healthy, not leaving, of known state; by id."""
        return [load for load, state in self._alive(pool) if not state.draining]

    def load(self, rank_id: RankId) -> RankLoad | None:
        """One rank's load; None where ``loads`` would leave it out."""
        return next((load for pool in _RANK_ROLES for load in self.loads(pool) if load.rank_id == rank_id), None)

    def source(self, rank_id: RankId | None) -> RankLoad | None:
        """The load of a decode rank whose caches can be fetched: alive and healthy, leaving or not."""
        return next((load for load, _ in self._alive(Role.DECODE) if load.rank_id == rank_id), None)

    def holder(self, session_id: SessionId) -> RankId | None:
        """A live decode rank that says it has caches of the session: one that took over a dead one's disk, say."""
        alive = self._alive(Role.DECODE)
        return next((load.rank_id for load, state in alive if session_id in state.session_ids), None)

    def announce(self, rank_id: RankId, session_id: SessionId) -> None:
        """A turn of the session is about to come: the rank brings up what has left its device. Best effort."""
        peers = self.watcher.peers(Role.DECODE)
        state = next((self._state(peer) for peer in peers if peer.record.peer_id == rank_id), None)
        if state is None or not state.num_host_cached_pages + state.num_disk_cached_pages:
            return

        async def tell() -> None:
            with suppress(SeamountError):
                await self.client(rank_id).restore(session_id)

        task = asyncio.create_task(tell(), name=f"announce {session_id}")
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)

    def is_leaving(self, rank_id: RankId) -> bool:
        """Whether the rank is alive and hands over its sessions."""
        return any(load.rank_id == rank_id and state.draining for load, state in self._alive(Role.DECODE))

    def _alive(self, pool: Role) -> list[tuple[RankLoad, worker_pb2.RankState]]:
        states = [(peer, state) for peer in self.watcher.peers(pool) if (state := self._state(peer)) is not None]
        num_gang_answers = Counter[str]()
        for peer, _ in states:
            num_gang_answers[peer.record.gang_id] += self._num_answers(RankId(peer.record.peer_id))
        return [
            (self._load(peer, state, num_gang_answers[peer.record.gang_id]), state)
            for peer, state in states
            if state.healthy
        ]

    def instance(self, rank_id: RankId) -> str | None:
        """The name of the rank's process in the directory, draining ones too; None where it is not alive."""
        alive = {peer.record.peer_id: peer.record.instance for peer in self.watcher.peers(*_RANK_ROLES)}
        return alive.get(rank_id)

    def client(self, rank_id: RankId) -> RankClient:
        """Raises ``RankLost`` for a rank that left meanwhile."""
        link = self._links.get(rank_id)
        if link is None:
            raise RankLost(f"rank {rank_id} left", reason="RANK_LOST", retry_after_s=1.0)
        return link.client

    def all(self) -> list[tuple[Peer, worker_pb2.RankState | None]]:
        """Every registered rank, dead ones too, with its last known state; by id."""
        return [(peer, self._state(peer)) for peer in self.watcher.peers(*_RANK_ROLES, alive_only=False)]

    def assign(self, rank_id: RankId, cache_salt: bytes) -> None:
        """An answer of this router goes to the rank, for the tenant of that salt; ``unassign`` when it is over."""
        self._num_assigned[rank_id] += 1
        self._num_of_tenant[cache_salt] += 1

    def unassign(self, rank_id: RankId, cache_salt: bytes) -> None:
        """The inverse of ``assign``."""
        self._num_assigned[rank_id] -= 1
        self._num_of_tenant[cache_salt] -= 1
        if not self._num_assigned[rank_id]:
            del self._num_assigned[rank_id]
        if not self._num_of_tenant[cache_salt]:
            del self._num_of_tenant[cache_salt]

    def tenant_weight(self, cache_salt: bytes) -> float:
        """``placement.tenant_weight`` of the tenant of that salt, by the answers that this router has in the making."""
        return tenant_weight(self._num_of_tenant, cache_salt)

    def note_death(self, rank_id: RankId) -> None:
        """The rank's process ended under a call, or under its state stream."""
        for peer in self.watcher.peers(*_RANK_ROLES, alive_only=False):
            if peer.record.peer_id == rank_id:
                host = peer.record.address.rpartition(":")[0]
                self.deaths.note(rank_id, gang_id=peer.record.gang_id, host=host)

    def mark_lost(self, rank_id: RankId) -> None:
        """A call to the rank broke: it is dead until its counter moves and its stream stands again."""
        self.watcher.mark_broken(rank_id)
        link = self._links.get(rank_id)
        if link is not None:
            link.state = None
            if link.watch is not None:
                link.watch.cancel()
            link.watch = asyncio.create_task(self._watch(rank_id, link), name=f"watch {rank_id}")

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until a rank's state comes in or changes, at most ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _state(self, peer: Peer) -> worker_pb2.RankState | None:
        link = self._links.get(RankId(peer.record.peer_id))
        return link.state if link is not None and link.instance == peer.record.instance else None

    def _num_answers(self, rank_id: RankId) -> int:
        """In the making there. The least of a few looks: an answer of ours that just ended may still stand in the
        rank's state."""
        return min(self._links[rank_id].foreign) + self._num_assigned[rank_id]

    def _load(self, peer: Peer, state: worker_pb2.RankState, num_gang_answers: int) -> RankLoad:
        rank_id = RankId(peer.record.peer_id)
        return RankLoad(
            rank_id=rank_id,
            address=peer.record.address,
            num_free_pages=state.num_free_pages,
            num_cached_pages=state.num_cached_pages - state.num_leased_pages,
            num_running=state.num_running,
            num_answers=self._num_answers(rank_id),
            num_gang_answers=num_gang_answers,
            num_blocked=state.num_blocked,
            answer_s=state.answer_s,
            num_queued_prefill_tokens=state.num_queued_prefill_tokens,
            prefill_tokens_per_s=state.prefill_tokens_per_s,
            pull_bytes_per_s=state.pull_bytes_per_s,
            push_bytes_per_s=state.push_bytes_per_s,
            kv_bytes_per_token=state.kv_bytes_per_token,
            restore_bytes_per_s=state.host_bytes_per_s or state.disk_bytes_per_s,
        )

    async def _follow(self) -> None:
        while True:
            await self.watcher.wait_changed(_RECONNECT_S)
            self._sync()

    def _sync(self) -> None:
        """Links for who is registered, none for who left or came back as another process."""
        peers = {RankId(p.record.peer_id): p for p in self.watcher.peers(*_RANK_ROLES, alive_only=False)}
        for rank_id in list(self._links):
            peer = peers.get(rank_id)
            if peer is None or peer.record.instance != self._links[rank_id].instance:
                closing = asyncio.create_task(self._retire(self._links.pop(rank_id)))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for rank_id, peer in peers.items():
            if rank_id not in self._links:
                self._links[rank_id] = self._open(rank_id, peer)

    def _open(self, rank_id: RankId, peer: Peer) -> _Link:
        channel = grpc.aio.insecure_channel(peer.record.address, options=_CHANNEL_OPTIONS)
        client = RankClient(
            rank_id,
            peer.record.address,
            channel,
            metadata=rank_call(self.worker_token),
            call_timeout_s=self.call_timeout_s,
            progress_timeout_s=self.progress_timeout_s,
        )
        link = _Link(instance=peer.record.instance, channel=channel, client=client)
        link.watch = asyncio.create_task(self._watch(rank_id, link), name=f"watch {rank_id}")
        return link

    async def _watch(self, rank_id: RankId, link: _Link) -> None:
        """Hold the rank's state stream; when it breaks, the rank is dead at once."""
        stub = worker_pb2_grpc.WorkerServiceStub(link.channel)
        while True:
            call = stub.WatchState(worker_pb2.WatchStateRequest(), metadata=rank_call(self.worker_token))
            try:
                while True:
                    async with asyncio.timeout(self.progress_timeout_s):
                        response = await call.read()
                    if not isinstance(response, worker_pb2.WatchStateResponse):
                        break
                    if link.state is None:
                        self.watcher.mark_connected(rank_id)
                    link.state = response.state
                    num_answers = response.state.num_running + response.state.num_waiting
                    link.foreign.append(max(0, num_answers - self._num_assigned[rank_id]))
                    self._tell()
            except (grpc.RpcError, TimeoutError) as error:
                _LOG.info("rank_stream_broken", extra={"rank_id": rank_id, "error": type(error).__name__})
                if _speaks_another_version(error):
                    _LOG.warning("rank_of_another_version", extra={"rank_id": rank_id})
                    await asyncio.sleep(_OTHER_VERSION_S)
                if link.state is not None and isinstance(error, grpc.RpcError):  # not one that is still away
                    self.note_death(rank_id)
            finally:
                call.cancel()
            if link.state is not None:
                link.state = None
                self.watcher.mark_broken(rank_id)
                self._tell()
            await asyncio.sleep(_RECONNECT_S)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _retire(self, link: _Link) -> None:
        """A rank that left lets its streams end, and so do we: each has a deadline of its own."""
        try:
            while link.client.num_calls:  # noqa: ASYNC110 - calls end in many places
                await asyncio.sleep(_RECONNECT_S)
        finally:
            await self._close(link)

    async def _close(self, link: _Link) -> None:
        if link.watch is not None:
            link.watch.cancel()
            with suppress(asyncio.CancelledError):
                await link.watch
        await link.channel.close()


def _speaks_another_version(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and from_rpc_error(error).reason == "PROTOCOL_MISMATCH"
