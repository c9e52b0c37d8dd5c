"""The directory in Redis: peers write themselves in, routers read all of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from seamount.router.directory import Beat, Liveness, PeerJudge, PeerRecord, Role
from seamount.router.store import Store
from seamount.wire.errors import DeadlineExceeded, SeamountError

POLL_INTERVAL_S = 0.25
BEAT_INTERVAL_S = 0.5
DEAD_AFTER_S = 3.0
_RENDEZVOUS_POLL_S = 0.05
_RENDEZVOUS_KEPT_S = 3600
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A registered peer as this observer sees it; ``state`` is what its last beat carried."""

    record: PeerRecord
    state: bytes
    liveness: Liveness


class Directory:
    """The directory of one cluster: two hashes by peer id. Errors as ``Store.function``."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store = store
        tag = f"{{directory/{cluster}}}"
        self._keys = (store.key(tag, "peers"), store.key(tag, "beats"))
        self._gang_key = store.key(f"{{directory/{cluster}}}", "gang")

    async def register(self, record: PeerRecord, *, state: bytes = b"", counter: int = 0) -> None:
        """Write the peer in, in the place of an earlier process of the same id."""
        beat = Beat(instance=record.instance, counter=counter, state=state)
        await self._store.function("register_peer", self._keys, (record.peer_id, record.to_bytes(), beat.to_bytes()))

    async def beat(self, peer_id: str, beat: Beat) -> bool:
        """Write a beat. False: the directory does not know this process (any more), register again. Tried once:
        the next beat says more than this one repeated."""
        beaten = await self._store.function(
            "beat_peer", self._keys, (peer_id, beat.to_bytes(), f"{beat.instance}:"), budget_s=0.0
        )
        return bool(beaten)

    async def leave(self, record: PeerRecord) -> None:
        """Take the peer out, unless another process of the same id has taken its place."""
        await self._store.function("remove_peer", self._keys, (record.peer_id, f"{record.instance}:"))

    async def remove(self, peer_id: str, last: Beat) -> None:
        """Take a long-dead peer out, unless it has beaten since ``last``."""
        await self._store.function("remove_peer", self._keys, (peer_id, last.to_bytes()))

    async def read(self) -> dict[str, tuple[PeerRecord, Beat]]:
        """All peers, in one round trip, tried once. What cannot be read is left out and logged."""
        commands = [("HGETALL", key) for key in self._keys]
        records, beats = await self._store.pipeline(commands, budget_s=0.0)
        found: dict[str, tuple[PeerRecord, Beat]] = {}
        for peer_id, stored in records.items():
            try:
                found[peer_id.decode()] = PeerRecord.from_bytes(stored), Beat.from_bytes(beats.get(peer_id, b""))
            except ValueError as error:
                _log.warning("peer_unreadable", extra={"peer": peer_id.decode("utf-8", "replace"), "why": str(error)})
        return found

    async def publish(self, gang_id: str, key: str, value: bytes) -> None:
        """Tell the members of a gang something, for example where rank 0 hosts their store. Kept for an hour."""
        name = f"{self._gang_key}:{gang_id}"
        await self._store.pipeline([("HSET", name, key, value), ("EXPIRE", name, _RENDEZVOUS_KEPT_S)])

    async def wait_for(self, gang_id: str, key: str, *, timeout_s: float) -> bytes:
        """What was published under the key, as soon as it is. Raises ``DeadlineExceeded``."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(SeamountError):  # Redis may be away for part of the wait
                value: bytes | None = await self._store.command("HGET", f"{self._gang_key}:{gang_id}", key, budget_s=0)
                if value is not None:
                    return value
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"no member of gang {gang_id} published {key} within {timeout_s:g} s", reason="RENDEZVOUS_TIMEOUT"
                )
            await asyncio.sleep(_RENDEZVOUS_POLL_S)


class Registration:
    """Keeps one peer in the directory: registers, beats, and registers again where the directory has lost it."""

    def __init__(
        self,
        directory: Directory,
        record: PeerRecord,
        *,
        state: Callable[[], bytes] = bytes,
        interval_s: float = BEAT_INTERVAL_S,
    ) -> None:
        """state: read for every beat, on the event loop; must not block."""
        self._directory = directory
        self._record = record
        self._state = state
        self._interval_s = interval_s
        self._counter = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register, then beat until ``stop``."""
        await self._directory.register(self._record, state=self._state())
        self._task = asyncio.create_task(self._run(), name=f"beat {self._record.peer_id}")

    async def stop(self) -> None:
        """Stop beating and leave; where Redis is away the entry is left for others to remove. Harmless to repeat."""
        task, self._task = self._task, None
        if task is None:
            return
        await _ended(task)
        with contextlib.suppress(SeamountError):
            await self._directory.leave(self._record)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self._counter += 1
            beat = Beat(instance=self._record.instance, counter=self._counter, state=self._state())
            try:
                if not await self._directory.beat(self._record.peer_id, beat):
                    await self._directory.register(self._record, state=beat.state, counter=self._counter)
            except SeamountError as error:
                _log.warning("beat_failed", extra={"peer": self._record.peer_id, "reason": error.reason})


class DirectoryWatcher:
    """One router's view of the directory, polled. ``PeerJudge`` decides, this reads and writes."""

    def __init__(
        self,
        directory: Directory,
        *,
        dead_after_s: float = DEAD_AFTER_S,
        poll_interval_s: float = POLL_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._poll_interval_s = poll_interval_s
        self._judge = PeerJudge(dead_after_s=dead_after_s, clock=clock)
        self._entries: dict[str, tuple[PeerRecord, Beat]] = {}
        self._alive: frozenset[tuple[str, str]] = frozenset()
        self._changed = asyncio.Event()
        self._polling = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.is_answered = False
        """Whether Redis answered the last poll."""

    async def start(self) -> None:
        """Poll once, then on; a Redis that is away now is no error, peers are unknown until it answers."""
        await self.look()
        self._task = asyncio.create_task(self._run(), name="directory")

    async def stop(self) -> None:
        """Harmless to repeat."""
        task, self._task = self._task, None
        if task is not None:
            await _ended(task)

    async def look(self) -> bool:
        """Poll now, not at the next interval. Whether Redis answered."""
        async with self._polling:  # an older answer never comes after a newer one
            await self._poll()
            return self.is_answered

    def peers(self, *roles: Role, alive_only: bool = True) -> list[Peer]:
        """Peers of these roles (none given: all), by id. Where Redis is away: as of its last answer."""
        found = [
            Peer(record=record, state=beat.state, liveness=self._judge.liveness(peer_id))
            for peer_id, (record, beat) in sorted(self._entries.items())
            if not roles or record.role in roles
        ]
        return [peer for peer in found if not alive_only or peer.liveness is Liveness.ALIVE]

    def liveness(self, peer_id: str) -> Liveness:
        """Judge one peer. Only DEAD and ABSENT justify taking over its turns, UNKNOWN never does."""
        return self._judge.liveness(peer_id)

    def mark_broken(self, peer_id: str) -> None:
        """A stream to the peer broke."""
        self._judge.mark_broken(peer_id)
        self._tell_if_changed()

    def mark_connected(self, peer_id: str) -> None:
        """A stream to the peer stands."""
        self._judge.mark_connected(peer_id)
        self._tell_if_changed()

    async def wait_changed(self, timeout_s: float) -> bool:
        """Wait until a peer comes, goes, dies, revives or restarts; False after ``timeout_s``.

        Only changes after the call count: look at ``peers`` again before each wait, and with a bounded timeout.
        """
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            await self.look()

    async def _poll(self) -> None:
        try:
            entries = await self._directory.read()
        except SeamountError:
            self.is_answered = False
            self._judge.missed()
            return
        self.is_answered = True
        self._entries = entries
        self._judge.observe({peer_id: beat for peer_id, (_, beat) in entries.items()})
        self._tell_if_changed()
        for peer_id, last in self._judge.long_dead():
            with contextlib.suppress(SeamountError):
                await self._directory.remove(peer_id, last)

    def _tell_if_changed(self) -> None:
        alive = frozenset((peer.record.peer_id, peer.record.instance) for peer in self.peers())
        if alive != self._alive:
            self._alive = alive
            self._changed.set()
            self._changed = asyncio.Event()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
