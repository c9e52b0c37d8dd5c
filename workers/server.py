"""A rank: model, caches, engine, transfer and their gRPC server, put together and taken down in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from seamount.v1 import transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from seamount.wire import limits
from seamount.wire.errors import SeamountError
from seamount.wire.interceptors import listening, rank_interceptors
from seamount.wire.metrics import MetricsEndpoint, new_registry
from seamount.wire.protocol import rank_call
from seamount.workers.ahead import Ahead
from seamount.workers.core import RankCore, RankHooks, Rendezvous, build_core
from seamount.workers.draining import Draining
from seamount.workers.late_kernels import LateKernels
from seamount.workers.loading import OnLoading
from seamount.workers.metrics import RankMetrics, RankView
from seamount.workers.migration import Migration
from seamount.workers.prefill import Prefill
from seamount.workers.rank_state import rank_state
from seamount.workers.service import WorkerService
from seamount.workers.spec import RankSpec
from seamount.workers.transfer.transfer import Transfer

_LOG = logging.getLogger(__name__)
WATCH_EVERY_S = 0.1
HOUSEKEEPING_S = 1.0
TIERS_GRACE_S = 2.0
"""What copies to disk that wait get when the rank stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What exists once the rank has started."""

    core: RankCore
    transfer: Transfer
    service: WorkerService


class RankServer:
    """One rank.

    on_fatal: called once, on any thread, when the engine cannot go on: end the process at once. on_loading: told how
    far the weights are read, at each percent.
    """

    def __init__(
        self, spec: RankSpec, *, on_fatal: Callable[[SeamountError], None], on_loading: OnLoading | None = None
    ) -> None:
        self.spec = spec
        self._parts: _Parts | None = None
        self._registry = new_registry()
        self._metrics = RankMetrics(self._registry, pool=spec.pool, gang_rank=spec.gang_rank)
        self._late_kernels = LateKernels()
        self._hooks = RankHooks(
            on_loading=on_loading, on_warm=self._late_kernels.watch, on_fatal=on_fatal, on_step=self._metrics.step
        )
        self._endpoint: MetricsEndpoint | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._draining = False
        self._housekeeping: asyncio.Task[None] | None = None

    async def start(self, rendezvous: Rendezvous, *, deleted: Collection[str] = ()) -> str:
        """Meet the gang, load the model, serve; returns ``host:port``. deleted: sessions that are no more: what an
        earlier process left of them is not taken over.

        Raises typed errors for an unusable checkpoint or a gang that does not form.
        """
        core = await asyncio.to_thread(build_core, self.spec, rendezvous, self._hooks, deleted=deleted)
        self._parts = parts = self._compose(core)
        server = grpc.aio.server(
            interceptors=rank_interceptors(self.spec.worker_token),
            options=[
                ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(parts.service, server)
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(parts.transfer.service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = listening(server.add_insecure_port, f"{self.spec.host}:{self.spec.port}", field="pools.host")
        await server.start()
        self._server = server
        parts.service.draining.address = f"{self.spec.host}:{port}"
        parts.core.engine.start()
        parts.service.ahead.start()
        self._housekeeping = asyncio.create_task(self._keep_house())
        self._metrics.follow(self._view)
        self._endpoint = MetricsEndpoint(self._registry, host=self.spec.metrics_host, port=self.spec.metrics_port)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        ready = {"rank_id": self.spec.rank_id, "pool": self.spec.pool, "port": port, "metrics": self.metrics_address}
        _LOG.info("rank_ready", extra=ready)
        return f"{self.spec.host}:{port}"

    def delete_session(self, session_id: str, epoch: int) -> None:
        """``SessionDoor.delete``; work ahead of its time ends, too. On the event loop, after ``start``."""
        assert self._parts is not None
        self._parts.service.ahead.came(session_id)
        self._parts.core.reservations.sessions.delete(session_id, epoch)

    async def stop(self, grace_s: float) -> None:
        """Say that it drains, let streams end for ``grace_s``, leave the gang, close. Idempotent."""
        self._draining = True
        await self._health.enter_graceful_shutdown()
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._housekeeping
            self._housekeeping = None
        parts = self._parts
        if parts is not None:
            await self._idle(grace_s)
            await parts.service.ahead.stop()
            await asyncio.to_thread(parts.core.engine.stop)
            await asyncio.to_thread(parts.core.mover.stop, TIERS_GRACE_S)
            await parts.transfer.close()
        if self._server is not None:
            await self._server.stop(0.5)
            self._server = None
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    @property
    def metrics_address(self) -> str:
        """``host:port`` of ``/metrics``; empty unless the rank serves."""
        return self._endpoint.address if self._endpoint is not None else ""

    def healthy(self) -> bool:
        """Whether the engine's loop answers and reservations are looked after; False before ``start``."""
        keeps_house = self._housekeeping is not None and not self._housekeeping.done()
        return keeps_house and self._parts is not None and self._parts.core.engine.healthy()

    def state(self) -> worker_pb2.RankState:
        """What routers and operators see; also what ``WatchState`` sends."""
        assert self._parts is not None
        return rank_state(
            self.spec,
            self._parts.core,
            self._parts.transfer,
            is_draining=self._draining or self._parts.service.draining.has_begun,
        )

    def _view(self) -> RankView:
        assert self._parts is not None
        core = self._parts.core
        return RankView(
            state=self.state(),
            faults=core.engine.faults(),
            tiers=core.reservations.tiers.counts(),
            num_late_kernels=self._late_kernels.count,
        )

    def _compose(self, core: RankCore) -> _Parts:
        spec = self.spec
        transfer = Transfer(
            rank_id=spec.rank_id,
            host=spec.host,
            reservations=core.reservations,
            planes=core.planes,
            layout=core.model.layout,
            fingerprint=core.fingerprint,
            worker_token=spec.worker_token,
            timeout_s=spec.transfer_timeout_s,
            max_links=spec.max_links,
        )

        def abort(reservation_id: str) -> None:
            core.engine.abort(reservation_id)
            transfer.abort(reservation_id)

        core.reservations.on_abort = abort
        prefill = Prefill(
            spec=spec,
            reservations=core.reservations,
            engine=core.engine,
            transfer=transfer,
            num_layers=len(core.planes.latent),
        )
        active: set[str] = set()
        draining = Draining(
            spec=spec,
            reservations=core.reservations,
            active=active,
            abort=core.engine.abort,
            metadata=rank_call(spec.worker_token),
        )
        service = WorkerService(
            spec=spec,
            active=active,
            reservations=core.reservations,
            engine=core.engine,
            prefill=prefill,
            transfer=transfer,
            rates=core.mover.rates,
            migration=Migration(spec=spec, reservations=core.reservations, transfer=transfer),
            ahead=Ahead(reservations=core.reservations, engine=core.engine),
            draining=draining,
            watch=self._watch,
        )
        return _Parts(core=core, transfer=transfer, service=service)

    async def _watch(self) -> AsyncIterator[worker_pb2.RankState]:
        """The state now, at every change (looked for each ``WATCH_EVERY_S``), and once a second."""
        last, unchanged_s = None, 0.0
        while True:
            state = self.state()
            unchanged_s += WATCH_EVERY_S
            if state != last or unchanged_s >= HOUSEKEEPING_S:
                yield state
                last, unchanged_s = state, 0.0
            await asyncio.sleep(WATCH_EVERY_S)

    async def _keep_house(self) -> None:
        assert self._parts is not None
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for reservation_id in tuple(self._parts.service.active):
                with suppress(SeamountError):  # superseded meanwhile
                    self._parts.core.reservations.renew(reservation_id)
            self._parts.core.reservations.expire()

    async def _idle(self, grace_s: float) -> None:
        """Wait until no stream computes, at most ``grace_s``."""
        assert self._parts is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._parts.service.num_streams:  # noqa: ASYNC110 - streams end in several places
                    await asyncio.sleep(0.05)
