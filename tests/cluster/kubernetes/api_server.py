"""A small Kubernetes API server over HTTP: nodes, pods and what preflight asks, with versions, watches and faults.

It keeps what the real one keeps: every change has the next resource version, a watch tells what came after the one it
names, and answers 410 where that has been forgotten.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
BOOKMARK_EVERY_S = 0.1
KINDS = {"nodes": "Node", "pods": "Pod"}


@dataclass(slots=True)
class Fault:
    """The next ``times`` requests whose ``METHOD path?query`` matches are answered with ``status``."""

    pattern: str
    status: int
    times: int
    reason: str = "Injected"


@dataclass(slots=True)
class Event:
    version: int
    kind: str
    type: str
    item: Object


@dataclass
class ApiServer:
    """``start``, then ``put``/``remove`` objects; ``faults`` and ``forbidden`` decide what goes wrong.

    forbidden: ``verb resource`` pairs that are answered 403 and denied in access reviews. requests: all that came, as
    ``METHOD path``. kubelet: called with a pod whose end was asked for; it may remove it. gone_as_status: 410 as the
    watch's own status instead of an event in it.
    """

    objects: dict[str, dict[tuple[str, str], Object]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    groups: dict[str, list[str]] = field(default_factory=dict)
    named: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    storage_classes: list[Object] = field(default_factory=list)
    ray_services: list[Object] = field(default_factory=list)
    forbidden: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    minor: str = "34"
    grace_s: float = 30.0
    gone_as_status: bool = False
    kubelet: Callable[[str, str], None] | None = None

    def __post_init__(self) -> None:
        self.version = 100
        self.oldest = 100
        self.events: list[Event] = []
        self.changed = threading.Condition()
        self.watches: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.state = self
        self._stopping = False

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self.drop_watches()
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def kubeconfig(self, path: Path, *, namespace: str = "models") -> Path:
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                    "users": [{"name": "u", "user": {"token": "t"}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
                    "current-context": "x",
                }
            )
        )
        return path

    def put(self, kind: str, item: Object) -> None:
        """Add or replace an object, under a new version."""
        item = copy.deepcopy(item)
        metadata = item["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        with self.changed:
            known = self.objects[kind].get(key)
            metadata.setdefault("uid", known["metadata"]["uid"] if known else f"{kind}-{key}-{self.version}")
            self._record(kind, "MODIFIED" if known else "ADDED", item)
            self.objects[kind][key] = item

    def remove(self, kind: str, name: str, namespace: str = "") -> None:
        with self.changed:
            item = copy.deepcopy(self.objects[kind].pop((namespace, name)))
            self._record(kind, "DELETED", item)

    def terminate(self, name: str, namespace: str, grace_s: float | None = None) -> None:
        """What a deletion does: the pod stands with the end of its grace period until the kubelet is done."""
        item = copy.deepcopy(self.objects["pods"][namespace, name])
        grace_s = self.grace_s if grace_s is None else grace_s
        ends = datetime.now(UTC) + timedelta(seconds=grace_s)
        item["metadata"]["deletionTimestamp"] = ends.strftime("%Y-%m-%dT%H:%M:%SZ")
        item["metadata"]["deletionGracePeriodSeconds"] = int(grace_s)
        self.put("pods", item)
        if self.kubelet is not None:
            self.kubelet(name, namespace)

    def forget(self) -> None:
        """Compaction: watches from before now are told 410."""
        with self.changed:
            self.events.clear()
            self.oldest = self.version

    def drop_watches(self) -> None:
        """Cut every open watch's connection."""
        with self.changed:
            for connection in self.watches:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def count(self, pattern: str) -> int:
        """How many requests match."""
        return sum(bool(re.search(pattern, request)) for request in list(self.requests))

    def _record(self, kind: str, type_: str, item: Object) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.events.append(Event(self.version, kind, type_, item))
        self.changed.notify_all()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    state: ApiServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""

    @property
    def state(self) -> ApiServer:
        assert isinstance(self.server, _Http)
        return self.server.state

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        request = f"{method} {self.path}"
        self.state.requests.append(request)
        for fault in self.state.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return self._refuse(fault.status, fault.reason)
        return self._route(method, url.path, query, body)

    def _route(self, method: str, path: str, query: Mapping[str, str], body: Object) -> None:
        state = self.state
        if path == "/version/":
            return self._send({"major": "1", "minor": state.minor, **dict.fromkeys(_VERSION_FIELDS, "")})
        if path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            return self._review(body)
        if path == "/apis/storage.k8s.io/v1/storageclasses":
            if "list storageclasses" in state.forbidden:
                return self._refuse(403, "Forbidden")
            return self._send({"kind": "StorageClassList", "metadata": {}, "items": state.storage_classes})
        if match := re.fullmatch(r"/apis/ray.io/v1/namespaces/([^/]+)/rayservices", path):
            if "list rayservices" in state.forbidden:
                return self._refuse(403, "Forbidden")
            return self._send({"kind": "RayServiceList", "metadata": {}, "items": state.ray_services})
        if match := re.fullmatch(r"/apis/([^/]+/[^/]+)", path):
            return self._resources(match[1])
        if match := re.fullmatch(r"/api/v1/namespaces/([^/]+)/(secrets|persistentvolumeclaims)/([^/]+)", path):
            namespace, kind, name = match.groups()
            if f"get {kind}" in state.forbidden:
                return self._refuse(403, "Forbidden")
            if (namespace, name) not in state.named.get(kind, set()):
                return self._refuse(404, "NotFound")
            return self._send({"metadata": {"name": name, "namespace": namespace}, "spec": {}})
        if match := re.fullmatch(r"/api/v1(?:/namespaces/([^/]+))?/(nodes|pods)(?:/([^/]+))?(/eviction)?", path):
            namespace, kind, name, subresource = match.groups()
            return self._objects(method, kind, namespace or "", name, subresource or "", query, body)
        return self._refuse(404, "NotFound")

    def _objects(
        self,
        method: str,
        kind: str,
        namespace: str,
        name: str | None,
        subresource: str,
        query: Mapping[str, str],
        body: Object,
    ) -> None:
        state = self.state
        verbs = {
            "GET": "get" if name else "watch" if query.get("watch") else "list",
            "POST": "create",
            "PATCH": "patch",
        }
        if f"{verbs[method]} {kind}{subresource}" in state.forbidden:
            return self._refuse(403, "Forbidden")
        if name is None:
            selected = _selector(query.get("labelSelector", ""))
            if query.get("watch"):
                return self._watch(kind, namespace, selected, int(query["resourceVersion"]), query)
            with state.changed:
                items = [o for (ns, _), o in state.objects[kind].items() if ns == namespace and selected(o)]
                version = state.version
            return self._send(
                {"kind": f"{KINDS[kind]}List", "metadata": {"resourceVersion": str(version)}, "items": items}
            )
        item = state.objects[kind].get((namespace, name))
        if item is None:
            return self._refuse(404, "NotFound")
        if method == "PATCH":
            state.put(kind, _merged(item, body))
            item = state.objects[kind][namespace, name]
        elif subresource:
            state.terminate(name, namespace)
            return self._send({"kind": "Status", "status": "Success"}, 201)
        return self._send(item)

    def _watch(
        self, kind: str, namespace: str, selected: Callable[[Object], bool], version: int, query: Mapping[str, str]
    ) -> None:
        state = self.state
        is_gone = version < state.oldest
        if is_gone and state.gone_as_status:
            return self._refuse(410, "Expired")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if is_gone:
            self._chunk({"type": "ERROR", "object": _status(410, "Expired")})
            return self._last_chunk()
        with state.changed:
            state.watches.add(self.connection)
        try:
            self._tell_changes(kind, namespace, selected, version, float(query.get("timeoutSeconds", "60")))
        except OSError:
            self.close_connection = True
        finally:
            with state.changed:
                state.watches.discard(self.connection)
        return None

    def _tell_changes(
        self, kind: str, namespace: str, selected: Callable[[Object], bool], version: int, timeout_s: float
    ) -> None:
        state, until = self.state, time.monotonic() + timeout_s
        while time.monotonic() < until and not state._stopping:
            with state.changed:
                news = [event for event in state.events if event.version > version]
                if not news:
                    state.changed.wait(BOOKMARK_EVERY_S)
                    news = [event for event in state.events if event.version > version]
                version = state.version
            for event in news:
                is_here = event.item["metadata"].get("namespace", "") == namespace
                if event.kind == kind and is_here and selected(event.item):
                    self._chunk({"type": event.type, "object": {"kind": KINDS[kind], **event.item}})
            if not news:
                self._chunk({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}})
        self._last_chunk()

    def _review(self, body: Object) -> None:
        wanted = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (wanted["resource"], wanted.get("subresource"))))
        allowed = f"{wanted['verb']} {resource}" not in self.state.forbidden
        self._send({"spec": body["spec"], "status": {"allowed": allowed}}, 201)

    def _resources(self, group: str) -> None:
        names = self.state.groups.get(group)
        if names is None:
            return self._refuse(404, "NotFound")
        resources = [
            {"name": name, "kind": name, "namespaced": True, "singularName": name, "verbs": ["list"]} for name in names
        ]
        return self._send({"kind": "APIResourceList", "groupVersion": group, "resources": resources})

    def _refuse(self, status: int, reason: str) -> None:
        self._send(_status(status, reason), status)

    def _send(self, answer: Object, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status, answer.get("reason"))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _chunk(self, message: Object) -> None:
        data = json.dumps(message).encode() + b"\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _last_chunk(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


_VERSION_FIELDS = ("gitVersion", "gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform")


def _status(code: int, reason: str) -> Object:
    return {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": f"{reason} by a test"}


def _selector(text: str) -> Callable[[Object], bool]:
    wanted = [part.partition("=") for part in text.split(",") if part]

    def selected(item: Object) -> bool:
        labels = item["metadata"].get("labels", {})
        return all(labels.get(key) == value if sign else key in labels for key, sign, value in wanted)

    return selected


def _merged(item: Any, patch: Any) -> Any:
    if not isinstance(item, dict) or not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(item)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def node(name: str, *, gpus: int = 0, cordoned: bool = False, taints: tuple[str, ...] = (), **labels: str) -> Object:
    """A node with 16 cores and 128 GiB. labels: underscores stand for what names cannot hold ('nvidia_com__x')."""
    allocatable = {"cpu": "16", "memory": "128Gi", "ephemeral-storage": "500Gi", "pods": "110"}
    if gpus:
        allocatable["nvidia.com/gpu"] = str(gpus)
    spec: Object = {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]}
    if cordoned:
        spec["unschedulable"] = True
    return {
        "metadata": {
            "name": name,
            "labels": {key.replace("__", "/").replace("_", "."): v for key, v in labels.items()},
        },
        "spec": spec,
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def pod(
    name: str,
    node_name: str,
    ip: str,
    *,
    group: str = "decode",
    head: bool = False,
    cluster: str = "release-raycluster",
) -> Object:
    """A Ray pod of the release ``seamount`` in the namespace ``models``, as KubeRay makes it."""
    return {
        "metadata": {
            "name": name,
            "namespace": "models",
            "labels": {
                "ray.io/cluster": cluster,
                "ray.io/group": "headgroup" if head else group,
                "ray.io/node-type": "head" if head else "worker",
                "app.kubernetes.io/part-of": "seamount",
                "app.kubernetes.io/instance": "seamount",
                "app.kubernetes.io/component": "head" if head else group,
            },
        },
        "spec": {"nodeName": node_name, "containers": [{"name": "ray", "image": "seamount:0.1.0"}]},
        "status": {"podIP": ip, "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    }
