"""What one fleet leaves to its successor, in Redis, and what keeps an older fleet from acting after a newer one.

One Ray cluster has one fleet at a time. Several Ray clusters may serve under one cluster name, as a new image is rolled
out: each has its own fleet and state; they see each other's beats and how many gangs are ready in each, and an older
one gives up as many as a younger one has.

A starting fleet raises the cluster's fleet epoch; every act is admitted under that epoch by one script first, so an
older fleet is refused from then on. An act admitted just before may still reach Serve afterwards; that is harmless,
because names are never used twice: a late start is a gang too many, which the next pass deletes, and a late delete can
only hit the gang that it was decided for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis
import redis.backoff
import redis.retry

from seamount.wire.errors import Aborted
from seamount.workers.spec import PoolName

STATE_TTL_S = 7 * 24 * 3600
"""A Ray cluster's fleet state goes so long after its last beat; nobody is judged by it."""
_SERVED = "served"
_TOLD = ("number", "beat", "progress")
"""What each Ray cluster has in the cluster name's hash."""

# KEYS[1] the fleet's hash. ARGV: epoch, pool ('' = draw no number), lowest number, time to live.
# Returns -1 for a stale epoch, else the number drawn (0 where none was asked for).
_ADMIT = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
redis.call('EXPIRE', KEYS[1], ARGV[4])
if ARGV[2] == '' then return 0 end
local field = 'next:' .. ARGV[2]
local number = math.max(tonumber(redis.call('HGET', KEYS[1], field) or '0'), tonumber(ARGV[3]))
redis.call('HSET', KEYS[1], field, number + 1)
return number
"""

# KEYS[1] the cluster name's hash. ARGV: Ray session. Returns how manieth Ray cluster of this name it is.
_ENTER = """
local known = redis.call('HGET', KEYS[1], 'number:' .. ARGV[1])
if known then return tonumber(known) end
local number = redis.call('HINCRBY', KEYS[1], 'last', 1)
redis.call('HSET', KEYS[1], 'number:' .. ARGV[1], number)
return number
"""

# KEYS[1] the cluster name's hash, the others fleets' hashes. ARGV: their Ray sessions. Removes what is told of those
# whose own hash has gone.
_FORGET_GONE = """
for i, session in ipairs(ARGV) do
    if redis.call('EXISTS', KEYS[i + 1]) == 0 then
        redis.call('HDEL', KEYS[1], 'number:' .. session, 'beat:' .. session, 'progress:' .. session)
    end
end
"""

# KEYS[1] the fleet's hash. ARGV: epoch, field, value. Returns -1 for a stale epoch, else 0.
_REMEMBER = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 0
"""

# KEYS[1] the fleet's hash. ARGV: epoch, failure field. Returns -1 for a stale epoch, else the count so far.
_COUNT_FAILURE = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
return redis.call('HINCRBY', KEYS[1], ARGV[2], 1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Gangs of one pool: that serve and stay (never more than are wanted), and that are wanted."""

    num_ready: int
    num_wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sibling:
    """A Ray cluster of the same name. beat: grows while its fleet lives; is_serving: it has come up, with as many gangs
    as were wanted then; progress: of its pools, nothing where its release does not tell."""

    ray_session: str
    number: int
    beat: int
    is_serving: bool
    progress: Mapping[PoolName, Progress] = field(default_factory=dict)


class FleetState:
    """One hash for each (cluster name, Ray cluster).

    Every method may raise ``redis.RedisError``; all but ``claim`` raise ``Aborted`` (STALE_FLEET) once a newer fleet
    has claimed the cluster.
    """

    def __init__(self, client: redis.Redis, *, cluster_name: str, ray_session: str) -> None:
        self._client = client
        self._cluster_name = cluster_name
        self._key = self._key_of(ray_session)
        self._siblings_key = f"seamount:{{{cluster_name}}}:fleets"
        self._session = ray_session
        self._enter = client.register_script(_ENTER)
        self._remember = client.register_script(_REMEMBER)
        self._admit = client.register_script(_ADMIT)
        self._count_failure = client.register_script(_COUNT_FAILURE)
        self._forget_gone = client.register_script(_FORGET_GONE)
        self.epoch = 0
        self.number = 0
        """How manieth Ray cluster of the name this is; 0 before ``claim``."""

    def claim(self) -> None:
        """Become the cluster's one fleet; every earlier one is refused from now on. Ray clusters of the name that were
        not seen for ``STATE_TTL_S`` are forgotten: should one come back, its fleet is refused and enters anew."""
        self.epoch = int(self._client.hincrby(self._key, "epoch", 1))
        self._client.expire(self._key, STATE_TTL_S)
        self.number = int(self._enter(keys=[self._siblings_key], args=[self._session]))
        names: Any = self._client.hkeys(self._siblings_key)
        told = sorted(
            {session for kind, _, session in (name.decode().partition(":") for name in names) if kind in _TOLD}
        )
        self._forget_gone(keys=[self._siblings_key, *map(self._key_of, told)], args=told)

    def tell_siblings(self, *, is_serving: bool, progress: Mapping[PoolName, Progress]) -> None:
        """One beat; it keeps the state from going, too."""
        told = {pool: [one.num_ready, one.num_wanted] for pool, one in progress.items()}
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(
                self._siblings_key,
                mapping={
                    f"beat:{self._session}": f"{time.time_ns()}:{int(is_serving)}",
                    f"progress:{self._session}": json.dumps(told),
                },
            )
            pipe.expire(self._key, STATE_TTL_S)
            pipe.execute()

    def note_served(self) -> None:
        """This Ray cluster has come up; it stays so, whatever becomes of its gangs."""
        self.remember(_SERVED, 1)

    def has_served(self) -> bool:
        return self.recall(_SERVED) is not None

    def progress(self) -> dict[PoolName, Progress]:
        """What the fleet of this Ray cluster told last; empty before its first beat."""
        return _progress(self._client.hget(self._siblings_key, f"progress:{self._session}"))

    def siblings(self) -> list[Sibling]:
        """The other Ray clusters of this name, dead ones, too."""
        stored: Any = self._client.hgetall(self._siblings_key)
        fields = {name.decode(): value.decode() for name, value in stored.items()}
        found = []
        for name, value in fields.items():
            kind, _, session = name.partition(":")
            if kind == "number" and session != self._session:
                beat, _, serving = fields.get(f"beat:{session}", "0:0").partition(":")
                found.append(
                    Sibling(
                        ray_session=session,
                        number=int(value),
                        beat=int(beat),
                        is_serving=serving == "1",
                        progress=_progress(fields.get(f"progress:{session}")),
                    )
                )
        return found

    def remember(self, field: str, value: float) -> None:
        """A number for the fleets after this one."""
        self._checked(self._remember(keys=[self._key], args=[self.epoch, field, value]))

    def recall(self, field: str, *, of: str | None = None) -> float | None:
        """of: the Ray session of a sibling; None = this one."""
        stored: Any = self._client.hget(self._key if of is None else self._key_of(of), field)
        return None if stored is None else float(stored)

    def note_avoided(self, gang: str, nodes: Collection[str]) -> None:
        """A gang that is about to be started keeps off these nodes, for as long as it lives."""
        self._checked(self._remember(keys=[self._key], args=[self.epoch, f"avoids:{gang}", ",".join(sorted(nodes))]))

    def avoided_by(self, gang: str) -> frozenset[str]:
        stored: Any = self._client.hget(self._key, f"avoids:{gang}")
        return frozenset() if stored is None else frozenset(stored.decode().split(","))

    def admit_delete(self) -> None:
        self._checked(self._admit(keys=[self._key], args=[self.epoch, "", 0, STATE_TTL_S]))

    def admit_start(self, pool: PoolName, *, lowest: int) -> int:
        """Draws the number of a new gang: at least ``lowest``, and never one that was drawn before."""
        return self._checked(self._admit(keys=[self._key], args=[self.epoch, pool, lowest, STATE_TTL_S]))

    def count_failure(self, pool: PoolName, version: str) -> int:
        return self._checked(self._count_failure(keys=[self._key], args=[self.epoch, _failures(pool, version)]))

    def clear_failures(self, pool: PoolName, version: str) -> None:
        """One has come up."""
        self.remember(_failures(pool, version), 0)

    def num_failures(self, pool: PoolName, version: str) -> int:
        count: Any = self._client.hget(self._key, _failures(pool, version))
        return int(count or 0)

    def forget(self) -> None:
        """Removes the state: the Ray cluster is going."""
        self._client.delete(self._key)
        self._client.hdel(self._siblings_key, *(f"{kind}:{self._session}" for kind in _TOLD))

    def _key_of(self, ray_session: str) -> str:
        return f"seamount:{{{self._cluster_name}}}:fleet:{ray_session}"

    def _checked(self, number: Any) -> int:
        if int(number) < 0:
            raise Aborted(f"fleet epoch {self.epoch} is over: another fleet has taken over", reason="STALE_FLEET")
        return int(number)


def _progress(told: Any) -> dict[PoolName, Progress]:
    """told: JSON of ``tell_siblings``, None = nothing."""
    found: dict[PoolName, list[int]] = {} if told is None else json.loads(told)
    return {pool: Progress(num_ready=ready, num_wanted=wanted) for pool, (ready, wanted) in found.items()}


def _failures(pool: PoolName, version: str) -> str:
    return f"failures:{pool}:{version}"


def connect(redis_url: str, *, timeout_s: float) -> redis.Redis:
    """A blocking client for the fleet's thread: each command has its time, and is tried again a few times."""
    retry = redis.retry.Retry(redis.backoff.ExponentialBackoff(cap=0.5, base=0.05), retries=3)
    return redis.Redis.from_url(redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry)
