"""A Ray cluster of this machine alone, for as long as the process that starts it.

It listens on loopback only and asks for a token all the same, since other users of the machine reach loopback, too.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from seamount.wire.errors import FailedPrecondition

_TOKEN = secrets.token_hex(32)  # Ray reads it once a process, so a second cluster of the process has the same
_OBJECT_STORE_BYTES = 100 << 20  # next to nothing passes through it


class LocalRay:
    """Started by ``start``, ended by ``stop``; its logs lie in ``<run_dir>/ray-logs`` afterwards."""

    def __init__(self, temp_dir: Path, log_dir: Path) -> None:
        self._temp_dir = temp_dir
        self._log_dir = log_dir

    @staticmethod
    def start(run_dir: Path) -> LocalRay:
        """Start Ray and connect to it. Raises ``FailedPrecondition`` where Ray was imported before: it would not see
        that it is to listen on loopback and to ask for the token."""
        if "ray" in sys.modules and os.environ.get("RAY_AUTH_TOKEN") != _TOKEN:
            raise FailedPrecondition(
                "Ray was imported before it could be told to stay on loopback: call ray.init() yourself, or import "
                "nothing of Ray before",
                reason="RAY_IMPORTED_EARLY",
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        # Ray's sockets lie below its folder and their paths must stay under 108 bytes: a short folder of its own.
        temp_dir = Path(tempfile.mkdtemp(prefix="seamount-ray-"))
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=_TOKEN,
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # Ray's name for: the node's address is 127.0.0.1
            RAY_USAGE_STATS_ENABLED="0",
        )
        import ray  # reads the variables above when it is first imported

        ray.init(
            address="local",
            _temp_dir=str(temp_dir),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
        return LocalRay(temp_dir, run_dir / "ray-logs")

    @staticmethod
    def is_needed() -> bool:
        """Whether this process is not connected to a Ray cluster already."""
        ray = sys.modules.get("ray")
        return ray is None or not ray.is_initialized()

    def stop(self) -> None:
        """End every process of the cluster, keep its logs. Harmless when repeated."""
        import ray

        ray.shutdown()
        logs = self._temp_dir / "session_latest" / "logs"
        if logs.is_dir():
            shutil.rmtree(self._log_dir, ignore_errors=True)
            shutil.copytree(logs, self._log_dir, symlinks=True, ignore_dangling_symlinks=True)
        shutil.rmtree(self._temp_dir, ignore_errors=True)
