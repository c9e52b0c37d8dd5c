"""The directory as the fleet sees it, and its calls to ranks: an event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Collection, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from seamount.cluster.fleet_meter import SeenRank, router_load
from seamount.cluster.load import RouterLoad
from seamount.cluster.settings import Settings
from seamount.cluster.specs import read_token
from seamount.router.directory import Liveness, PeerRecord, Role
from seamount.router.moves import Moves, drained
from seamount.router.ranks import Ranks
from seamount.router.store import Store
from seamount.router.watcher import Directory, DirectoryWatcher
from seamount.v1 import admin_pb2
from seamount.wire.errors import SeamountError, Unavailable
from seamount.wire.ids import RankId

_LOG = logging.getLogger("seamount.fleet")
_CONNECT_AGAIN_S = 1.0
_ANSWER_S = 5.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Who is alive now, in every Ray cluster of the cluster name. routers: with their directory record."""

    ranks: tuple[SeenRank, ...] = ()
    routers: tuple[tuple[PeerRecord, RouterLoad], ...] = ()


class FleetView:
    """``start`` once, ``stop`` at the end; all other methods may be called from any thread."""

    def __init__(self, settings: Settings) -> None:
        """settings: with the ``redis_url`` in force."""
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._parts = AsyncExitStack()
        self._ranks: Ranks | None = None
        self._moves: Moves | None = None
        self._following: concurrent.futures.Future[None] | None = None

    def start(self) -> None:
        """Returns at once: a Redis that is away is waited for."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet view", daemon=True)
        self._thread.start()
        self._following = self._soon(self._follow())

    def stop(self) -> None:
        """Harmless to repeat."""
        if self._loop is None or self._thread is None:
            return
        if self._following is not None:
            self._following.cancel()
        self._soon(self._parts.aclose()).result(_ANSWER_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER_S)
        self._loop.close()
        self._loop = None

    def look(self) -> View:
        """Empty until the directory has been read."""
        if self._loop is None:
            return View()
        return self._soon(self._look()).result(_ANSWER_S)

    def drain(
        self, rank_id: RankId, *, deadline_s: float, turns_s: float, excluded: Collection[RankId]
    ) -> concurrent.futures.Future[admin_pb2.DrainRankResponse]:
        """Have a decode rank hand its sessions to others; as ``moves.drained``, whose errors it raises."""
        return self._soon(self._drain(rank_id, deadline_s=deadline_s, turns_s=turns_s, excluded=excluded))

    async def _drain(
        self, rank_id: RankId, *, deadline_s: float, turns_s: float, excluded: Collection[RankId]
    ) -> admin_pb2.DrainRankResponse:
        if self._ranks is None or self._moves is None:
            raise Unavailable("the directory has not been read yet", reason="NO_DIRECTORY", retry_after_s=1.0)
        return await drained(
            self._ranks, self._moves, rank_id, deadline_s=deadline_s, turns_s=turns_s, excluded=excluded
        )

    async def _follow(self) -> None:
        settings = self._settings
        assert settings.redis_url is not None
        while self._ranks is None:
            try:
                store = await Store.open(
                    settings.redis_url.get_secret_value(), command_timeout_s=settings.redis.timeout_s
                )
            except SeamountError as error:
                _LOG.warning("fleet_without_directory", extra={"reason": error.reason})
                await asyncio.sleep(_CONNECT_AGAIN_S)
                continue
            self._parts.push_async_callback(store.close)
            watcher = DirectoryWatcher(
                Directory(store, settings.cluster_name), dead_after_s=settings.directory.dead_after_s
            )
            await watcher.start()
            self._parts.push_async_callback(watcher.stop)
            ranks = Ranks(
                watcher=watcher,
                worker_token=read_token(settings.router.worker_token_file),
                call_timeout_s=settings.engine.step_timeout_s,
                progress_timeout_s=settings.engine.step_timeout_s,
            )
            await ranks.start()
            self._parts.push_async_callback(ranks.stop)
            self._moves = Moves(store, settings.cluster_name)
            self._ranks = ranks

    async def _look(self) -> View:
        if self._ranks is None:
            return View()
        seen = [
            SeenRank(record=peer.record, state=state)
            for peer, state in self._ranks.all()
            if state is not None and peer.liveness is Liveness.ALIVE
        ]
        routers = [
            (peer.record, router_load(peer.record, peer.state)) for peer in self._ranks.watcher.peers(Role.ROUTER)
        ]
        return View(ranks=tuple(seen), routers=tuple(routers))

    def _soon(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
