"""What Serve says of its applications."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def applications() -> Mapping[str, Any]:
    """By name, as ``serve.status()`` has them: ``status``, ``message``, ``deployments``."""
    from ray import serve

    found: Mapping[str, Any] = serve.status().applications
    return found


def explanation(application: Any) -> str:
    """The last line that Serve has to say about an application's deployments: an exception's own, if there was one."""
    if application is None:
        return ""
    messages = [deployment.message for deployment in application.deployments.values()] or [application.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""
