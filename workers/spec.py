"""What a rank is told when it starts. Nothing here is read from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seamount.wire.ids import GangId, RankId

PoolName = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """One rank: one process, on GPU one device.

    host: the one address that every listener of the rank binds to; port 0 = any free one. ``worker_token``: shared by
    routers and ranks; None only on loopback. ``host_cache_bytes``, ``disk_cache_bytes``: of the tiers below the device,
    0 = none; ``disk_cache_dir`` None = no disk. ``allow_forced_tokens``: tests of plain processes may dictate the
    sampled ids; refused off loopback.
    """

    rank_id: RankId
    gang_id: GangId
    pool: PoolName
    gang_rank: int
    gang_size: int
    model_path: Path
    layout: str
    dtype: str
    num_pages: int
    host_cache_bytes: int = 0
    disk_cache_dir: Path | None = None
    disk_cache_bytes: int = 0
    max_batch_tokens: int
    prefill_chunk_tokens: int
    max_running: int
    max_context_tokens: int
    step_timeout_s: float
    host: str = "127.0.0.1"
    port: int = 0
    worker_token: str | None = None
    allow_forced_tokens: bool = False
    device: str = "cpu"
    """cpu or cuda: where model and caches are; a process sees the one device that it was given."""
    num_threads: int = 1
    """torch's intra-op threads."""
    transfer_timeout_s: float = 10.0
    max_links: int = 32
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    """0 = any free one, else the first free one from there on."""
