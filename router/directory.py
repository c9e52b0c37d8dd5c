"""Who is there: ranks and routers, judged by counters that move, never by a key's time to live.

Each peer writes a beat (its counter, and a compact state) under its id; each router polls all beats. A peer is dead
when its counter stood still for ``dead_after_s`` of the observer's own time *while Redis answered*, or at once when a
stream to it broke, until both the stream is back and the counter moves again. While Redis is away nobody is judged.
"""

from __future__ import annotations

import enum
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from seamount.wire.errors import InvalidArgument

REMOVE_AFTER_S = 60.0
MAX_COUNTED_GAP_S = 1.0
"""Between two polls at most this much is counted: an observer that was itself stopped blames nobody for it."""


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"


class Liveness(enum.Enum):
    UNKNOWN = "unknown"
    """Nothing has been read yet: judge nobody."""
    ABSENT = "absent"
    """Left, removed, or never there."""
    ALIVE = "alive"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """What a peer says of itself once. ``instance`` is new for each process, also under the same id; ``node_id`` is
    Ray's, empty in plain processes.

    Routers leave gang_id, layout and fingerprint empty and the sizes at their defaults.
    """

    peer_id: str
    role: Role
    address: str
    version: str
    process_id: int
    instance: str
    gang_id: str = ""
    gang_rank: int = 0
    gang_size: int = 1
    expert_parallel: int = 1
    layout: str = ""
    fingerprint: str = ""
    node_id: str = ""

    def __post_init__(self) -> None:
        if not self.peer_id or not self.instance or ":" in self.instance:
            raise InvalidArgument(
                "a peer needs an id and an instance name without colon; use new_instance()", field="peer_id"
            )

    def to_bytes(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(stored: bytes) -> PeerRecord:
        """The inverse; fields of a newer version are passed over. Raises ``ValueError`` for anything else."""
        loaded = json.loads(stored)
        if not isinstance(loaded, dict):
            raise ValueError("a peer's record is a JSON object")
        known: dict[str, Any] = {}
        for field in fields(PeerRecord):
            if field.name in loaded:
                value = loaded[field.name]
                wanted = int if field.type == "int" else str
                if type(value) is not wanted:
                    raise ValueError(f"{field.name} of a peer's record is not of type {wanted.__name__}")
                known[field.name] = value
        try:
            known["role"] = Role(known["role"])
            return PeerRecord(**known)
        except (KeyError, TypeError, InvalidArgument) as error:
            raise ValueError("a peer's record lacks a field") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One beat: whose process, its how-manieth, and the peer's own state, opaque here."""

    instance: str
    counter: int
    state: bytes = b""

    def to_bytes(self) -> bytes:
        return f"{self.instance}:{self.counter}:".encode() + self.state

    @staticmethod
    def from_bytes(stored: bytes) -> Beat:
        """The inverse. Raises ``ValueError`` for anything else."""
        instance, counter, state = stored.split(b":", 2)
        return Beat(instance=instance.decode(), counter=int(counter), state=state)


def new_instance() -> str:
    """A name for this process, never used before."""
    return secrets.token_hex(8)


@dataclass(slots=True)
class _Watched:
    """What the judge knows of one peer. ``still_s``: counted time since its counter moved."""

    beat: Beat
    still_s: float = 0.0
    broken: bool = False
    baseline: int | None = None  # the counter at the first poll after the break: a beat from before proves nothing
    moved_since_break: bool = False
    stream_back: bool = False


class PeerJudge:
    """Who is alive, from polls alone. Pure: the clock is passed in, nothing is read or written here."""

    def __init__(self, *, dead_after_s: float, clock: Callable[[], float]) -> None:
        self._dead_after_s = dead_after_s
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._answered_at: float | None = None
        self._has_read = False

    def observe(self, beats: Mapping[str, Beat]) -> None:
        """Redis answered with all beats. The time since the poll before counts if that one was answered too."""
        now = self._clock()
        counted_s = 0.0 if self._answered_at is None else min(now - self._answered_at, MAX_COUNTED_GAP_S)
        self._answered_at, self._has_read = now, True
        self._watched = {
            peer_id: self._judged(self._watched.get(peer_id), beat, counted_s) for peer_id, beat in beats.items()
        }

    def missed(self) -> None:
        """Redis did not answer a poll: the time around it counts for nobody."""
        self._answered_at = None

    def mark_broken(self, peer_id: str) -> None:
        """A stream to the peer broke: dead at once. Unknown ids are ignored."""
        watched = self._watched.get(peer_id)
        if watched is not None:
            watched.broken, watched.baseline = True, None
            watched.moved_since_break = watched.stream_back = False

    def mark_connected(self, peer_id: str) -> None:
        """A stream to the peer stands again. Unknown ids are ignored."""
        watched = self._watched.get(peer_id)
        if watched is not None:
            watched.stream_back = True
            _heal(watched)

    def liveness(self, peer_id: str) -> Liveness:
        watched = self._watched.get(peer_id)
        if watched is None:
            return Liveness.ABSENT if self._has_read else Liveness.UNKNOWN
        dead = watched.broken or watched.still_s >= self._dead_after_s
        return Liveness.DEAD if dead else Liveness.ALIVE

    def long_dead(self) -> list[tuple[str, Beat]]:
        """Peers whose counter stood still for ``REMOVE_AFTER_S``, with the beat they stopped at."""
        return [
            (peer_id, watched.beat)
            for peer_id, watched in self._watched.items()
            if watched.still_s >= max(REMOVE_AFTER_S, self._dead_after_s)
        ]

    def _judged(self, watched: _Watched | None, beat: Beat, counted_s: float) -> _Watched:
        if watched is None or watched.beat.instance != beat.instance:
            return _Watched(beat=beat)  # another process: nothing of the old one counts
        if watched.broken:
            if watched.baseline is None:
                watched.baseline = beat.counter
            elif beat.counter != watched.baseline:
                watched.moved_since_break = True
        watched.still_s = watched.still_s + counted_s if beat.counter == watched.beat.counter else 0.0
        watched.beat = beat
        _heal(watched)
        return watched


def _heal(watched: _Watched) -> None:
    if watched.broken and watched.moved_since_break and watched.stream_back:
        watched.broken = False
