"""A rank that stands in the directory: the same class in a plain process and in a Serve replica.

The gang meets through the directory: rank 0 opens the gang's store on its own address and publishes where, under the
gang's id; the others wait for that. A gang's id is new at every start, so an address of an earlier life is never read.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import time

from seamount.cluster.deletions import DeletionFollower
from seamount.cluster.settings import Settings
from seamount.router.deletions import Deletion, Deletions
from seamount.router.directory import PeerRecord, Role, new_instance
from seamount.router.store import Store
from seamount.router.watcher import Directory, Registration
from seamount.wire.errors import SeamountError
from seamount.wire.ids import SessionId
from seamount.workers.core import Rendezvous
from seamount.workers.loading import OnLoading
from seamount.workers.server import RankServer
from seamount.workers.spec import RankSpec

MEETING_TIMEOUT_S = 120.0
"""What the ranks of a gang may start apart; a big node may be slow to import torch."""
_STORE_KEY = "store"
_PUBLISH_TIMEOUT_S = 10.0
_LAST_WORDS_S = 0.1

logger = logging.getLogger("seamount.rank")


class RegisteredRank:
    """``start`` once, ``leave_and_stop`` in the end, also after a start that failed or was cancelled.

    An engine that fails ends the process at once: the gang is replaced sooner than by any health check, and nothing
    this rank still holds open can mislead its peers.
    """

    def __init__(
        self, spec: RankSpec, settings: Settings, *, node_id: str = "", on_loading: OnLoading | None = None
    ) -> None:
        """settings: with the ``redis_url`` in force; node_id: Ray's, if any. on_loading: see ``RankServer``."""
        assert settings.redis_url is not None
        self._spec = spec
        self._settings = settings
        self._node_id = node_id
        self._redis_url = settings.redis_url.get_secret_value()
        self._server = RankServer(spec, on_fatal=self._end_process, on_loading=on_loading)
        self._store: Store | None = None
        self._registration: Registration | None = None
        self._follower: DeletionFollower | None = None

    async def start(self) -> str:
        """Meet the gang, load, serve, register; ``host:port``. Raises typed errors, as ``RankServer.start`` does."""
        self._store = await Store.open(self._redis_url, command_timeout_s=self._settings.redis.timeout_s)
        directory = Directory(self._store, self._settings.cluster_name)
        follower = self._follower = DeletionFollower(Deletions(self._store), self._deleted)
        deleted = await deleted_before(follower, self._spec)
        address = await self._server.start(await self._rendezvous(directory), deleted=deleted)
        follower.start()
        record = self._record(address)
        self._registration = Registration(
            directory, record, state=self._state, interval_s=self._settings.directory.beat_s
        )
        await self._registration.start()
        return address

    @property
    def metrics_address(self) -> str:
        """``host:port`` of ``/metrics``; empty unless the rank serves."""
        return self._server.metrics_address

    def healthy(self) -> bool:
        """Whether the engine's loop answers."""
        return self._server.healthy()

    async def leave_and_stop(self, grace_s: float) -> None:
        """Leave the directory, so that nobody new comes; let streams end for ``grace_s``; stop. Idempotent."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.stop()
        if self._follower is not None:
            await self._follower.stop()
        await self._server.stop(grace_s)
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    async def _rendezvous(self, directory: Directory) -> Rendezvous:
        spec = self._spec
        if spec.gang_size == 1:
            return Rendezvous(host=spec.host)
        if spec.gang_rank > 0:
            found = await directory.wait_for(spec.gang_id, _STORE_KEY, timeout_s=MEETING_TIMEOUT_S)
            host, _, port = found.decode().rpartition(":")
            return Rendezvous(host=host, port=int(port))
        loop = asyncio.get_running_loop()

        def publish(port: int) -> None:  # called on the thread that meets the gang
            where = f"{spec.host}:{port}".encode()
            told = asyncio.run_coroutine_threadsafe(directory.publish(spec.gang_id, _STORE_KEY, where), loop)
            told.result(_PUBLISH_TIMEOUT_S)

        return Rendezvous(host=spec.host, on_listening=publish)

    def _record(self, address: str) -> PeerRecord:
        spec, state = self._spec, self._server.state()
        return PeerRecord(
            peer_id=spec.rank_id,
            role=Role(spec.pool),
            address=address,
            version=importlib.metadata.version("seamount"),
            process_id=os.getpid(),
            instance=new_instance(),
            gang_id=spec.gang_id,
            gang_rank=spec.gang_rank,
            gang_size=spec.gang_size,
            expert_parallel=spec.gang_size,
            layout=state.layout,
            fingerprint=state.fingerprint,
            node_id=self._node_id,
        )

    def _deleted(self, deletion: Deletion) -> None:
        self._server.delete_session(deletion.session_id, deletion.epoch)

    def _state(self) -> bytes:
        """A beat carries the rank's state without its sessions: those are many and change all the time."""
        state = self._server.state()
        state.ClearField("session_ids")
        return state.SerializeToString()

    def _end_process(self, error: SeamountError) -> None:
        logger.critical("engine_failed", extra={"rank_id": self._spec.rank_id, "reason": error.reason})
        time.sleep(_LAST_WORDS_S)  # on the engine's thread: the event loop tells routers what their requests failed of
        os._exit(1)


async def deleted_before(follower: DeletionFollower, spec: RankSpec) -> set[SessionId]:
    """Sessions of which the rank takes nothing over; none for a rank without a disk, which begins with nothing."""
    if spec.disk_cache_dir is None:
        await follower.skip_earlier()
        return set()
    return {one.session_id for one in await follower.earlier()}
