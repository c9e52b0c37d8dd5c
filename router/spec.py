"""What a router is told when it starts. Nothing here is read from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seamount.router.placement import PathRules
from seamount.wire.ids import RouterId


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What holds where neither the turn nor its session says anything."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    max_output_tokens: int = 1024


_DEFAULT_RULES = PathRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """One router: one process, any number of them for one cluster.

    node_id: Ray's, empty in plain processes; advertised_host: where others reach it, None = ``host``, which it listens
    on.
    allow_forced_tokens: tests of plain processes may dictate the sampled ids; refused off loopback.
    """

    router_id: RouterId
    cluster_name: str
    redis_url: str
    model_path: Path
    model_name: str
    max_context_tokens: int
    defaults: SamplingDefaults = SamplingDefaults()
    rules: PathRules = _DEFAULT_RULES
    node_id: str = ""
    host: str = "127.0.0.1"
    advertised_host: str | None = None
    port: int = 0
    api_key_file: Path | None = None
    worker_token: str | None = None
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    client_ca_file: Path | None = None
    turn_deadline_s: float = 600.0
    max_attempts: int = 4
    redis_timeout_s: float = 2.0
    beat_s: float = 0.5
    dead_after_s: float = 3.0
    call_timeout_s: float = 5.0
    progress_timeout_s: float = 5.0
    token_log_kept_s: float = 600.0
    cut_ahead: bool = True
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    """0 = any free one, else the first free one from there on."""
    allow_forced_tokens: bool = False
