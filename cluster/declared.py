"""What a Serve configuration names: applications built from the settings that stand there as their arguments.

    applications:
      - {name: fleet, import_path: "seamount.cluster.declared:fleet", route_prefix: null, args: {model: {path: ...}}}
      - {name: router, import_path: "seamount.cluster.declared:router", route_prefix: null, args: {model: {path: ...}}}

The arguments are those of ``serving.yaml``; addresses and secrets come from the environment of the process that builds
the application. Where the arguments differ from those before, Serve builds it anew and replaces the fleet, which starts
new gangs beside the old ones, or the routers one by one. The gangs themselves are applications that nobody declares:
applying a configuration deletes only what an earlier one has declared, so it leaves them alone.
"""

from __future__ import annotations

from typing import Any

from ray.serve.deployment import Application

from seamount.cluster.app import ROUTER_RESOURCE
from seamount.cluster.replicas import fleet_application, router_application
from seamount.cluster.settings import REDIS_VARIABLE, Settings, declared_settings
from seamount.wire.errors import InvalidArgument


def fleet(chosen: dict[str, Any]) -> Application:
    """The fleet of these settings. Raises ``InvalidArgument`` as ``load_settings`` does, and without a Redis."""
    return fleet_application(_settings(chosen))


def router(chosen: dict[str, Any]) -> Application:
    """Routers of these settings, each where a node offers the resource ``router``. Raises as ``fleet`` does."""
    return router_application(_settings(chosen), {ROUTER_RESOURCE: 1.0})


def _settings(chosen: dict[str, Any]) -> Settings:
    settings = declared_settings(chosen)
    if settings.redis_url is None:
        raise InvalidArgument(
            f"{REDIS_VARIABLE} is not set: replicas on several nodes need one Redis that all of them reach",
            field="redis_url",
            reason="NO_REDIS",
        )
    return settings
