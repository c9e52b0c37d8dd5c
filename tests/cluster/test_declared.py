"""The chart's Serve configuration, sent to Serve as KubeRay sends it, on three Ray nodes of this machine.

The nodes are started as KubeRay starts its pods: by ``ray start``, with the resources of the chart's groups. One
cluster serves the whole file; the tests run in order and leave it up for the next.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness.ray_nodes import free_port, random_checkpoint, wait_for
from rendered_chart import VALUES, Manifest, groups, of_kind, run_template, serve_config
from seamount.router.client import Client, Sampling, user
from seamount.v1 import events_pb2
from seamount.wire.errors import Unauthenticated

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PORTS = ("node-manager", "object-manager", "runtime-env-agent", "metrics-export", "dashboard-agent-listen")
"""What each node of one machine needs for itself; a pod has its own."""
SECRETS = "/etc/seamount-secrets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """dashboard: of the head node, where KubeRay talks to Serve. pids: of the ``ray start`` of each node."""

    dashboard: str
    token: str
    pids: tuple[int, ...]

    def request(self, method: str, content: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        body = None if content is None else json.dumps(content).encode()
        url = f"{self.dashboard}/api/serve/applications/"
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def statuses(self) -> dict[str, str]:
        return {name: found["status"] for name, found in self.request("GET")["applications"].items()}

    def replicas(self, application: str) -> set[int]:
        """Process ids; Serve names a replica's process after its application."""
        found = set()
        for child in (child for pid in self.pids for child in psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                if f"ray::ServeReplica:{application}:" in " ".join(child.cmdline()):
                    found.add(child.pid)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    nodes: Nodes
    config: dict[str, Any]
    address: str
    api_key: str


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("declared")
    port = free_port()
    chosen = {"model": {"path": str(random_checkpoint(folder))}, "router": {"port": port}}
    done = run_template("--set-json", f"serving={json.dumps(chosen)}", values=[VALUES["trial-cpu"]])
    assert done.returncode == 0, done.stderr
    manifests = [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]
    api_key = write_secrets(manifests, folder / "secrets")
    config = json.loads(json.dumps(serve_config(manifests)).replace(SECRETS, str(folder / "secrets")))
    for application in config["applications"]:
        application["args"]["cluster_name"] = f"test-{port}"
        application["args"]["run_dir"] = str(folder / "run")
    temp_dir = Path(tempfile.mkdtemp(prefix="smt-"))
    with three_nodes(temp_dir, groups(manifests), redis_url) as nodes:
        nodes.request("PUT", config)
        yield System(nodes=nodes, config=config, address=f"127.0.0.1:{port}", api_key=api_key)
    shutil.rmtree(temp_dir)


def write_secrets(manifests: list[Manifest], folder: Path) -> str:
    """The chart's own secrets as files, where pods have them mounted; the API key."""
    data: dict[str, str] = {}
    for secret in of_kind(manifests, "Secret"):
        data |= {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    for place, key in (("keys/api-keys", "api-keys"), ("worker/token", "token")):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text(data[key])
    return data["trial-key"]


class three_nodes:
    """The head; a node with a router and the prefill pool; a node with the decode pool."""

    def __init__(self, temp_dir: Path, groups: dict[str, dict[str, Any]], redis_url: str) -> None:
        self._token = secrets.token_hex(32)
        self._groups = groups
        inherited = os.environ.copy()
        inherited.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)  # `ray start` refuses several nodes with it
        self._environment = inherited | {
            "RAY_TMPDIR": str(temp_dir),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "90",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at the end, nobody is left to move to
            "SEAMOUNT_REDIS_URL": redis_url,
        }
        self._temp_dir = temp_dir
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Nodes:
        gcs, dashboard = free_port(), free_port()
        self._start(
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={self._temp_dir}", of="head"
        )
        nodes = Nodes(dashboard=f"http://127.0.0.1:{dashboard}", token=self._token, pids=(self._started[0].pid,))
        wait_for("dashboard", lambda: answers(nodes), timeout_s=60.0)
        self._start(f"--address=127.0.0.1:{gcs}", "--num-cpus=2", of="router prefill")
        self._start(f"--address=127.0.0.1:{gcs}", "--num-cpus=2", of="decode")
        return Nodes(dashboard=nodes.dashboard, token=self._token, pids=tuple(process.pid for process in self._started))

    def _start(self, *options: str, of: str) -> None:
        """A node with the resources of these groups."""
        offered = {key: float(value) for name in of.split() for key, value in self._groups[name]["resources"].items()}
        counted = [f"--num-{key.lower()}s={offered.pop(key):g}" for key in ("CPU", "GPU") if key in offered]
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=80000000",
            *(f"--{name}-port={free_port()}" for name in PORTS),
            f"--resources={json.dumps(offered)}",
            *counted,
            *options,
        ]
        log = self._temp_dir / f"start-{len(self._started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
        self._started.append(process)

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ray runtime started." in log.read_text()

        wait_for(f"node for {of}", is_up, timeout_s=100.0)

    def __exit__(self, *_: object) -> None:
        started = [psutil.Process(process.pid) for process in self._started]
        below = [child for process in started for child in process.children(recursive=True)]
        for node in reversed(self._started):
            node.send_signal(signal.SIGTERM)
        for node in self._started:
            node.wait(30.0)
        _, left = psutil.wait_procs(below, timeout=20.0)
        names = [(process.pid, process.name()) for process in left]
        for process in left:
            process.kill()
        assert not names


def answers(nodes: Nodes) -> bool:
    try:
        nodes.request("GET")
    except OSError:
        return False
    return True


def is_ready(address: str) -> bool:
    """As the readiness probe of a router's pod asks."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def say(client: Client, session_id: str, text: str) -> events_pb2.Receipt:
    turn = client.run_turn(session_id, [user(text)], sampling=Sampling(max_output_tokens=6), deadline_s=40.0).result()
    assert turn.receipt.num_output_tokens > 0
    return turn.receipt


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(system.address, api_key=system.api_key) as client:
        yield client


def test_kuberay_finds_nothing_that_still_starts_only_once_the_gangs_serve(system: System) -> None:
    """It turns to a new Ray cluster as soon as every application there runs."""
    seen: list[dict[str, str]] = [{}]

    def all_run() -> bool:
        seen.append(system.nodes.statuses())
        return bool(seen[-1]) and set(seen[-1].values()) == {"RUNNING"}

    wait_for("every application runs", all_run, timeout_s=120.0)
    assert sorted(seen[-1]) == ["decode-0", "fleet", "prefill-0", "readiness", "router"]


def test_the_configuration_comes_up_and_serves_a_conversation(system: System, client: Client) -> None:
    wait_for("router ready", lambda: is_ready(system.address), timeout_s=120.0)
    session = client.create_session()
    first = say(client, session.id, "Where does the sea begin? " * 8)
    second = say(client, session.id, "And where does it end?")
    assert second.num_cached_tokens > 0
    assert second.decode_rank == first.decode_rank
    assert len(client.get_history(session.id).messages) == 4
    declared = {
        name for name, status in system.nodes.statuses().items() if not name.startswith(("decode-", "prefill-"))
    }
    assert declared == {"fleet", "router", "readiness"}


def test_a_key_is_asked_for(system: System) -> None:
    with Client(system.address) as stranger, pytest.raises(Unauthenticated):
        stranger.create_session()


def gangs(system: System) -> dict[str, set[int]]:
    names = [name for name in system.nodes.statuses() if name.startswith(("decode-", "prefill-"))]
    return {name: system.nodes.replicas(name) for name in names}


def test_the_same_configuration_again_changes_nothing(system: System, client: Client) -> None:
    wait_for("both gangs", lambda: sorted(len(pids) for pids in gangs(system).values()) == [1, 2])
    before = gangs(system), [system.nodes.replicas(name) for name in ("fleet", "router", "readiness")]
    system.nodes.request("PUT", system.config)
    time.sleep(3.0)  # several passes of the fleet, and of Serve's controller
    assert (gangs(system), [system.nodes.replicas(name) for name in ("fleet", "router", "readiness")]) == before
    say(client, client.create_session().id, "Still there?")


def test_another_fleet_takes_the_gangs_over_as_they_are(system: System, client: Client) -> None:
    before = gangs(system), system.nodes.replicas("router")
    (fleet,) = system.nodes.replicas("fleet")
    changed = json.loads(json.dumps(system.config))
    changed["applications"][0]["args"]["autoscaling"]["shrink_after_s"] = 900.0
    session = client.create_session()
    say(client, session.id, "Before it changes. " * 4)
    system.nodes.request("PUT", changed)
    wait_for("fleet replaced", lambda: bool(system.nodes.replicas("fleet") - {fleet}))
    wait_for("fleet running", lambda: system.nodes.statuses()["fleet"] == "RUNNING")
    time.sleep(3.0)  # several passes of the new one
    assert (gangs(system), system.nodes.replicas("router")) == before
    assert say(client, session.id, "And after it.").num_cached_tokens > 0


def test_gangs_that_do_not_come_up_are_told_and_those_of_others_are_left_alone(system: System) -> None:
    before = gangs(system)
    changed = json.loads(json.dumps(system.config))
    (waiting,) = [one for one in changed["applications"] if one["name"] == "readiness"]
    changed["applications"].append(
        {**waiting, "name": "nobody", "args": {"cluster_name": "nobody", "start_timeout_s": 0.5}}
    )
    system.nodes.request("PUT", changed)

    def said() -> str:
        deployments = system.nodes.request("GET")["applications"]["nobody"]["deployments"]
        return " ".join(deployment["message"] for deployment in deployments.values())

    wait_for("told", lambda: "not all gangs serve after 0.5 s: the fleet has not told what it wants" in said())
    assert system.nodes.statuses()["nobody"] != "RUNNING"
    system.nodes.request("PUT", system.config)
    wait_for("gone", lambda: "nobody" not in system.nodes.statuses())
    assert gangs(system) == before


def test_settings_that_contradict_each_other_are_refused_by_name_and_nothing_stops(
    system: System, client: Client
) -> None:
    before = gangs(system)
    wrong = json.loads(json.dumps(system.config))
    wrong["applications"][0]["args"]["engine"]["max_context_tokens"] = 160_000
    system.nodes.request("PUT", wrong)
    wait_for("refused", lambda: system.nodes.statuses()["fleet"] == "DEPLOY_FAILED")
    said = system.nodes.request("GET")["applications"]["fleet"]["message"]
    assert "engine.max_context_tokens is 160000, but cache.num_pages = 2048 holds 131072 tokens" in said
    assert gangs(system) == before
    say(client, client.create_session().id, "Nobody noticed?")
