"""Emptying a node from outside of the fleet: ask, wait until it is empty, then let Ray close it.

Closed first, Serve would move the gangs by itself, and a stopped raylet runs none of their shutdown hooks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import redis
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from seamount.cluster.environment import REDIS_VARIABLE
from seamount.cluster.fleet_state import connect
from seamount.cluster.node_drain import DrainPhase, DrainRequests, DrainStatus
from seamount.cluster.settings import Settings
from seamount.wire.errors import DeadlineExceeded, FailedPrecondition, Unavailable

TAKEN_UP_S = 20.0
"""A fleet that runs takes a request up sooner: it looks about twice a second."""
GONE_S = 60.0
"""A fleet that has told nothing for so long is gone, as in an uninstallation; one that is replaced needs less."""
CLOSING_S = 30
"""What Ray has to close a node that is empty."""
_POLL_S = 0.25
_COMMAND_TIMEOUT_S = 60.0


def drain_requests(settings: Settings) -> DrainRequests:
    """Of the settings' cluster. Raises ``FailedPrecondition`` (NO_REDIS) where nothing says which Redis it has."""
    if settings.redis_url is None:
        raise FailedPrecondition(
            f"{REDIS_VARIABLE} is not set: set it to the Redis of the running system, or run this in one of its pods",
            reason="NO_REDIS",
        )
    url = settings.redis_url.get_secret_value()
    return DrainRequests(connect(url, timeout_s=settings.redis.timeout_s), settings.cluster_name)


def empty_node(
    drains: DrainRequests,
    node: str,
    *,
    deadline_s: float,
    cause: str,
    on_status: Callable[[DrainStatus], None] = lambda status: None,
    taken_up_s: float | None = None,
    gone_s: float = GONE_S,
) -> DrainStatus:
    """Ask for a node to be emptied and wait until it is; on_status: told at each look.

    Raises ``InvalidArgument`` (node, deadline), ``Unavailable`` where no fleet takes the request up within
    ``taken_up_s`` or the one that did has been silent for ``gone_s`` (NO_FLEET), or Redis stays away
    (STORE_UNAVAILABLE), ``DeadlineExceeded`` (NODE_NOT_EMPTY) at the end of the time; the request stands then.
    taken_up_s: None = ``TAKEN_UP_S``, at most the deadline.
    """
    if taken_up_s is None:
        taken_up_s = min(TAKEN_UP_S, deadline_s)
    patient = Retrying(
        retry=retry_if_exception_type(redis.RedisError),
        stop=stop_after_delay(taken_up_s),
        wait=wait_fixed(_POLL_S),
        retry_error_callback=_redis_is_away,
    )
    patient(drains.request_drain, node, deadline_s=deadline_s, cause=cause)
    began = time.monotonic()
    while True:
        status: DrainStatus | None = patient(drains.drain_status, node)
        if status is None:
            raise Unavailable(f"the drain of {node} was cancelled, or the node is gone", reason="DRAIN_CANCELLED")
        on_status(status)
        waited_s = time.monotonic() - began
        if status.phase is DrainPhase.EMPTY:
            return status
        if status.phase is DrainPhase.ASKED and waited_s > taken_up_s:
            raise Unavailable(
                f"no fleet knows the node {node}: give a Ray node's id, its address or its host name (`ray list "
                "nodes`), and see that the fleet runs (`serve status`)",
                reason="NO_FLEET",
            )
        if min(status.silent_s, waited_s) > gone_s:  # what an earlier fleet told may be old already
            raise Unavailable(
                f"the fleet has said nothing of {node} for {status.silent_s:.0f} s: see that it runs (`serve status`)",
                reason="NO_FLEET",
            )
        if waited_s > deadline_s:
            left = ", ".join((*status.gangs, *status.routers))
            raise DeadlineExceeded(
                f"{node} is not empty after {deadline_s:g} s: {left or status.detail}; what is left goes "
                "without handing over now: ask again to see it through",
                reason="NODE_NOT_EMPTY",
            )
        time.sleep(_POLL_S)


def _redis_is_away(state: RetryCallState) -> NoReturn:
    raise Unavailable("Redis does not answer: see that it runs and can be reached", reason="STORE_UNAVAILABLE")


def close_node(node_id: str, *, message: str, address: str | None = None) -> None:
    """``ray drain-node``: nothing is placed there any more, and its raylet ends. address: Ray's GCS, None = as Ray
    finds it on this machine. Raises ``Unavailable`` (NOT_CLOSED) with what Ray says."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", message]
    command += ["--deadline-remaining-seconds", str(CLOSING_S)]
    if address is not None:
        command += ["--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"ray drain-node of {node_id} does not end", reason="NOT_CLOSED") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Unavailable(f"ray drain-node of {node_id} failed: {' '.join(lines[-1:])[:300]}", reason="NOT_CLOSED")
