"""What a rank says of itself, to routers and operators."""

from __future__ import annotations

import os

from seamount.v1 import worker_pb2
from seamount.wire import limits
from seamount.workers.cache.retention import Tier
from seamount.workers.core import RankCore
from seamount.workers.spec import RankSpec
from seamount.workers.transfer.transfer import Transfer

_POOLS = {"prefill": worker_pb2.POOL_PREFILL, "decode": worker_pb2.POOL_DECODE}


def rank_state(spec: RankSpec, core: RankCore, transfer: Transfer, *, is_draining: bool) -> worker_pb2.RankState:
    """A snapshot; counts of caches and engine may be a step apart from each other."""
    cache, engine = core.reservations.state(), core.engine.state()
    host, disk = core.reservations.tiers.state(Tier.HOST), core.reservations.tiers.state(Tier.DISK)
    return worker_pb2.RankState(
        rank_id=spec.rank_id,
        gang_id=spec.gang_id,
        gang_rank=spec.gang_rank,
        gang_size=spec.gang_size,
        pool=_POOLS[spec.pool],
        healthy=core.engine.healthy(),
        draining=is_draining,
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
