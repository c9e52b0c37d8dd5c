"""Whether a cluster can take a release: versions, CRDs, room, storage, secrets and rights, before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from seamount.cluster.kubernetes.api import KubernetesApi, Selection
from seamount.cluster.kubernetes.capacity import Room, room
from seamount.cluster.kubernetes.chart_values import Values, claim, demands, rights, secrets, storage_class
from seamount.cluster.kubernetes.objects import node_view
from seamount.wire.errors import NotFound, PermissionDenied

MIN_VERSION = (1, 29)
"""Of Kubernetes, as the chart's kubeVersion says."""
_KUBERAY = "install the KubeRay operator, 1.6 or newer"
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


class Outcome(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """remedy: what to do about it; empty where all is well."""

    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""


def preflight(api: KubernetesApi, values: Values, namespace: str) -> Iterator[Check]:
    """One check after the other. What may not be looked at is a warning that names the right. Raises ``Unavailable``,
    ``Unauthenticated`` where nothing can be asked at all."""
    yield _version(api)
    yield from _definitions(api, values)
    yield from _capacity(api, values)
    yield from _storage(api, values)
    yield from _objects(api, values, namespace)
    yield from _rights(api, values, namespace)


def _version(api: KubernetesApi) -> Check:
    found = api.version()
    shown, least = (f"{major}.{minor}" for major, minor in (found, MIN_VERSION))
    if found < MIN_VERSION:
        return Check(
            name="version",
            outcome=Outcome.FAILED,
            detail=f"{api.server} is Kubernetes {shown}",
            remedy=f"use {least} or newer",
        )
    return Check(name="version", outcome=Outcome.OK, detail=f"{api.server} is Kubernetes {shown}")


def _definitions(api: KubernetesApi, values: Values) -> Iterator[Check]:
    wanted = [("ray.io", "v1", "rayservices", _KUBERAY)]
    wanted += [("ray.io", "v1", "rayclusters", _KUBERAY)]
    for key, plural in (("serviceMonitor", "servicemonitors"), ("prometheusRule", "prometheusrules")):
        if values["metrics"][key]["enabled"]:
            remedy = f"install the Prometheus operator, or set metrics.{key}.enabled: false"
            wanted.append(("monitoring.coreos.com", "v1", plural, remedy))
    for group, version, plural, remedy in wanted:
        name = f"{plural}.{group}"
        if plural in api.resources(group, version):
            yield Check(name=name, outcome=Outcome.OK, detail=f"{version} is there")
        else:
            yield Check(name=name, outcome=Outcome.FAILED, detail=f"{version} is not there", remedy=remedy)


def _capacity(api: KubernetesApi, values: Values) -> Iterator[Check]:
    try:
        nodes = [node_view(item) for item in api.listing(Selection(kind="nodes")).items]
    except PermissionDenied as error:
        yield Check(name="capacity", outcome=Outcome.WARNING, detail="nodes may not be listed", remedy=error.message)
        return
    for found in room(demands(values), nodes):
        yield _room_check(found)


def _room_check(found: Room) -> Check:
    name = f"room for {found.group}"
    detail = f"{found.num_fitting} of {found.num_wanted} pods fit on {found.num_nodes} matching nodes, were they empty"
    if found.num_fitting < found.num_wanted:
        return Check(
            name=name,
            outcome=Outcome.FAILED,
            detail=f"{detail}: {found.why}",
            remedy="add such nodes, or change the group's resources, nodeSelector or tolerations",
        )
    if found.max_fitting < found.max_wanted:
        return Check(
            name=name,
            outcome=Outcome.WARNING,
            detail=f"{detail}; {found.max_fitting} of at most {found.max_wanted}",
            remedy="where nodes are added by themselves, all is well; else it cannot grow, nor replace gangs, so far",
        )
    return Check(name=name, outcome=Outcome.OK, detail=f"{detail}; all of at most {found.max_wanted}, too")


def _storage(api: KubernetesApi, values: Values) -> Iterator[Check]:
    wanted = storage_class(values)
    if wanted is None:
        return
    try:
        found = api.storage_classes()
    except PermissionDenied as error:
        yield Check(name="storage class", outcome=Outcome.WARNING, detail="cannot be looked at", remedy=error.message)
        return
    names = [one.metadata.name for one in found]
    defaults = [one.metadata.name for one in found if (one.metadata.annotations or {}).get(_DEFAULT_CLASS) == "true"]
    if wanted in names or (not wanted and defaults):
        yield Check(name="storage class", outcome=Outcome.OK, detail=wanted or f"{defaults[0]}, the default")
        return
    yield Check(
        name="storage class",
        outcome=Outcome.FAILED,
        detail=f"there is no class {wanted}" if wanted else "the cluster has no default class",
        remedy=f"set redis.trial.storageClassName to one of: {', '.join(names) or 'none exists'}; or redis.external",
    )


def _objects(api: KubernetesApi, values: Values, namespace: str) -> Iterator[Check]:
    for name in secrets(values):
        yield _exists(api, "secret", name, namespace)
    if name := claim(values):
        yield _exists(api, "volume claim", name, namespace)


def _exists(api: KubernetesApi, what: str, name: str, namespace: str) -> Check:
    title = f"{what} {name}"
    try:
        is_there = api.exists("secrets" if what == "secret" else "persistentvolumeclaims", name, namespace)
    except PermissionDenied as error:
        return Check(name=title, outcome=Outcome.WARNING, detail="cannot be looked at", remedy=error.message)
    if is_there:
        return Check(name=title, outcome=Outcome.OK, detail=f"is in namespace {namespace}")
    return Check(
        name=title,
        outcome=Outcome.FAILED,
        detail=f"is not in namespace {namespace}",
        remedy="make it there, or name another in the values",
    )


def _rights(api: KubernetesApi, values: Values, namespace: str) -> Iterator[Check]:
    wanted = rights(values, namespace)
    try:
        missing = [access for access in wanted if not api.may(access)]
    except (PermissionDenied, NotFound) as error:
        yield Check(name="rights", outcome=Outcome.WARNING, detail="cannot be asked for", remedy=error.message)
        return
    for access in missing:
        yield Check(
            name="rights",
            outcome=Outcome.FAILED,
            detail=f"whoever asks may not {access}",
            remedy=f"add the rule {access.rule}, or let somebody else install the release",
        )
    if not missing:
        detail = f"whoever asks may make the {len(wanted)} kinds of objects of the release"
        yield Check(name="rights", outcome=Outcome.OK, detail=detail)
