"""A rank: model, caches, engine, transfer and their gRPC server, put together and taken down in order."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from seamount.kernels.layout import CachePlanes
from seamount.v1 import transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument, SeamountError
from seamount.wire.interceptors import listening, rank_interceptors
from seamount.wire.metrics import MetricsEndpoint, new_registry
from seamount.wire.protocol import rank_call
from seamount.workers.ahead import Ahead
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Tier
from seamount.workers.draining import Draining
from seamount.workers.engine import Engine
from seamount.workers.experts.dispatch import ExpertParallel, GangExperts, LocalExperts
from seamount.workers.gang import Gang
from seamount.workers.late_kernels import LateKernels
from seamount.workers.loading import LoadingProgress, OnLoading
from seamount.workers.metrics import RankMetrics, RankView
from seamount.workers.migration import Migration
from seamount.workers.model.checkpoint_files import model_fingerprint
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.transformer import Transformer
from seamount.workers.model.weights import load_model
from seamount.workers.prefill import Prefill
from seamount.workers.scheduler import EngineLimits
from seamount.workers.service import WorkerService
from seamount.workers.spec import RankSpec
from seamount.workers.tiers.mover import Mover
from seamount.workers.tiers.opening import open_tiers
from seamount.workers.transfer.service import Transfer
from seamount.workers.vocabulary import vocabulary_size
from seamount.workers.warmup import warm_up

_LOG = logging.getLogger(__name__)
_POOLS = {"prefill": worker_pb2.POOL_PREFILL, "decode": worker_pb2.POOL_DECODE}
WATCH_EVERY_S = 0.1
HOUSEKEEPING_S = 1.0
TIERS_GRACE_S = 2.0
"""What copies to disk that wait get when the rank stops."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where a gang meets. Rank 0 opens the store and tells ``on_listening`` its port; the others know host and port."""

    host: str
    port: int = 0
    on_listening: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Core:
    """What is built off the event loop: it takes seconds, and the gang's meeting blocks."""

    model: Transformer
    planes: CachePlanes
    fingerprint: str
    reservations: Reservations
    engine: Engine
    mover: Mover


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What exists once the rank has started."""

    core: _Core
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
        self._on_loading = on_loading
        self._on_fatal = on_fatal
        self._parts: _Parts | None = None
        self._registry = new_registry()
        self._metrics = RankMetrics(self._registry, pool=spec.pool, gang_rank=spec.gang_rank)
        self._late_kernels = LateKernels()
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
        self._parts = parts = self._compose(await asyncio.to_thread(self._build, rendezvous, deleted))
        server = grpc.aio.server(
            interceptors=rank_interceptors(self.spec.worker_token),
            options=[
                ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(parts.service, server)
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(parts.transfer, server)
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
        spec, core, transfer = self.spec, self._parts.core, self._parts.transfer
        cache, engine = core.reservations.state(), core.engine.state()
        host, disk = core.reservations.tiers.state(Tier.HOST), core.reservations.tiers.state(Tier.DISK)
        return worker_pb2.RankState(
            rank_id=spec.rank_id,
            gang_id=spec.gang_id,
            gang_rank=spec.gang_rank,
            gang_size=spec.gang_size,
            pool=_POOLS[spec.pool],
            healthy=core.engine.healthy(),
            draining=self._draining or self._parts.service.draining.has_begun,
            num_pages=cache.num_pages,
            num_free_pages=cache.num_free,
            num_cached_pages=cache.num_cached,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_queued_prefill_tokens=engine.queued_prefill_tokens,
            num_steps=engine.num_steps,
            num_computed_tokens=engine.num_computed_tokens,
            num_sampled_tokens=engine.num_sampled_tokens,
            expert_bytes=core.model.expert_bytes,
            num_reservations=cache.num_reservations,
            prefill_tokens_per_s=engine.prefill_tokens_per_s,
            pull_bytes_per_s=transfer.pull_bytes_per_s,
            push_bytes_per_s=transfer.push_bytes_per_s,
            session_ids=core.reservations.sessions.cached(limits.MAX_LISTED_SESSIONS),
            layout=core.model.layout.signature,
            fingerprint=core.fingerprint,
            process_id=os.getpid(),
            kv_bytes_per_token=transfer.kv_bytes_per_token,
            num_leased_pages=cache.num_leased,
            num_superseded_pages=cache.num_superseded,
            num_host_pages=host.num_pages,
            num_host_cached_pages=host.num_cached,
            num_host_superseded_pages=host.num_superseded,
            num_disk_pages=disk.num_pages,
            num_disk_cached_pages=disk.num_cached,
            num_disk_superseded_pages=disk.num_superseded,
            host_bytes_per_s=core.mover.rates.host,
            disk_bytes_per_s=core.mover.rates.disk,
            num_blocked=engine.num_blocked,
            num_places=spec.max_running,
            answer_s=engine.answer_s,
            num_prepared_tokens=engine.num_background_tokens,
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

    def _build(self, rendezvous: Rendezvous, deleted: Collection[str]) -> _Core:
        spec = self.spec
        torch.set_num_threads(spec.num_threads)
        gang = Gang.join(
            store_host=rendezvous.host,
            store_port=rendezvous.port,
            gang_id=spec.gang_id,
            rank=spec.gang_rank,
            size=spec.gang_size,
            timeout_s=spec.step_timeout_s,
            host_store=spec.gang_rank == 0,
            bind_host=spec.host,
            on_listening=rendezvous.on_listening,
        )
        try:
            return self._build_with(gang, deleted)
        except BaseException:
            gang.close()
            raise

    def _build_with(self, gang: Gang, deleted: Collection[str]) -> _Core:
        spec = self.spec
        config = ModelConfig.from_json(spec.model_path)
        device = _device(spec)
        model = load_model(
            spec.model_path,
            dtype=DTYPES[spec.dtype],
            layout_name=spec.layout,
            experts=_experts(config, gang),
            progress=LoadingProgress(self._on_loading),
            device=device,
        )
        fingerprint = model_fingerprint(spec.model_path)
        planes = model.layout.allocate(config.num_hidden_layers, spec.num_pages, device)
        host, disk = open_tiers(spec, planes, fingerprint=fingerprint, layout=model.layout.signature)
        reservations = Reservations(
            num_pages=spec.num_pages,
            fingerprint=fingerprint,
            layout=model.layout.signature,
            num_below={
                Tier.HOST: 0 if host is None else host.num_pages,
                Tier.DISK: 0 if disk is None else disk.num_pages,
            },
        )
        engine_limits = EngineLimits(
            max_batch_tokens=spec.max_batch_tokens,
            max_running=spec.max_running,
            prefill_chunk_tokens=spec.prefill_chunk_tokens,
            max_context_tokens=spec.max_context_tokens,
        )
        if device.type == "cuda":
            warm_up(model, planes, gang, engine_limits, topk=config.index_topk, num_pages=spec.num_pages)
            self._late_kernels.watch()
        mover = Mover(reservations.tiers, planes, host=host, disk=disk)
        mover.start(deleted)
        engine = Engine(
            model=model,
            planes=planes,
            reservations=reservations,
            gang=gang,
            eos_token_id=config.eos_token_id,
            vocab_limit=min(vocabulary_size(spec.model_path), config.vocab_size),
            limits=engine_limits,
            health_timeout_s=spec.step_timeout_s,
            on_fatal=self._on_fatal,
            on_step=self._metrics.step,
        )
        return _Core(
            model=model,
            planes=planes,
            fingerprint=fingerprint,
            reservations=reservations,
            engine=engine,
            mover=mover,
        )

    def _compose(self, core: _Core) -> _Parts:
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


def _device(spec: RankSpec) -> torch.device:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(
            "engine.device is cuda, and this process sees no CUDA device; give the rank one, or choose cpu",
            field="engine.device",
        )
    return torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")


def _experts(config: ModelConfig, gang: Gang) -> ExpertParallel:
    if gang.size == 1:
        return LocalExperts(config.n_routed_experts)
    assert gang.group is not None
    return GangExperts(gang.group, config.n_routed_experts)
