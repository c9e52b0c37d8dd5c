"""The choices of a deployment: one ``serving.yaml``, and the only reader of the environment.

The model's ``config.json`` holds facts, ``serving.yaml`` holds choices (all optional: the defaults run the demo on two
CPU cores), the environment (``environment``) holds secrets and addresses. Read once, at start; unknown keys are errors.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from seamount.cluster.autoscaling import AutoscalingSettings, DrainingSettings
from seamount.cluster.environment import CONFIG_VARIABLE, REDIS_VARIABLE
from seamount.cluster.section import Section, contradiction, refused
from seamount.cluster.sections import (
    CacheSettings,
    DirectorySettings,
    EngineSettings,
    LocalPath,
    MetricsSettings,
    ModelSettings,
    PlacementSettings,
    PoolsSettings,
    RedisSettings,
    RouterSettings,
    TransferSettings,
)
from seamount.wire.errors import InvalidArgument
from seamount.wire.hashes import PAGE_SIZE

CONFIG_NAME = "serving.yaml"


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
        raise refused("redis_url", f"redis_url may hold a password: set {REDIS_VARIABLE} in the environment instead")
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
        raise refused("config", f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise refused("config", f"{path} is not YAML: {error}") from None
    if chosen is None:
        return {}
    if not isinstance(chosen, dict):
        raise refused("config", f"{path} must hold keys and values, such as 'router: {{port: 7411}}'")
    return {str(key): value for key, value in chosen.items()}


def _refuse_repeated_keys(node: yaml.Node | None) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    keys = [key.value for key, _ in node.value]
    for key, value in node.value:
        if keys.count(key.value) > 1:  # YAML readers silently take the last one
            raise refused(str(key.value), f"line {key.start_mark.line + 1}: {key.value} stands there twice")
        _refuse_repeated_keys(value)


def _explain(error: ValidationError) -> InvalidArgument:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return _unknown(name, first["loc"])
        case "contradiction":
            return refused(first["ctx"]["key"], first["ctx"]["message"])
        case _:
            return refused(name, f"{name}: {first['msg']}")


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
    return refused(name, f"unknown key {name}; the closest known one is {prefix}{close[0]}", reason="UNKNOWN_SETTING")


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
