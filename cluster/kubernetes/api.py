"""The Kubernetes API as far as Seamount uses it: few calls, typed errors, bounded retries.

All calls block. The client library is imported by the functions that need it: it takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from seamount.cluster.kubernetes.errors import CONFLICT, Access, no_cluster, typed
from seamount.wire.errors import NotFound, SeamountError, Unavailable

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 15.0
MAX_ATTEMPTS = 5
WATCH_S = 60
"""The API server ends a watch after this time; the next one goes on where it ended."""
_SILENCE_S = 15.0
"""Beyond that time: a watch that says nothing for so long hangs on a dead connection."""

Kind = Literal["nodes", "pods"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is listed and watched: all nodes, or pods of a namespace (None = default); labels: a selector, '' = all."""

    kind: Kind
    namespace: str | None = None
    labels: str = ""

    def access(self, verb: str) -> Access:
        return Access(verb=verb, resource=self.kind, namespace=self.namespace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What there was at one version of the API server's store."""

    items: list[Any]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """kind: ADDED, MODIFIED, DELETED or BOOKMARK; item: the object, None for a bookmark; version: to go on from."""

    kind: str
    item: Any
    version: str


class KubernetesApi:
    """One API server, seen with one identity."""

    def __init__(self, client: Any, *, namespace: str = "default") -> None:
        """client: an ``ApiClient``; ``connect`` makes one. namespace: of whoever asks."""
        from kubernetes import client as models

        self.namespace = namespace
        self._client = client
        self._models = models
        self._core = models.CoreV1Api(client)

    @classmethod
    def connect(cls, *, kubeconfig: Path | None = None, context: str | None = None) -> KubernetesApi:
        """As the pod's service account where there is one and no kubeconfig is named, else as the kubeconfig says.

        Raises ``FailedPrecondition`` (NO_KUBERNETES).
        """
        from kubernetes import client, config

        configuration, namespace = client.Configuration(), ""
        token = Path(config.incluster_config.SERVICE_TOKEN_FILENAME)
        file = None if kubeconfig is None else str(kubeconfig)
        try:
            if kubeconfig is None and context is None and token.exists():
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
                namespace = token.with_name("namespace").read_text(encoding="utf-8").strip()
            else:
                config.load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=file, context=context, client_configuration=configuration
                )
                contexts, active = config.list_kube_config_contexts(file)  # type: ignore[no-untyped-call]
                chosen = next((one for one in contexts if one["name"] == context), active)
                namespace = chosen["context"].get("namespace", "")
        except (config.ConfigException, OSError) as error:
            raise no_cluster(error) from None
        configuration.retries = False  # retried here, within one bound
        return cls(client.ApiClient(configuration), namespace=namespace or "default")

    @property
    def server(self) -> str:
        """Its URL."""
        return str(self._client.configuration.host)

    def close(self) -> None:
        self._client.close()

    # ---- nodes and pods

    def listing(self, selection: Selection) -> Listing:
        """Raises as ``errors.typed``."""
        listed = self._call(selection.access("list"), self._lister(selection))
        return Listing(items=listed.items, version=listed.metadata.resource_version)

    def watch(self, selection: Selection) -> Any:
        """A ``kubernetes.watch.Watch`` for ``changes``; to be used once."""
        from kubernetes.watch import Watch

        return Watch(return_type="V1Node" if selection.kind == "nodes" else "V1Pod")  # type: ignore[no-untyped-call]

    def changes(self, selection: Selection, version: str, watch: Any) -> Iterator[Change]:
        """What happens after ``version``, until the server ends the watch, at the latest after ``WATCH_S``.

        watch: from ``watch``; its ``stop`` from another thread ends this. Raises as ``errors.typed``: ``Aborted``
        (RESOURCE_VERSION_GONE) where to list again, ``Unavailable`` for a connection that broke.
        """
        access = selection.access("watch")
        try:
            for event in watch.stream(
                self._lister(selection),
                resource_version=version,
                timeout_seconds=WATCH_S,
                allow_watch_bookmarks=True,
                _request_timeout=(CONNECT_TIMEOUT_S, WATCH_S + _SILENCE_S),
            ):
                if event is None:  # half a line, of a connection that broke
                    continue
                is_bookmark = event["type"] == "BOOKMARK"
                version = event["raw_object"]["metadata"]["resourceVersion"]
                yield Change(kind=event["type"], item=None if is_bookmark else event["object"], version=version)
        except self._failures() as error:
            raise typed(error, access) from error

    def node(self, name: str) -> Any:
        """``V1Node``. Raises as ``errors.typed``."""
        return self._call(
            Access(verb="get", resource="nodes"), lambda **options: self._core.read_node(name, **options), name
        )

    def cordon(self, name: str, *, unschedulable: bool = True) -> None:
        """No new pods there, or again. A conflict is retried. Raises as ``errors.typed``."""
        body = {"spec": {"unschedulable": unschedulable}}
        access = Access(verb="patch", resource="nodes")
        self._call(access, lambda **options: self._core.patch_node(name, body, **options), name)

    def evict(self, name: str, namespace: str) -> None:
        """Ask for the end of a pod, its grace period included; one that is gone already is no error.

        Raises as ``errors.typed``: ``ResourceExhausted`` where a disruption budget forbids it for now.
        """
        models = self._models
        body = models.V1Eviction(metadata=models.V1ObjectMeta(name=name, namespace=namespace))
        access = Access(verb="create", resource="pods/eviction", namespace=namespace)
        try:
            self._call(
                access,
                lambda **options: self._core.create_namespaced_pod_eviction(name, namespace, body, **options),
                name,
            )
        except NotFound:
            return

    # ---- what preflight asks

    def version(self) -> tuple[int, int]:
        """Of the server: (1, 31)."""
        told = self._call(Access(verb="get", resource="version"), self._models.VersionApi(self._client).get_code)
        return int(told.major), int("".join(filter(str.isdigit, told.minor)))

    def resources(self, group: str, version: str) -> frozenset[str]:
        """Plural names of what the server has in this version of a group; empty where it does not know that."""
        access = Access(verb="get", resource=f"apis/{group}/{version}")
        api = self._models.CustomObjectsApi(self._client)
        try:
            listed = self._call(access, lambda **options: api.get_api_resources(group, version, **options))
        except NotFound:
            return frozenset()
        return frozenset(resource.name for resource in listed.resources)

    def may(self, access: Access) -> bool:
        """Whether who asks may do that, by SelfSubjectAccessReview."""
        models = self._models
        resource, _, subresource = access.resource.partition("/")
        attributes = models.V1ResourceAttributes(
            verb=access.verb,
            group=access.group,
            resource=resource,
            subresource=subresource or None,
            namespace=access.namespace,
        )
        review = models.V1SelfSubjectAccessReview(
            spec=models.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
        )
        asked = Access(verb="create", resource="selfsubjectaccessreviews", group="authorization.k8s.io")
        api = models.AuthorizationV1Api(self._client)
        answer = self._call(asked, lambda **options: api.create_self_subject_access_review(review, **options))
        return bool(answer.status.allowed)

    def storage_classes(self) -> list[Any]:
        """``V1StorageClass`` each. Raises as ``errors.typed``."""
        access = Access(verb="list", resource="storageclasses", group="storage.k8s.io")
        return list(self._call(access, self._models.StorageV1Api(self._client).list_storage_class).items)

    def exists(self, kind: Literal["secrets", "persistentvolumeclaims"], name: str, namespace: str) -> bool:
        """Whether there is such an object. Raises as ``errors.typed`` but for ``NotFound``."""
        read = {
            "secrets": self._core.read_namespaced_secret,
            "persistentvolumeclaims": self._core.read_namespaced_persistent_volume_claim,
        }[kind]
        access = Access(verb="get", resource=kind, namespace=namespace)
        try:
            self._call(access, lambda **options: read(name, namespace, **options), name)
        except NotFound:
            return False
        return True

    def ray_services(self, namespace: str) -> list[dict[str, Any]]:
        """KubeRay's, as plain objects. Raises as ``errors.typed``."""
        access = Access(verb="list", resource="rayservices", group="ray.io", namespace=namespace)
        api = self._models.CustomObjectsApi(self._client)
        listed = self._call(
            access,
            lambda **options: api.list_namespaced_custom_object("ray.io", "v1", namespace, "rayservices", **options),
        )
        return list(listed["items"])

    # ---- below

    def _lister(self, selection: Selection) -> Callable[..., Any]:
        if selection.kind == "nodes":
            return partial(self._core.list_node, label_selector=selection.labels)
        return partial(
            self._core.list_namespaced_pod, selection.namespace or "default", label_selector=selection.labels
        )

    def _failures(self) -> tuple[type[Exception], ...]:
        from urllib3.exceptions import HTTPError

        return (self._models.ApiException, HTTPError, OSError)

    def _call(self, access: Access, function: Callable[..., Any], name: str = "") -> Any:
        failures = self._failures()

        def attempt() -> Any:
            try:
                return function(_request_timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
            except failures as error:
                raise typed(error, access, name) from error

        retrying = Retrying(
            stop=stop_after_attempt(MAX_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            retry=retry_if_exception(_is_passing),
            reraise=True,
        )
        return retrying(attempt)


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, Unavailable) or (isinstance(error, SeamountError) and error.reason == CONFLICT)
