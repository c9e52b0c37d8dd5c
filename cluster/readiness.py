"""An application whose start waits until this Ray cluster has come up.

KubeRay turns to a new Ray cluster, and deletes the old one some time after, as soon as every application that Serve
knows there is RUNNING. Fleet and router are before there is any gang, and again in the pause after one has failed. This
one is RUNNING once the fleet has seen as many gangs ready as were wanted (``fleet_siblings.needed_to_serve``), and
comes back at once from then on, whatever becomes of the gangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import redis
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    retry_if_not_result,
    stop_after_delay,
    wait_fixed,
)

from seamount.cluster.fleet_state import FleetState, Progress
from seamount.cluster.serve_status import explanation
from seamount.wire.errors import DeadlineExceeded
from seamount.workers.spec import PoolName

READINESS_APPLICATION = "readiness"
DEFAULT_START_TIMEOUT_S = 900.0
_POLL_S = 1.0
_MAX_MISSING = 5
_MAX_EXPLANATION = 200


async def wait_until_up(
    state: FleetState, applications: Callable[[], Mapping[str, Any]], *, timeout_s: float, poll_s: float = _POLL_S
) -> None:
    """Returns when the fleet of this Ray cluster has noted that it has come up; at once where it had before.

    applications: what Serve has now, for the error. A Redis that does not answer is waited for.
    Raises ``DeadlineExceeded`` (GANGS_MISSING) after ``timeout_s``, with what is missing.
    """

    patient = AsyncRetrying(
        retry=retry_if_exception_type(redis.RedisError) | retry_if_not_result(bool),
        stop=stop_after_delay(timeout_s),
        wait=wait_fixed(poll_s),
    )
    try:
        await patient(asyncio.to_thread, state.has_served)
    except RetryError:
        missing = await asyncio.to_thread(_missing_now, state, applications)
        raise DeadlineExceeded(
            f"not all gangs serve after {timeout_s:g} s: {missing}", reason="GANGS_MISSING"
        ) from None


def _missing_now(state: FleetState, applications: Callable[[], Mapping[str, Any]]) -> str:
    try:
        progress = state.progress()
    except redis.RedisError as error:
        return f"Redis does not answer ({type(error).__name__})"
    return what_is_missing(progress, applications())


def what_is_missing(progress: Mapping[PoolName, Progress], applications: Mapping[str, Any]) -> str:
    """Pools that are short of gangs, and what Serve says of the applications that do not run."""
    pools = [
        f"{pool} {one.num_ready} of {one.num_wanted}"
        for pool, one in progress.items()
        if one.num_ready < one.num_wanted
    ]
    waiting = [
        f"{name}: {explanation(application)[:_MAX_EXPLANATION] or application.status.value}"
        for name, application in sorted(applications.items())
        if application.status.value != "RUNNING" and name != READINESS_APPLICATION
    ]
    left = [f"and {len(waiting) - _MAX_MISSING} more"] if len(waiting) > _MAX_MISSING else []
    said = pools or ([] if progress else ["the fleet has not told what it wants"])
    return "; ".join([*said, *waiting[:_MAX_MISSING], *left])
