"""A deployment that scales, on Ray nodes of this machine, and the load that tests put on it."""

from __future__ import annotations

import json
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file

from harness.ray_nodes import RayNode, free_port, random_checkpoint, ray_nodes
from seamount.cluster.app import Deployment, deploy
from seamount.cluster.fleet_meter import gang_name
from seamount.cluster.fleet_state import connect
from seamount.cluster.node_drain import DrainRequests
from seamount.cluster.settings import Settings, validate
from seamount.router.client import Client, Sampling, user
from seamount.v1 import admin_pb2, events_pb2, worker_pb2
from seamount.wire.errors import SeamountError

NODES = [("head", {"prefill": 2, "router": 1}), ("a", {"decode": 4, "router": 1}), ("b", {"decode": 4, "router": 1})]
"""Decode gangs have two ranks and lie on one node: two of them fit on each."""
TURN_S = 120.0
MAX_CONTEXT_TOKENS = 49_152


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSystem:
    settings: Settings
    deployment: Deployment
    nodes: list[RayNode]
    drains: DrainRequests

    def client(self) -> Client:
        return Client(self.deployment.router_address)

    def ranks(self, pool: worker_pb2.Pool = worker_pb2.POOL_UNSPECIFIED) -> list[admin_pb2.Rank]:
        """That take turns now."""
        with self.client() as client:
            return [
                rank
                for rank in client.list_ranks(pool)
                if rank.alive and rank.state.healthy and not rank.state.draining
            ]

    def gangs(self, pool: worker_pb2.Pool) -> list[str]:
        """Names of those whose ranks are all there."""
        ranks = self.ranks(pool)
        present = Counter(rank.state.gang_id for rank in ranks)
        sizes = {rank.state.gang_id: rank.state.gang_size for rank in ranks}
        return sorted(gang_name(gang_id) for gang_id, number in present.items() if number == sizes[gang_id])


@contextmanager
def scaling_system(
    redis_url: str,
    folder: Path,
    changes: Mapping[str, Any],
    *,
    num_places: int = 4,
    nodes: Sequence[tuple[str, Mapping[str, float]]] = NODES,
) -> Iterator[ScalingSystem]:
    """changes: of the settings ``autoscaling``; num_places: on each rank; the rest fits two cores. Greedy answers have
    as many tokens as they may have."""
    scaling = {
        "enabled": True,
        "first_token_s": 2.0,
        "inter_token_s": 60.0,  # this machine's speed decides nothing here
        "append_share": 0.05,
        "recover_s": 5.0,
        "flow_window_s": 10.0,
        "grow_after_s": 1.5,
        "shrink_after_s": 6.0,
        "start_s": 5.0,
    }
    settings = validate(
        {
            "cluster_name": f"test-{secrets.token_hex(4)}",
            "run_dir": str(folder / "run"),
            "model": {"path": str(without_end(random_checkpoint(folder)))},
            "cache": {"num_pages": 1024},
            "engine": {
                "max_context_tokens": MAX_CONTEXT_TOKENS,
                "max_running": num_places,
                "step_timeout_s": 15.0,
            },
            "router": {"port": free_port(), "cut_ahead": False},
            "directory": {"dead_after_s": 6.0},  # a busy machine
            "pools": {
                "decode": {"gangs": 1, "expert_parallel": 2, "resources": {"decode": 1}},
                "prefill": {"gangs": 0, "expert_parallel": 1, "resources": {"prefill": 1}},
            },
            "autoscaling": {**scaling, **changes},
            "draining": {"turns_s": 2.0, "timeout_s": 60.0, "replacement_s": 60.0},
        }
    )
    with ray_nodes(nodes) as started:
        deployment = deploy(settings, redis_url=redis_url, timeout_s=120.0)
        drains = DrainRequests(connect(redis_url, timeout_s=2.0), settings.cluster_name)
        yield ScalingSystem(settings=settings, deployment=deployment, nodes=started, drains=drains)
        deployment.stop(60.0)


def without_end(checkpoint: Path) -> Path:
    """With the logit of EOS at 0, the mean of the others: never the largest one, and no part of the nucleus."""
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    eos_token_id = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    tensors["lm_head.weight"][eos_token_id] = 0.0
    save_file(tensors, file)
    return checkpoint


def say(client: Client, session_id: str, text: str, *, num_tokens: int = 6) -> events_pb2.Receipt:
    """One turn, with at most so many tokens for an answer."""
    sampling = Sampling(max_output_tokens=num_tokens)
    turn = client.run_turn(session_id, [user(text)], sampling=sampling, deadline_s=TURN_S).result()
    assert turn.receipt.num_output_tokens > 0
    return turn.receipt


def gang_of(rank_id: str) -> str:
    return gang_name(rank_id.rpartition(".")[0])


def home_at(client: Client, gang: str) -> str:
    """A new session whose caches are on a rank of that gang."""
    for _ in range(100):
        session = client.create_session()
        if gang_of(say(client, session.id, "hello").decode_rank) == gang:
            return session.id
        client.delete_session(session.id)
    raise AssertionError(f"none of a hundred sessions was placed on {gang}")


def large_session_at(client: Client, gang: str) -> str:
    """One with many pages on a rank of that gang. It grows where its first few tokens are: pages that others had left
    elsewhere would make that gang dear."""
    for _ in range(10):
        session_id = home_at(client, gang)
        receipt = say(client, session_id, "a long story about the sea " * 150)
        if gang_of(receipt.decode_rank) == gang:
            return session_id
        client.delete_session(session_id)
    raise AssertionError(f"none of ten sessions grew on {gang}")


class Reachable(Protocol):
    def client(self) -> Client: ...


@dataclass(slots=True, kw_only=True)
class Load:
    """Sessions that speak one turn after the other, each on a thread of its own, until ``stop`` or a failure.

    acknowledged: turns of each session whose end its client was told.
    """

    system: Reachable
    acknowledged: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_turns(self) -> int:
        with self._lock:
            return self.acknowledged.total()

    def start(self, number: int, *, num_tokens: int = 100) -> None:
        """So many more sessions."""
        for _ in range(number):
            thread = threading.Thread(target=self._speak, args=(num_tokens,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Every turn that was begun is over then."""
        self._stop.set()
        for thread in self._threads:
            thread.join(TURN_S)
            assert not thread.is_alive()

    def _speak(self, num_tokens: int) -> None:
        with self.system.client() as client:
            session_id = client.create_session().id
            number = 0
            while not self._stop.is_set():
                try:
                    say(client, session_id, f"and then? {number}", num_tokens=num_tokens)
                except (SeamountError, AssertionError) as error:
                    with self._lock:
                        self.failures.append(f"{type(error).__name__}: {error}")
                    return
                number += 1
                with self._lock:
                    self.acknowledged[session_id] = number
