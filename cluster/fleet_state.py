"""What one fleet leaves to its successor, in Redis, and what keeps an older fleet from acting after a newer one.

A starting fleet raises the cluster's fleet epoch; every act is admitted under that epoch by one script first, so an
older fleet is refused from then on. An act admitted just before may still reach Serve afterwards; that is harmless,
because names are never used twice: a late start is a gang too many, which the next pass deletes, and a late delete can
only hit the gang that it was decided for.
"""

from __future__ import annotations

from typing import Any

import redis
import redis.backoff
import redis.retry

from seamount.wire.errors import Aborted
from seamount.workers.spec import PoolName

STATE_TTL_S = 7 * 24 * 3600
"""A Ray cluster's fleet state goes so long after its last act; nobody is judged by it."""

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

# KEYS[1] the fleet's hash. ARGV: epoch, failure field. Returns -1 for a stale epoch, else the count so far.
_COUNT_FAILURE = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
return redis.call('HINCRBY', KEYS[1], ARGV[2], 1)
"""


class FleetState:
    """One hash for each (cluster name, Ray cluster).

    Every method may raise ``redis.RedisError``; all but ``claim`` raise ``Aborted`` (STALE_FLEET) once a newer fleet
    has claimed the cluster.
    """

    def __init__(self, client: redis.Redis, *, cluster_name: str, ray_session: str) -> None:
        self._client = client
        self._key = f"seamount:{{{cluster_name}}}:fleet:{ray_session}"
        self._admit = client.register_script(_ADMIT)
        self._count_failure = client.register_script(_COUNT_FAILURE)
        self.epoch = 0

    def claim(self) -> None:
        """Become the cluster's one fleet; every earlier one is refused from now on."""
        self.epoch = int(self._client.hincrby(self._key, "epoch", 1))
        self._client.expire(self._key, STATE_TTL_S)

    def admit_delete(self) -> None:
        self._checked(self._admit(keys=[self._key], args=[self.epoch, "", 0, STATE_TTL_S]))

    def admit_start(self, pool: PoolName, *, lowest: int) -> int:
        """Draws the number of a new gang: at least ``lowest``, and never one that was drawn before."""
        return self._checked(self._admit(keys=[self._key], args=[self.epoch, pool, lowest, STATE_TTL_S]))

    def count_failure(self, pool: PoolName, version: str) -> int:
        return self._checked(self._count_failure(keys=[self._key], args=[self.epoch, _failures(pool, version)]))

    def num_failures(self, pool: PoolName, version: str) -> int:
        count: Any = self._client.hget(self._key, _failures(pool, version))
        return int(count or 0)

    def forget(self) -> None:
        """Removes the state: the Ray cluster is going."""
        self._client.delete(self._key)

    def _checked(self, number: Any) -> int:
        if int(number) < 0:
            raise Aborted(f"fleet epoch {self.epoch} is over: another fleet has taken over", reason="STALE_FLEET")
        return int(number)


def _failures(pool: PoolName, version: str) -> str:
    return f"failures:{pool}:{version}"


def connect(redis_url: str, *, timeout_s: float) -> redis.Redis:
    """A blocking client for the fleet's thread: each command has its time, and is tried again a few times."""
    retry = redis.retry.Retry(redis.backoff.ExponentialBackoff(cap=0.5, base=0.05), retries=3)
    return redis.Redis.from_url(redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry)
