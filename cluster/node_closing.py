"""Emptying a node from outside of the fleet: ask, wait until it is empty, then let Ray close it.

Closed first, Serve would move the gangs by itself, and a stopped raylet runs none of their shutdown hooks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from seamount.cluster.node_drain import DrainPhase, DrainRequests, DrainStatus
from seamount.wire.errors import DeadlineExceeded, Unavailable

TAKEN_UP_S = 20.0
"""A fleet that runs takes a request up sooner: it looks about twice a second."""
CLOSING_S = 30
"""What Ray has to close a node that is empty."""
_POLL_S = 0.25
_COMMAND_TIMEOUT_S = 60.0


def empty_node(
    drains: DrainRequests,
    node: str,
    *,
    deadline_s: float,
    cause: str,
    on_status: Callable[[DrainStatus], None] = lambda status: None,
    taken_up_s: float = TAKEN_UP_S,
) -> DrainStatus:
    """Ask for a node to be emptied and wait until it is; on_status: told at each look.

    Raises ``InvalidArgument`` (node, deadline), ``Unavailable`` (NO_FLEET) where none takes the request up within
    ``taken_up_s``, ``DeadlineExceeded`` (NODE_NOT_EMPTY) at the end of the time; the request stands then.
    """
    drains.request_drain(node, deadline_s=deadline_s, cause=cause)
    began = time.monotonic()
    while True:
        status = drains.drain_status(node)
        if status is None:
            raise Unavailable(f"the drain of {node} was cancelled", reason="DRAIN_CANCELLED")
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
        if waited_s > deadline_s:
            left = ", ".join((*status.gangs, *status.routers))
            raise DeadlineExceeded(
                f"{node} is not empty after {deadline_s:g} s: {left or status.detail}; ask again with a longer "
                "deadline",
                reason="NODE_NOT_EMPTY",
            )
        time.sleep(_POLL_S)


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
