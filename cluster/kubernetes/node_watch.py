"""From nodes that are cordoned or about to end, and pods that terminate, to requests that the fleet empties their Ray
nodes (``node_drain``); taken back where a node stays after all.

What was asked for stands in Redis alone, marked by its cause: a fleet that starts anew goes on from there.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Protocol

import redis

from seamount.cluster.kubernetes.api import KubernetesApi, Selection
from seamount.cluster.kubernetes.objects import (
    RAY_CLUSTER_LABEL,
    NodeView,
    PodView,
    WantedDrain,
    node_view,
    pod_view,
    wanted_drains,
)
from seamount.cluster.kubernetes.reflector import MAX_PAUSE_S, Reflector
from seamount.cluster.node_drain import DrainPhase, DrainRequest, DrainRequests
from seamount.wire.errors import SeamountError

_LOG = logging.getLogger("seamount.kubernetes")
LOOK_EVERY_S = 2.0
"""A change is acted on at once; this bounds how long a request stands that could not be made, or one that is done."""
_SLACK_S = 1.0


class OnRestart(Protocol):
    """resource: nodes or pods; cause: gone, dropped or refused."""

    def __call__(self, resource: str, cause: str) -> None: ...


class NodeWatch:
    """Of one Ray cluster. ``start`` once, ``stop`` at the end.

    watches_nodes: cordons, taints and deletions of Kubernetes' nodes count, too, which takes a cluster-wide right to
    read nodes; without it the pods' own ends do.
    """

    def __init__(
        self,
        api: KubernetesApi,
        drains: DrainRequests,
        *,
        namespace: str,
        ray_cluster: str,
        deadline_s: float,
        watches_nodes: bool,
        on_restart: OnRestart,
        close_node: Callable[[str], None],
        max_pause_s: float = MAX_PAUSE_S,
    ) -> None:
        """deadline_s: of each drain. close_node: called with the id of each Ray node that has been emptied."""
        self._drains, self._deadline_s = drains, deadline_s
        self._close_node, self._closed = close_node, set[str]()
        self._mark = f"kubernetes {ray_cluster}: "
        self._changed, self._stop = threading.Event(), threading.Event()

        def told(kind: str) -> Callable[[str], None]:
            return lambda cause: on_restart(kind, cause)

        of_cluster = Selection(kind="pods", namespace=namespace, labels=f"{RAY_CLUSTER_LABEL}={ray_cluster}")
        self.pods: Reflector[PodView] = Reflector(
            api, of_cluster, pod_view, on_change=self._changed.set, on_restart=told("pods"), max_pause_s=max_pause_s
        )
        self.nodes: Reflector[NodeView] | None = None
        if watches_nodes:
            self.nodes = Reflector(
                api,
                Selection(kind="nodes"),
                node_view,
                on_change=self._changed.set,
                on_restart=told("nodes"),
                max_pause_s=max_pause_s,
            )
        self._thread = threading.Thread(target=self._run, name="node watch", daemon=True)

    def start(self) -> None:
        self.pods.start()
        if self.nodes is not None:
            self.nodes.start()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Requests stand."""
        self._stop.set()
        self._changed.set()
        for reflector in (self.pods, self.nodes):
            if reflector is not None:
                reflector.stop(timeout_s)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._changed.wait(LOOK_EVERY_S)
            self._changed.clear()
            try:
                self._reconcile()
            except (SeamountError, redis.RedisError) as error:
                _LOG.warning("drain_not_requested", extra={"cause": type(error).__name__})
            except Exception:  # a defect must not end the watch unseen
                _LOG.exception("drain_not_requested")

    def _reconcile(self) -> None:
        nodes = self.nodes.objects if self.nodes is not None else []
        wanted = wanted_drains(nodes, self.pods.objects, deadline_s=self._deadline_s, now=datetime.now(UTC))
        asked = self._drains.requests()
        for drain in to_ask(wanted, asked, now_s=self._drains.now()):
            _LOG.info("drain_requested", extra={"address": drain.address, "cause": drain.cause})
            self._drains.request_drain(drain.address, deadline_s=drain.deadline_s, cause=f"{self._mark}{drain.cause}")
        ours = [request.node for request in asked if request.cause.startswith(self._mark)]
        if self.pods.is_current:  # what is not seen while a watch is broken may be there all the same
            nodes_are_current = self.nodes is None or self.nodes.is_current
            present = {pod.ip for pod in self.pods.objects}
            for address in to_cancel(wanted, ours, present=present if not nodes_are_current else set()):
                _LOG.info("drain_cancelled", extra={"address": address})
                self._drains.cancel_drain(address)
        self._close_empty({drain.address for drain in wanted}.intersection(ours))

    def _close_empty(self, addresses: Iterable[str]) -> None:
        """Nothing is placed again on Ray nodes that have been emptied."""
        for address in addresses:
            status = self._drains.drain_status(address)
            if status is None or status.phase is not DrainPhase.EMPTY or status.node_id in self._closed:
                continue
            try:
                self._close_node(status.node_id)
            except SeamountError as error:  # tried again, and the others' turn now
                _LOG.warning("node_not_closed", extra={"node_id": status.node_id, "remedy": error.message})
            else:
                self._closed.add(status.node_id)


def to_ask(wanted: Iterable[WantedDrain], asked: Iterable[DrainRequest], *, now_s: float) -> list[WantedDrain]:
    """Those that nobody has asked for, and those that now have less time: the pod on a cordoned node terminates."""
    deadlines = {request.node: request.deadline_at for request in asked}
    return [drain for drain in wanted if now_s + drain.deadline_s + _SLACK_S < deadlines.get(drain.address, math.inf)]


def to_cancel(wanted: Iterable[WantedDrain], ours: Iterable[str], *, present: Iterable[str]) -> list[str]:
    """Addresses that were asked for here and are not wanted: the node stays after all, or its pod is gone, and the next
    pod with that address must not be emptied. present: of pods whose nodes nobody sees at the moment; they stand."""
    return sorted(set(ours) - {drain.address for drain in wanted} - set(present))
