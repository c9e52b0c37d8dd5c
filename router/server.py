"""A router: everything that one process needs to serve clients, put together and taken down in order."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack, suppress
from importlib.metadata import version

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from seamount.router.admin_service import AdminService
from seamount.router.admission import Admission
from seamount.router.cut_ahead import CutAhead
from seamount.router.deletions import Deletions
from seamount.router.directory import PeerRecord, Role, new_instance
from seamount.router.followed_turns import FollowedTurns
from seamount.router.inference_service import InferenceService
from seamount.router.metrics import RouterMetrics, RouterView
from seamount.router.model import ServedModel
from seamount.router.moves import Moves
from seamount.router.own_load import OwnLoad
from seamount.router.ranks import Ranks
from seamount.router.rendering import Rendering
from seamount.router.retention import Retention
from seamount.router.router_links import RouterLinks
from seamount.router.session_names import load_or_create_secret
from seamount.router.session_service import SessionService
from seamount.router.sessions import Sessions
from seamount.router.spec import RouterSpec
from seamount.router.store import Store
from seamount.router.take_over import OwnerJudge, TakeOver
from seamount.router.tenants import read_api_keys, router_interceptors
from seamount.router.token_log import TokenLog
from seamount.router.tool_waits import ToolWaits
from seamount.router.turn_maker import TurnMaker
from seamount.router.turns import Turns
from seamount.router.watcher import Directory, DirectoryWatcher, Registration
from seamount.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from seamount.wire import limits
from seamount.wire.credentials import server_credentials
from seamount.wire.interceptors import listening
from seamount.wire.metrics import MetricsEndpoint, new_registry

_LOG = logging.getLogger(__name__)
_HEALTH_POLL_S = 0.25
_SERVICES = (
    session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


class RouterServer:
    """One router. ``start`` once, ``stop`` at the end; the parts it owns are closed in the reverse order."""

    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        self._health = health.aio.HealthServicer()
        self._parts = AsyncExitStack()
        self._turns: Turns | None = None
        self._inference: InferenceService | None = None
        self._take_over: TakeOver | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._registry = new_registry()
        self._metrics = RouterMetrics(self._registry)
        self.metrics_address = ""

    async def start(self) -> str:
        """Connect to Redis, follow the directory, serve; returns ``host:port`` as others reach it.

        Raises typed errors for an unusable checkpoint, key file or Redis; nothing stays open then.
        """
        try:
            return await self._start()
        except BaseException:
            await self._parts.aclose()
            raise

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, let turns end for ``grace_s``, close. Idempotent; also after a failed start."""
        await self._health.enter_graceful_shutdown()
        if self._health_task is not None:
            self._health_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._health_task
            self._health_task = None
        if self._take_over is not None:
            await self._take_over.stop()
        if self._turns is not None and self._inference is not None:
            await asyncio.gather(self._turns.stop(grace_s), self._inference.stop(grace_s))
        await self._parts.aclose()

    async def leave_and_stop(self, grace_s: float) -> None:
        """``stop``, under the name that all processes have."""
        await self.stop(grace_s)

    def healthy(self) -> bool:
        """Whether the router can answer at all; that a decode rank is alive shows in its gRPC health."""
        return self._health_task is not None and not self._health_task.done()

    async def _start(self) -> str:
        spec, parts = self.spec, self._parts
        keys = read_api_keys(spec.api_key_file) if spec.api_key_file is not None else None
        model = ServedModel.load(spec.model_path, name=spec.model_name, max_context_tokens=spec.max_context_tokens)
        metrics = self._metrics
        store = await Store.open(
            spec.redis_url, command_timeout_s=spec.redis_timeout_s, on_attempt=metrics.redis_attempt
        )
        parts.push_async_callback(store.close)
        secret = await load_or_create_secret(store)
        sessions = Sessions(
            store,
            secret=secret,
            router_id=spec.router_id,
            cluster=spec.cluster_name,
            log_kept_s=spec.token_log_kept_s,
        )
        parts.push_async_callback(sessions.close)
        token_log = TokenLog(sessions)
        parts.push_async_callback(token_log.close)
        directory = Directory(store, spec.cluster_name)
        watcher = DirectoryWatcher(directory, dead_after_s=spec.dead_after_s)
        await watcher.start()
        parts.push_async_callback(watcher.stop)
        ranks = Ranks(
            watcher=watcher,
            worker_token=spec.worker_token,
            call_timeout_s=spec.call_timeout_s,
            progress_timeout_s=spec.progress_timeout_s,
        )
        await ranks.start()
        parts.push_async_callback(ranks.stop)
        rendering = Rendering(model.history)
        parts.callback(rendering.close)
        moves = Moves(store, spec.cluster_name)
        turns = Turns(
            model=model,
            sessions=sessions,
            rendering=rendering,
            admission=Admission(spec=spec, model=model, sessions=sessions, rendering=rendering),
            maker=TurnMaker(
                spec=spec,
                model=model,
                ranks=ranks,
                rendering=rendering,
                token_log=token_log,
                secret=secret,
                moves=moves,
            ),
            followed=FollowedTurns(model=model, sessions=sessions, rendering=rendering),
            retention=Retention(sessions=sessions, ranks=ranks, waits=ToolWaits(store), metrics=metrics),
            cut_ahead=CutAhead(spec=spec, ranks=ranks, rendering=rendering, secret=secret),
            deletions=Deletions(store),
            metrics=metrics,
        )
        inference = InferenceService(
            spec=spec, model=model, ranks=ranks, rendering=rendering, secret=secret, metrics=metrics
        )
        self._turns, self._inference = turns, inference

        server = grpc.aio.server(interceptors=router_interceptors(keys), options=_server_options())
        session_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionService(model=model, sessions=sessions, turns=turns, retention=turns.retention, metrics=metrics),
            server,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(ranks=ranks, moves=moves), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = self._listen(server)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        parts.push_async_callback(server.stop, 0.5)
        address = f"{spec.advertised_host or spec.host}:{port}"
        load = OwnLoad(lambda: turns.num_running + len(inference.running))
        registration = Registration(directory, self._record(address), state=load.state, interval_s=spec.beat_s)
        await registration.start()
        parts.push_async_callback(registration.stop)
        links = RouterLinks(
            router_id=spec.router_id,
            address=address,
            speaks_tls=spec.tls_certificate_file is not None,
            watcher=watcher,
        )
        await links.start()
        parts.push_async_callback(links.stop)
        self._take_over = TakeOver(
            router_id=spec.router_id,
            index=sessions.index,
            turns=turns,
            watcher=watcher,
            judge=OwnerJudge(absent_after_s=spec.dead_after_s),
        )
        self._take_over.start()
        self._health_task = asyncio.create_task(self._follow_health(ranks), name="health")
        metrics.follow(lambda: _view(turns, ranks))
        endpoint = MetricsEndpoint(self._registry, host=spec.metrics_host, port=spec.metrics_port)
        parts.callback(endpoint.close)
        self.metrics_address = endpoint.address
        ready = {"router_id": spec.router_id, "port": port, "metrics": endpoint.address}
        _LOG.info("router_ready", extra=ready)
        return address

    def _listen(self, server: grpc.aio.Server) -> int:
        spec = self.spec
        address = f"{spec.host}:{spec.port}"
        if spec.tls_certificate_file is None or spec.tls_key_file is None:
            return listening(server.add_insecure_port, address, field="router.port")
        credentials = server_credentials(
            spec.tls_certificate_file, spec.tls_key_file, client_ca_file=spec.client_ca_file
        )
        return listening(lambda where: server.add_secure_port(where, credentials), address, field="router.port")

    def _record(self, address: str) -> PeerRecord:
        return PeerRecord(
            peer_id=self.spec.router_id,
            role=Role.ROUTER,
            address=address,
            version=version("seamount"),
            process_id=os.getpid(),
            instance=new_instance(),
            node_id=self.spec.node_id,
        )

    async def _follow_health(self, ranks: Ranks) -> None:
        """SERVING exactly while a decode rank can answer."""
        while True:
            serving = bool(ranks.loads(Role.DECODE))
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            await self._health.set("", status)
            await asyncio.sleep(_HEALTH_POLL_S)


def _view(turns: Turns, ranks: Ranks) -> RouterView:
    num_ranks = {role.value: len(ranks.loads(role)) for role in (Role.PREFILL, Role.DECODE)}
    return RouterView(num_running_turns=turns.num_running, num_ranks=num_ranks, num_rank_deaths=ranks.deaths.num_noted)


def _server_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 1),  # routers on one node share the port
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),  # clients ping every 3 s
        # A router that was starved of CPU reads several pings at once: its streams shall not end for that.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
