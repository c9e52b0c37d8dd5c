"""From one ``Settings`` to what each process is told."""

from __future__ import annotations

import uuid
from pathlib import Path

from seamount.cluster.sections import PoolSettings
from seamount.cluster.settings import Settings
from seamount.router.placement import PathRules
from seamount.router.spec import RouterSpec, SamplingDefaults
from seamount.wire.credentials import read_secret
from seamount.wire.ids import GangId, RankId, RouterId
from seamount.workers.spec import PoolName, RankSpec


def pool_settings(settings: Settings, pool: PoolName) -> PoolSettings:
    """The settings of one pool by name."""
    return settings.pools.prefill if pool == "prefill" else settings.pools.decode


def gang_ids(settings: Settings, pool: PoolName) -> list[GangId]:
    """Names of the pool's gangs: ``decode-0`` and so on."""
    return [GangId(f"{pool}-{number}") for number in range(pool_settings(settings, pool).gangs)]


def rank_spec(
    settings: Settings,
    *,
    pool: PoolName,
    gang_id: GangId,
    gang_rank: int,
    host: str,
    metrics_host: str,
    allow_forced_tokens: bool = False,
) -> RankSpec:
    """What rank ``gang_rank`` of a gang is told; ``host`` and ``metrics_host``: addresses of its own node."""
    engine = settings.engine
    return RankSpec(
        rank_id=RankId(f"{gang_id}.{gang_rank}"),
        gang_id=gang_id,
        pool=pool,
        gang_rank=gang_rank,
        gang_size=pool_settings(settings, pool).expert_parallel,
        model_path=settings.model.path,
        layout=settings.cache.layout,
        dtype=settings.cache.dtype,
        num_pages=settings.cache.num_pages,
        host_cache_bytes=settings.cache.host_cache_bytes,
        disk_cache_dir=settings.cache.disk_cache_dir,
        disk_cache_bytes=settings.cache.disk_cache_bytes,
        max_batch_tokens=engine.max_batch_tokens,
        prefill_chunk_tokens=engine.prefill_chunk_tokens,
        max_running=engine.max_running,
        max_context_tokens=engine.max_context_tokens,
        step_timeout_s=engine.step_timeout_s,
        host=host,
        worker_token=read_token(settings.router.worker_token_file),
        allow_forced_tokens=allow_forced_tokens,
        device=engine.device,
        num_threads=engine.num_threads,
        transfer_timeout_s=settings.transfer.timeout_s,
        max_links=settings.transfer.max_links,
        metrics_host=metrics_host,
        metrics_port=settings.metrics.port,
    )


def router_spec(
    settings: Settings,
    *,
    redis_url: str,
    port: int,
    metrics_host: str,
    advertised_host: str | None = None,
    node_id: str = "",
    allow_forced_tokens: bool = False,
) -> RouterSpec:
    """What a router is told; ``port`` 0 = any free one; ``metrics_host``, ``advertised_host``, ``node_id``: of its own
    node."""
    router = settings.router
    return RouterSpec(
        router_id=RouterId(f"router-{uuid.uuid4().hex[:12]}"),
        cluster_name=settings.cluster_name,
        redis_url=redis_url,
        model_path=settings.model.path,
        model_name=settings.model.name,
        max_context_tokens=settings.engine.max_context_tokens,
        defaults=SamplingDefaults(**router.sampling.model_dump()),
        rules=PathRules(
            policy=settings.placement.path, local_append_max_tokens=settings.placement.local_append_max_tokens
        ),
        host=router.host,
        advertised_host=advertised_host,
        node_id=node_id,
        port=port,
        api_key_file=router.api_key_file,
        worker_token=read_token(router.worker_token_file),
        tls_certificate_file=router.tls_certificate_file,
        tls_key_file=router.tls_key_file,
        client_ca_file=router.client_ca_file,
        turn_deadline_s=router.turn_deadline_s,
        max_attempts=settings.placement.max_attempts,
        redis_timeout_s=settings.redis.timeout_s,
        beat_s=settings.directory.beat_s,
        dead_after_s=settings.directory.dead_after_s,
        call_timeout_s=settings.engine.step_timeout_s,
        progress_timeout_s=settings.engine.step_timeout_s,
        token_log_kept_s=router.token_log_kept_s,
        cut_ahead=router.cut_ahead,
        metrics_host=metrics_host,
        metrics_port=settings.metrics.port,
        allow_forced_tokens=allow_forced_tokens,
    )


def read_token(path: Path | None) -> str | None:
    """The secret that routers and ranks share; None for no file. Raises as ``read_secret`` does."""
    return None if path is None else read_secret(path, field="router.worker_token_file")
