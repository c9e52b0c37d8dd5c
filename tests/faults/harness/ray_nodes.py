"""A Ray cluster of several nodes on this machine, and what tests look up in it."""

from __future__ import annotations

import logging
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from seamount.router.byte_tokenizer import write_byte_tokenizer
from seamount.workers.model.random_checkpoint import write_random_checkpoint

_raylets: set[int] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """raylet: its process id, the parent of every process on that node."""

    name: str
    node_id: str
    raylet: int


@contextmanager
def ray_nodes(resources: Sequence[tuple[str, Mapping[str, float]]]) -> Iterator[list[RayNode]]:
    """Nodes with these names and custom resources, the first one Ray's head; this process is connected to them. How
    they trust each other is set for the whole test process, in ``conftest``.

    Afterwards no process of theirs is left.
    """
    temp_dir = Path(tempfile.mkdtemp(prefix="smt-"))
    (temp_dir / "ray").mkdir()  # where Ray notes its address
    environment = pytest.MonkeyPatch()
    environment.setenv("RAY_TMPDIR", str(temp_dir))
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=True)
    common: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    (_, of_head), *others = resources
    started = [cluster.add_node(temp_dir=str(temp_dir), resources=dict(of_head), wait=False, **common)]
    started += [cluster.add_node(resources=dict(offered), **common) for _, offered in others]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    names = [name for name, _ in resources]
    nodes = [
        RayNode(name=name, node_id=node.node_id, raylet=_raylet(node))
        for name, node in zip(names, started, strict=True)
    ]
    _raylets.update(node.raylet for node in nodes)
    yield nodes
    _raylets.clear()
    ray.shutdown()
    cluster.shutdown()
    environment.undo()
    left = [process for process in psutil.process_iter(["cmdline"]) if str(temp_dir) in str(process.info["cmdline"])]
    _, left = psutil.wait_procs(left, timeout=10.0)
    assert not left
    shutil.rmtree(temp_dir)


def _raylet(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def random_checkpoint(folder: Path) -> Path:
    """With a byte-level tokenizer; its seed is printed."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    vocab_size = write_byte_tokenizer(tokenizer)
    files = {file.name: file.read_bytes() for file in tokenizer.iterdir()}
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"checkpoint seed {seed}")
    write_random_checkpoint(folder / "model", seed=seed, geometry="test", vocab_size=vocab_size, extra_files=files)
    return folder / "model"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def node_of(nodes: Sequence[RayNode], pid: int) -> str:
    """A worker process is a child of its node's raylet."""
    names = {node.raylet: node.name for node in nodes}
    for ancestor in psutil.Process(pid).parents():
        if ancestor.pid in names:
            return names[ancestor.pid]
    raise AssertionError(f"process {pid} belongs to no node")


def replica_pids(application: str) -> set[int]:
    """On the nodes of this test process. Serve names a replica's process after its application."""
    found = set()
    for raylet in _raylets:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if f"ray::ServeReplica:{application}:" in " ".join(process.cmdline()):
                        found.add(process.pid)
    return found


def wait_for(what: str, true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < timeout_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.1)
    print(f"{what}: {time.monotonic() - begun:.1f} s")
