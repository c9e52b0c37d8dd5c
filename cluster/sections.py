"""The sections of ``serving.yaml``; scaling and draining have theirs in ``autoscaling``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from seamount.cluster.section import Section, contradiction
from seamount.wire import limits
from seamount.wire.hashes import PAGE_SIZE

NODE_ADDRESS = "node"
"""``pools.host``: each rank binds to the address of its own node."""


def _absolute(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path.cwd())
    return base / path.expanduser()


LocalPath = Annotated[Path, AfterValidator(_absolute)]
"""Relative paths count from the folder of the file they stand in, or from the current folder; always absolute here."""

Resources = dict[str, Annotated[float, Field(ge=0)]]
"""Ray resources of one replica: ``CPU``, ``GPU`` or the name of a custom one."""


class ModelSettings(Section):
    path: LocalPath = Field(
        default=Path("checkpoints/tiny-agent"), description="Folder with config.json, *.safetensors, tokenizer.json"
    )
    name: str = Field(
        default="tiny-agent", min_length=1, max_length=limits.MAX_NAME_BYTES, description="Name that clients ask for"
    )


class CacheSettings(Section):
    layout: Literal["fp8", "bf16", "exact"] = Field(default="bf16", description="How a token's entries are stored")
    dtype: Literal["float32", "float64", "bfloat16"] = Field(default="float32", description="Compute type of the model")
    num_pages: int = Field(default=512, ge=2, description=f"Pages of {PAGE_SIZE} tokens on each rank")
    host_cache_bytes: int = Field(
        default=1 << 30, ge=0, description="Host memory of each rank for pages that left the device; 0 = none"
    )
    disk_cache_dir: LocalPath | None = Field(
        default=None, description="Folder on each node for pages that outlive their rank; absent = none"
    )
    disk_cache_bytes: int = Field(default=16 << 30, ge=0, description="Of each rank's files there")


class EngineSettings(Section):
    max_batch_tokens: int = Field(default=512, ge=1, description="Tokens of one step over all its sequences")
    prefill_chunk_tokens: int = Field(default=256, ge=1, description="Prompt tokens of one sequence in one step")
    max_running: int = Field(default=64, ge=1, description="Sequences of one rank that run together")
    max_context_tokens: int = Field(
        default=16_384, ge=2, le=limits.MAX_CONTEXT_TOKENS, description="Prompt and output of one turn"
    )
    step_timeout_s: float = Field(
        default=5.0, gt=0, description="A step, or a wait for a peer of the gang, that takes longer fails"
    )
    num_threads: int = Field(default=1, ge=1, description="Threads of torch on each rank")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the model and its caches are")


class PoolSettings(Section):
    gangs: int = Field(default=1, ge=0, description="Groups of ranks that share one copy of the experts")
    expert_parallel: int = Field(default=1, ge=1, description="Ranks of a gang")
    resources: Resources = Field(
        default_factory=dict, description="Ray resources of one rank: CPU, GPU or custom names"
    )


class DecodePoolSettings(PoolSettings):
    gangs: int = Field(default=1, ge=1, description="Groups of ranks; they own the caches of sessions")
    expert_parallel: int = Field(default=2, ge=1, description="Ranks of a gang")


class PoolsSettings(Section):
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description=f"What ranks bind to; '{NODE_ADDRESS}' = their node's address",
    )
    prefill: PoolSettings = PoolSettings()
    decode: DecodePoolSettings = DecodePoolSettings()


class SamplingDefaults(Section):
    temperature: float = Field(default=1.0, ge=0, le=limits.MAX_TEMPERATURE, description="0 = greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Probability mass that is sampled from")
    top_k: int = Field(default=0, ge=0, le=limits.MAX_TOP_K, description="0 = off")
    max_output_tokens: int = Field(default=1024, ge=1, le=limits.MAX_OUTPUT_TOKENS, description="Of one turn")


class RouterSettings(Section):
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="What clients reach; beyond loopback it needs api_key_file",
    )
    port: int = Field(default=7411, ge=0, le=65535, description="0 = any free port")
    api_key_file: LocalPath | None = Field(default=None, description="Tenants' keys; absent = loopback only")
    worker_token_file: LocalPath | None = Field(
        default=None, description="Token between routers and ranks; absent = loopback only"
    )
    tls_certificate_file: LocalPath | None = Field(default=None, description="PEM chain of the router's listener")
    tls_key_file: LocalPath | None = Field(default=None, description="PEM key of the router's listener")
    client_ca_file: LocalPath | None = Field(
        default=None, description="PEM authorities; given = clients must show a certificate"
    )
    turn_deadline_s: float = Field(
        default=600.0, gt=0, le=limits.MAX_TURN_DEADLINE_S, description="Where a turn names none"
    )
    token_log_kept_s: float = Field(
        default=600.0,
        gt=0,
        description="The token log of an ended turn; one without a result cannot be resumed after that",
    )
    cut_ahead: bool = Field(
        default=True, description="After an answer, idle decode ranks compute its session without the reasoning"
    )
    sampling: SamplingDefaults = SamplingDefaults()

    @model_validator(mode="after")
    def _tls_is_whole(self) -> RouterSettings:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise contradiction(
                "router.tls_certificate_file",
                "router.tls_certificate_file and router.tls_key_file go together",
            )
        if self.client_ca_file is not None and self.tls_key_file is None:
            raise contradiction(
                "router.client_ca_file",
                "router.client_ca_file needs router.tls_certificate_file and router.tls_key_file",
            )
        return self


class PlacementSettings(Section):
    path: Literal["auto", "local", "remote"] = Field(
        default="auto", description="Where missing tokens are computed; auto compares estimates, the others never do"
    )
    local_append_max_tokens: int = Field(
        default=128, ge=0, description="Up to this many missing tokens are computed on the decode rank itself"
    )
    max_attempts: int = Field(default=4, ge=1, description="How often a turn's work is placed before the turn fails")


class DirectorySettings(Section):
    beat_s: float = Field(default=0.5, gt=0, description="A rank's counter in the directory grows this often")
    dead_after_s: float = Field(
        default=3.0, gt=0, description="A counter that stood still for so long while Redis answered is dead"
    )

    @model_validator(mode="after")
    def _silence_spans_beats(self) -> DirectorySettings:
        if self.dead_after_s < 3 * self.beat_s:
            raise contradiction(
                "directory.dead_after_s",
                "directory.dead_after_s must be at least 3 x directory.beat_s: a late beat is no death",
            )
        return self


class TransferSettings(Section):
    timeout_s: float = Field(default=10.0, gt=0, description="Of one transfer over a pair link")
    max_links: int = Field(default=32, ge=1, description="Open pair links; the least recently used one closes")


class MetricsSettings(Section):
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description=f"Where /metrics of each process listens; '{NODE_ADDRESS}' = its node's address",
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="0 = any free port, told in the log; else the first free one from there on, on each address",
    )


class RedisSettings(Section):
    data_dir: LocalPath = Field(default=Path(".run/redis"), description="Of the server that the system starts itself")
    timeout_s: float = Field(default=2.0, gt=0, description="Of one command")
