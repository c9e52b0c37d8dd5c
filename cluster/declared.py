"""What a Serve configuration names: applications built from the settings that stand there as their arguments.

    applications:
      - {name: fleet, import_path: "seamount.cluster.declared:fleet", route_prefix: null, args: {model: {path: ...}}}
      - {name: router, import_path: "seamount.cluster.declared:router", route_prefix: null, args: {model: {path: ...}}}
      - {name: readiness, import_path: "seamount.cluster.declared:readiness", route_prefix: null, args: {...}}

The arguments are those of ``serving.yaml``; addresses and secrets come from the environment of the process that builds
the application. Where the arguments differ from those before, Serve builds it anew and replaces the fleet, which starts
new gangs beside the old ones, or the routers one by one. The gangs themselves are applications that nobody declares:
applying a configuration deletes only what an earlier one has declared, so it leaves them alone.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from ray.serve.deployment import Application

from seamount.cluster.app import ROUTER_RESOURCE
from seamount.cluster.environment import REDIS_VARIABLE
from seamount.cluster.readiness import DEFAULT_START_TIMEOUT_S
from seamount.cluster.replicas import fleet_application, readiness_application, router_application
from seamount.cluster.settings import Settings, declared_settings
from seamount.wire.errors import InvalidArgument

_SECONDS = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])


def fleet(chosen: dict[str, Any]) -> Application:
    """The fleet of these settings. Raises ``InvalidArgument`` as ``load_settings`` does, and without a Redis."""
    return fleet_application(_settings(chosen))


def router(chosen: dict[str, Any]) -> Application:
    """Routers of these settings, each where a node offers the resource ``router``. Raises as ``fleet`` does."""
    return router_application(_settings(chosen), {ROUTER_RESOURCE: 1.0})


def readiness(chosen: dict[str, Any]) -> Application:
    """What runs once this Ray cluster has come up. Beside the settings, of which those of Redis and ``cluster_name``
    matter, ``start_timeout_s``: how long one attempt waits. Raises as ``fleet`` does."""
    rest = dict(chosen)
    timeout_s = rest.pop("start_timeout_s", DEFAULT_START_TIMEOUT_S)
    try:
        timeout_s = _SECONDS.validate_python(timeout_s)
    except ValidationError:
        raise InvalidArgument(
            f"start_timeout_s is {timeout_s!r}: give seconds, more than 0", field="start_timeout_s"
        ) from None
    return readiness_application(_settings(rest), timeout_s)


def _settings(chosen: dict[str, Any]) -> Settings:
    settings = declared_settings(chosen)
    if settings.redis_url is None:
        raise InvalidArgument(
            f"{REDIS_VARIABLE} is not set: replicas on several nodes need one Redis that all of them reach",
            field="redis_url",
            reason="NO_REDIS",
        )
    return settings
