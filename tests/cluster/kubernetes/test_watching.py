"""The fleet's watch as the settings and the environment of a pod ask for it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from seamount.cluster.environment import kubernetes_environment
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.fleet_state import connect
from seamount.cluster.kubernetes.watching import start_watch
from seamount.cluster.node_drain import DrainRequests
from seamount.cluster.settings import validate
from seamount.wire.errors import InvalidArgument
from seamount.wire.metrics import new_registry

from .api_server import ApiServer, node, pod

_WATCH = """
import sys, time
from prometheus_client import CollectorRegistry
from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.cluster.kubernetes.watching import start_watch
from seamount.cluster.node_closing import drain_requests
from seamount.cluster.settings import validate

settings = validate({"cluster_name": sys.argv[1], "redis_url": sys.argv[2], "draining": {"watch": "nodes"}})
drains = drain_requests(settings)
watch = start_watch(settings, drains, FleetMetrics(CollectorRegistry()))
assert watch is not None
until = time.monotonic() + 20
while time.monotonic() < until and not drains.requests():
    time.sleep(0.05)
(request,) = drains.requests()
print(request.node, request.deadline_at - request.asked_at)
watch.stop()
"""


@pytest.fixture
def drains(redis_url: str) -> DrainRequests:
    return DrainRequests(connect(redis_url, timeout_s=1.0), f"test-{secrets.token_hex(4)}")


def test_by_default_nothing_is_watched(drains: DrainRequests) -> None:
    assert start_watch(validate({}), drains, FleetMetrics(new_registry())) is None


def test_outside_of_a_pod_the_fleet_works_without_and_it_is_counted(
    drains: DrainRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEAMOUNT_POD_NAMESPACE", raising=False)
    registry = new_registry()
    assert start_watch(validate({"draining": {"watch": "pods"}}), drains, FleetMetrics(registry)) is None
    labels = {"resource": "pods", "cause": "refused"}
    assert registry.get_sample_value("seamount_fleet_watch_restarts_total", labels) == 1


def test_a_pods_environment_says_where_it_is() -> None:
    environ = {"SEAMOUNT_POD_NAMESPACE": "models", "RAY_CLUSTER_NAME": "seamount-abc"}
    where = kubernetes_environment(environ)
    assert (where.namespace, where.ray_cluster) == ("models", "seamount-abc")
    for variable in environ:
        with pytest.raises(InvalidArgument, match=variable) as caught:
            kubernetes_environment(environ | {variable: ""})
        assert caught.value.field == "draining.watch"


def test_a_cordon_reaches_redis_from_a_process_that_starts_as_the_fleet_does(
    server: ApiServer, kubeconfig: Path, redis_url: str
) -> None:
    server.put("nodes", node("n1", cordoned=True))
    server.put("pods", pod("decode-a", "n1", "10.0.0.1"))
    environment = {
        "KUBECONFIG": str(kubeconfig),
        "SEAMOUNT_POD_NAMESPACE": "models",
        "RAY_CLUSTER_NAME": "release-raycluster",
    }
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, f"test-{secrets.token_hex(4)}", redis_url],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    address, deadline_s = done.stdout.split()
    assert address == "10.0.0.1"
    draining = validate({}).draining
    assert float(deadline_s) == pytest.approx(draining.replacement_s + draining.timeout_s, abs=0.01)
