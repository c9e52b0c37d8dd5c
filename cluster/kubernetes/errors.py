"""Failures of the Kubernetes API as typed errors that say which right is missing and what grants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seamount.wire.errors import (
    Aborted,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SeamountError,
    Unauthenticated,
    Unavailable,
)

GONE = "RESOURCE_VERSION_GONE"
CONFLICT = "CONFLICT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One kind of request. resource: plural, with its subresource (``pods/eviction``); namespace: None for what has
    none."""

    verb: str
    resource: str
    group: str = ""
    namespace: str | None = None

    def __str__(self) -> str:
        group = f".{self.group}" if self.group else ""
        where = "" if self.namespace is None else f" in namespace {self.namespace}"
        return f"{self.verb} {self.resource}{group}{where}"

    @property
    def rule(self) -> str:
        """The rule that grants it, and where it belongs."""
        kind = "a ClusterRole" if self.namespace is None else f"a Role in namespace {self.namespace}"
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.resource}"], verbs: ["{self.verb}"]}} in {kind}'


def typed(error: Any, access: Access, name: str = "") -> SeamountError:
    """What an ``ApiException`` of the client library, or a broken connection, means here.

    401 ``Unauthenticated``, 403 ``PermissionDenied``, 404 ``NotFound``, 409 ``Aborted`` (CONFLICT), 410 ``Aborted``
    (RESOURCE_VERSION_GONE), 422 ``InvalidArgument``, 429 ``ResourceExhausted``, the rest ``Unavailable``.
    """
    status = getattr(error, "status", None)
    what = f"{access}{f' {name}' if name else ''}"
    match status:
        case 401:
            return Unauthenticated(
                f"Kubernetes does not know who asks ({what}): renew the kubeconfig's or the pod's token",
                reason="UNKNOWN_TO_KUBERNETES",
            )
        case 403:
            return PermissionDenied(
                f"Kubernetes forbids to {what}: add the rule {access.rule}, and bind it to who asks",
                reason="FORBIDDEN_BY_KUBERNETES",
                metadata={"verb": access.verb, "resource": access.resource, "namespace": access.namespace or ""},
            )
        case 404:
            return NotFound(f"Kubernetes has nothing to {what}: look for its name", reason="NOT_IN_KUBERNETES")
        case 409:
            return Aborted(f"Kubernetes had something else to {what} meanwhile; retry", reason=CONFLICT)
        case 410:
            return Aborted(f"Kubernetes has forgotten the version to {what} from; list again", reason=GONE)
        case 422 | 400:
            return InvalidArgument(f"Kubernetes refuses to {what}: {_said(error)}", field=access.resource)
        case 429:
            return ResourceExhausted(
                f"Kubernetes does not {what} now: {_said(error)}", reason="TOO_EARLY", retry_after_s=1.0
            )
        case int() if status < 500:
            return Internal(f"Kubernetes answers {status} to {what}: {_said(error)}", reason="KUBERNETES_ANSWER")
        case _:
            return Unavailable(
                f"the Kubernetes API does not {what}: {_said(error)}",
                reason="KUBERNETES_UNAVAILABLE",
                retry_after_s=1.0,
            )


def no_cluster(cause: Exception) -> FailedPrecondition:
    """There is neither a pod's service account nor a usable kubeconfig."""
    return FailedPrecondition(
        f"no Kubernetes to talk to ({cause}): give --kubeconfig, set KUBECONFIG, or run in a pod that mounts the token "
        "of its service account",
        reason="NO_KUBERNETES",
    )


def _said(error: Any) -> str:
    return str(getattr(error, "reason", None) or type(error).__name__)[:200]
