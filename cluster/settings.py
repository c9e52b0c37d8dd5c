"""The choices of a deployment: one ``serving.yaml``, and the only reader of the environment.

The model's ``config.json`` holds facts, ``serving.yaml`` holds choices (all optional: the defaults run the demo on two
CPU cores), the environment holds secrets and addresses. Read once, at start; unknown keys are errors.

Environment:
    SEAMOUNT_CONFIG      path of serving.yaml, where none is given on the command line
    SEAMOUNT_REDIS_URL   an existing Redis >= 7 or Valkey; without it the system starts its own
    SEAMOUNT_ADDRESS     client side: host:port of a router
    SEAMOUNT_API_KEY     client side: the key sent with each call
    SEAMOUNT_POD_NAMESPACE, RAY_CLUSTER_NAME    in a pod: its namespace, and KubeRay's name of its Ray cluster
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from seamount.cluster.autoscaling import AutoscalingSettings, DrainingSettings
from seamount.cluster.section import Section, contradiction
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument
from seamount.wire.hashes import PAGE_SIZE

CONFIG_NAME = "serving.yaml"
NODE_ADDRESS = "node"
"""``pools.host``: each rank binds to the address of its own node."""

CONFIG_VARIABLE = "SEAMOUNT_CONFIG"
REDIS_VARIABLE = "SEAMOUNT_REDIS_URL"
ADDRESS_VARIABLE = "SEAMOUNT_ADDRESS"
API_KEY_VARIABLE = "SEAMOUNT_API_KEY"
NAMESPACE_VARIABLE = "SEAMOUNT_POD_NAMESPACE"
RAY_CLUSTER_VARIABLE = "RAY_CLUSTER_NAME"


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


class Settings(Section):
    """Everything a deployment may choose; ``load_settings`` makes it."""

    cluster_name: str = Field(
        default="seamount",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$",
        description="Deployments that share a Redis or a Ray cluster differ in it",
    )
    run_dir: LocalPath = Field(default=Path(".run"), description="Logs, sockets and other files of the running system")
    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    engine: EngineSettings = EngineSettings()
    pools: PoolsSettings = PoolsSettings()
    router: RouterSettings = RouterSettings()
    placement: PlacementSettings = PlacementSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    draining: DrainingSettings = DrainingSettings()
    directory: DirectorySettings = DirectorySettings()
    transfer: TransferSettings = TransferSettings()
    metrics: MetricsSettings = MetricsSettings()
    redis: RedisSettings = RedisSettings()
    redis_url: SecretStr | None = Field(default=None, description=f"From {REDIS_VARIABLE} alone")

    @model_validator(mode="before")
    @classmethod
    def _sections_with_paths(cls, chosen: object) -> object:
        # Validated with each file's context: their defaults hold paths, which a default made at import would fix.
        return {"model": {}, "redis": {}} | chosen if isinstance(chosen, dict) else chosen

    @model_validator(mode="after")
    def _parts_agree(self) -> Settings:
        fits = self.cache.num_pages * PAGE_SIZE
        if self.engine.max_context_tokens > fits:
            raise contradiction(
                "engine.max_context_tokens",
                f"engine.max_context_tokens is {self.engine.max_context_tokens}, but cache.num_pages = "
                f"{self.cache.num_pages} holds {fits} tokens: lower the one or raise the other",
            )
        self._check_prefill_range()
        if not is_loopback(self.router.host) and self.router.api_key_file is None:
            raise contradiction(
                "router.host",
                f"router.host = {self.router.host} can be reached from outside, but there is no router.api_key_file: "
                "give one, or listen on 127.0.0.1",
            )
        if not is_loopback(self.pools.host) and self.router.worker_token_file is None:
            raise contradiction(
                "pools.host",
                f"pools.host = {self.pools.host} can be reached from outside, but there is no "
                "router.worker_token_file: give one, or listen on 127.0.0.1",
            )
        for key in ("api_key_file", "worker_token_file", "tls_certificate_file", "tls_key_file", "client_ca_file"):
            path: Path | None = getattr(self.router, key)
            if path is not None and not path.is_file():
                raise contradiction(f"router.{key}", f"router.{key}: there is no file {path}")
        return self

    def _check_prefill_range(self) -> None:
        scaling, path = self.autoscaling, self.placement.path
        if scaling.enabled and path == "remote" and scaling.prefill.min_gangs == 0:
            raise contradiction(
                "autoscaling.prefill.min_gangs",
                "autoscaling.prefill.min_gangs is 0, but placement.path = remote never appends on decode ranks: raise "
                "it to 1, or choose auto",
            )
        if scaling.enabled and path == "local" and scaling.prefill.max_gangs > 0:
            raise contradiction(
                "autoscaling.prefill.max_gangs",
                f"autoscaling.prefill.max_gangs is {scaling.prefill.max_gangs}, but placement.path = local uses no "
                "prefill gang: lower it to 0, or choose auto",
            )

    def to_yaml(self, *, explained: bool = False) -> str:
        """What is in force, as ``serving.yaml`` says it; ``explained``: with a comment behind each key. No secrets."""
        lines = [f"# {REDIS_VARIABLE} is {'not set' if self.redis_url is None else 'set'}"]
        return "\n".join([*lines, *_lines(self, "", explained)]) + "\n"


class KubernetesEnvironment(Section):
    """Where a pod runs. ray_cluster: KubeRay's name of its Ray cluster."""

    namespace: str
    ray_cluster: str


class ClientEnvironment(Section):
    """What a client takes from the environment."""

    address: str | None = None
    api_key: SecretStr | None = None


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an address, no port) can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: it may resolve to anything
        return False


def load_settings(path: Path | None = None, *, environ: Mapping[str, str] | None = None) -> Settings:
    """Read ``serving.yaml`` and the environment, once.

    path: the file; ``None`` = that of ``SEAMOUNT_CONFIG``, else ``./serving.yaml`` if there is one, else the defaults.
    environ: ``None`` = the process's.
    Raises ``InvalidArgument`` (the field is the key's dotted name) for a missing or unreadable file, an unknown key, a
    value out of range, or settings that contradict each other.
    """
    environ = os.environ if environ is None else environ
    file = _find(path, environ)
    chosen = _read(file)
    base = file.absolute().parent if file is not None else Path.cwd()
    return validate(_with_redis(chosen, environ), base=base)


def declared_settings(chosen: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Settings:
    """``load_settings`` where the content of ``serving.yaml`` is at hand, not a file."""
    return validate(_with_redis(chosen, os.environ if environ is None else environ))


def validate(chosen: Mapping[str, Any], *, base: Path | None = None) -> Settings:
    """Settings from plain values; ``base``: where relative paths count from (``None`` = the current folder).

    Raises ``InvalidArgument`` as ``load_settings`` does.
    """
    try:
        return Settings.model_validate(dict(chosen), context={"base": base or Path.cwd()})
    except ValidationError as error:
        raise _explain(error) from None


def client_environment(environ: Mapping[str, str] | None = None) -> ClientEnvironment:
    """``SEAMOUNT_ADDRESS`` and ``SEAMOUNT_API_KEY``; empty counts as absent."""
    environ = os.environ if environ is None else environ
    key = environ.get(API_KEY_VARIABLE)
    return ClientEnvironment(address=environ.get(ADDRESS_VARIABLE) or None, api_key=SecretStr(key) if key else None)


def kubernetes_environment(environ: Mapping[str, str] | None = None) -> KubernetesEnvironment:
    """Raises ``InvalidArgument`` outside of a pod that the chart made."""
    environ = os.environ if environ is None else environ
    for variable in (NAMESPACE_VARIABLE, RAY_CLUSTER_VARIABLE):
        if not environ.get(variable):
            raise _refused(
                "draining.watch",
                f"draining.watch needs {variable}, which the chart and KubeRay set in their pods: set it, or watch "
                "none",
            )
    return KubernetesEnvironment(namespace=environ[NAMESPACE_VARIABLE], ray_cluster=environ[RAY_CLUSTER_VARIABLE])


def client_address(settings: Settings) -> str:
    """Where clients of this machine reach the router."""
    host = settings.router.host
    try:
        anywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        anywhere = False
    host = "127.0.0.1" if anywhere else host
    return f"[{host}]:{settings.router.port}" if ":" in host else f"{host}:{settings.router.port}"


def _find(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    if path is None:
        here = Path(CONFIG_NAME)
        return here if here.is_file() else None
    return path


def _with_redis(chosen: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    if "redis_url" in chosen:
        raise _refused("redis_url", f"redis_url may hold a password: set {REDIS_VARIABLE} in the environment instead")
    url = environ.get(REDIS_VARIABLE)
    return {**chosen, "redis_url": url} if url else dict(chosen)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader))
        chosen = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise _refused("config", f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise _refused("config", f"{path} is not YAML: {error}") from None
    if chosen is None:
        return {}
    if not isinstance(chosen, dict):
        raise _refused("config", f"{path} must hold keys and values, such as 'router: {{port: 7411}}'")
    return {str(key): value for key, value in chosen.items()}


def _refuse_repeated_keys(node: yaml.Node | None) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    keys = [key.value for key, _ in node.value]
    for key, value in node.value:
        if keys.count(key.value) > 1:  # YAML readers silently take the last one
            raise _refused(str(key.value), f"line {key.start_mark.line + 1}: {key.value} stands there twice")
        _refuse_repeated_keys(value)


def _explain(error: ValidationError) -> InvalidArgument:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return _unknown(name, first["loc"])
        case "contradiction":
            return _refused(first["ctx"]["key"], first["ctx"]["message"])
        case _:
            return _refused(name, f"{name}: {first['msg']}")


def _unknown(name: str, location: tuple[int | str, ...]) -> InvalidArgument:
    section: type[BaseModel] = Settings
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)  # only sections refuse extra keys
        section = annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0)
    prefix = "".join(f"{part}." for part in location[:-1])
    return _refused(name, f"unknown key {name}; the closest known one is {prefix}{close[0]}", reason="UNKNOWN_SETTING")


def _refused(field: str, message: str, *, reason: str = "INVALID_SETTING") -> InvalidArgument:
    return InvalidArgument(message, field=field, reason=reason)


def _lines(section: BaseModel, indent: str, explained: bool) -> Iterator[str]:
    plain = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ", explained)
        elif key != "redis_url":
            comment = f"  # {field.description}" if explained else ""
            yield f"{indent}{key}: {json.dumps(plain[key])}{comment}"
