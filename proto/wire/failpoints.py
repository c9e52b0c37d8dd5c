"""Named points at which a process reports and waits, so that a test can kill or stop it exactly there.

Off unless the process was started with a ``Listener``: a unix socket, which no other machine reaches, and only where
the process itself listens on loopback (``cluster/process.py`` checks that). A process that reaches a point writes one
line of JSON, ``{"point": …, "at": …, "pid": …}``, and waits for a line in answer: ``go``, or ``damage``. The thread
that came there waits, an event loop with all that runs on it; other threads go on. A listener that is gone lets all
pass.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import dataclass
from io import BufferedRWPair
from pathlib import Path

from seamount.wire.errors import InvalidArgument

POINTS = frozenset(
    {
        "rank.token",  # a token is sampled, nobody has heard of it; at: its output index
        "rank.finished",  # all tokens are told, the account of the request is not
        "rank.frame",  # a frame of cache entries is about to be queued for another rank, or damaged; at: layer:position
        "migrate.held",  # the source has pinned what it has, nothing is sent; at: the session
        "migrate.received",  # all has arrived here, the source does not know; at: the session
        "router.begun",  # the session is taken for a turn, nothing of it is made; at: the turn's epoch
        "router.append",  # the log has been composed, and is about to be written; at: ids of the entries
        "router.appended",  # tokens are logged, their events are not told; at: ids of the entries
        "router.commit",  # the turn is computed, its record is about to be written; at: its output's length
        "router.committed",  # the record is written, the end of the turn is not told; at: its output's length
        "router.end_read",  # a turn that runs elsewhere was read, and is about to be ended; at: the log's last id
        "router.take_over",  # a turn without a router was read, and is about to be taken; at: its epoch
        "router.taken",  # it is taken under a new epoch, and nobody works on it; at: the new epoch
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who is told. ``points``: those at which it is; ``InvalidArgument`` for an unknown one."""

    path: Path
    points: frozenset[str] = POINTS

    def __post_init__(self) -> None:
        if unknown := sorted(self.points - POINTS):
            raise InvalidArgument(f"there are no failpoints {unknown}; there are {sorted(POINTS)}", field="failpoints")


_listener: Listener | None = None
_connections = threading.local()


def turn_on(listener: Listener) -> None:
    """Report to ``listener`` from now on; once, at the start of a process."""
    global _listener  # points lie in every layer, and cost one look at this while it is None
    _listener = listener


def reached(point: str, at: object = "") -> bool:
    """Report, and wait for the answer: whether what is made here is to be damaged. False at once while off."""
    if _listener is None:
        return False
    return _report(_listener, point, at)


def _report(listener: Listener, point: str, at: object) -> bool:
    assert point in POINTS, f"{point} is no failpoint"
    if point not in listener.points:
        return False
    try:
        connection = _connection(listener)
        connection.write(json.dumps({"point": point, "at": str(at), "pid": os.getpid()}).encode() + b"\n")
        connection.flush()
        return connection.readline() == b"damage\n"
    except OSError:
        return False


def _connection(listener: Listener) -> BufferedRWPair:
    """One a thread: while one waits at a point, others pass theirs."""
    known: BufferedRWPair | None = getattr(_connections, "file", None)
    if known is None:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(listener.path))
        known = _connections.file = client.makefile("rwb")
        client.close()  # the file keeps the connection
    return known
