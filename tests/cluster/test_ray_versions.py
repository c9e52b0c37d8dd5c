"""Two releases beside each other, as while a new image is rolled out: two Ray clusters, one Redis, one cluster name.

The older one is the commit before this one, unpacked and run from a folder of its own.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from harness.long_turns import LongTurn, num_tokens_in
from harness.ray_nodes import free_port, random_checkpoint, wait_for
from harness.scaling import MAX_CONTEXT_TOKENS, Load, say, without_end
from seamount.router.client import Client
from seamount.wire.errors import SeamountError

pytestmark = [pytest.mark.scaling, pytest.mark.cluster, pytest.mark.figures, pytest.mark.timeout(600)]
NUM_GANGS = 2
ROOT = Path(__file__).parents[2]
CROSSING_S = 45.0
"""What a turn takes that is to run while the newer release starts, which slows it down, and takes over."""
_LAY_OUT = "import runpy, setuptools; setuptools.setup = lambda: None; runpy.run_path('setup.py')"
_UP = "from seamount.cluster.cli import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One that runs. address: of its router."""

    address: str
    process: subprocess.Popen[bytes]

    def ranks(self) -> dict[str, int]:
        """Those that its router sees alive, its own release's and the other's, with their process ids."""
        with Client(self.address) as client:
            ranks = [rank for rank in client.list_ranks() if rank.alive and not rank.state.draining]
            return {rank.state.rank_id: rank.state.process_id for rank in ranks}

    def pids(self) -> set[int]:
        return set(self.ranks().values())


@dataclass(frozen=True, slots=True)
class Routers:
    """What clients are told: all of both releases."""

    addresses: str

    def client(self) -> Client:
        return Client(self.addresses)


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it was one commit ago."""
    before = subprocess.run(["git", "rev-parse", "HEAD~1"], cwd=ROOT, capture_output=True, text=True, check=False)
    if before.returncode != 0:
        pytest.skip(f"there is no commit before this one: {before.stderr.strip()}")
    tree = tmp_path_factory.mktemp("previous")
    archive = subprocess.run(["git", "archive", before.stdout.strip()], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "--exclude=*.safetensors", "-C", str(tree)], input=archive.stdout, check=True)
    subprocess.run([sys.executable, "-c", _LAY_OUT], cwd=tree, check=True, capture_output=True)
    print(f"the release before this one is {before.stdout.strip()[:12]}")
    return tree / "gen"


@contextmanager
def running(folder: Path, settings: dict, redis_url: str, *, port: int, package: Path | None) -> Iterator[Release]:
    """``seamount up``, until it answers. port: of the router; package: None = this one."""
    folder.mkdir()
    config = folder / "serving.yaml"
    config.write_text(yaml.safe_dump({**settings, "run_dir": str(folder / "run"), "router": {"port": port}}))
    environment = {**os.environ, "SEAMOUNT_REDIS_URL": redis_url}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _UP, "up", "--config", str(config)], stdout=log, stderr=log, env=environment
        )
    release = Release(address=f"127.0.0.1:{port}", process=process)
    try:
        wait_for(f"{folder.name} serves", lambda: answers(release), 180.0)
        yield release
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60.0)
        finally:
            print((folder / "log").read_text()[-2000:], file=sys.stderr)
            process.kill()


def answers(release: Release) -> bool:
    assert release.process.poll() is None
    try:
        return bool(release.pids())
    except SeamountError:
        return False


def check_crossed(turn: LongTurn, newer: Release) -> None:
    """It went on at the newer release's gang, with its caches, and its client missed nothing and heard nothing twice:
    both the gang and the router that it began at have left."""
    receipt = turn.result()
    assert receipt.decode_rank in newer.ranks()
    num_kept = receipt.num_cached_tokens + receipt.num_migrated_tokens
    assert num_kept > receipt.num_prompt_tokens
    silence_s = turn.told.silence_s(turn.token_times[0])
    print(
        f"a turn of {receipt.num_output_tokens} tokens in {turn.lasted_s:.1f} s crossed with the caches of {num_kept}, "
        f"{len(turn.told.calls)} calls, longest silence {silence_s:.2f} s"
    )


def test_sessions_cross_from_one_release_to_the_next_and_no_turn_fails(
    previous: Path, redis_url: str, tmp_path: Path
) -> None:
    settings = {
        "cluster_name": f"test-{secrets.token_hex(4)}",
        "model": {"path": str(without_end(random_checkpoint(tmp_path)))},
        "cache": {"num_pages": 1024},
        "engine": {"max_context_tokens": MAX_CONTEXT_TOKENS, "step_timeout_s": 15.0},
        "directory": {"dead_after_s": 6.0},
        "pools": {"decode": {"gangs": NUM_GANGS, "expert_parallel": 1}, "prefill": {"gangs": 0}},
        "draining": {"turns_s": 2.0, "timeout_s": 40.0},
    }
    old_port, new_port = free_port(), free_port()
    routers = Routers(f"127.0.0.1:{old_port},127.0.0.1:{new_port}")
    with running(tmp_path / "older", settings, redis_url, port=old_port, package=previous) as older:
        wait_for("all gangs of the older release", lambda: len(older.pids()) == NUM_GANGS)
        of_older = older.pids()
        with Client(older.address) as client:
            session_id = client.create_session().id
            say(client, session_id, "a long story about the sea " * 30)
            long_turn = LongTurn(
                address=routers.addresses,
                session_id=client.create_session().id,
                num_tokens=num_tokens_in(CROSSING_S, older.address, client),
            )
            long_turn.start()
        with running(tmp_path / "newer", settings, redis_url, port=new_port, package=None) as newer:
            load = Load(system=routers)
            load.start(3, num_tokens=30)
            begun = time.monotonic()
            wait_for("the newer release's router sees them", lambda: len(newer.pids()) >= NUM_GANGS)
            serving: list[set[int]] = []

            def is_over() -> bool:
                serving.append(newer.pids())
                return not serving[-1] & of_older and len(serving[-1]) == NUM_GANGS

            wait_for("the older release's gangs are gone", is_over, 120.0)
            assert min(len(pids) for pids in serving) >= NUM_GANGS  # one for one
            with Client(newer.address) as client:
                receipt = say(client, session_id, "and then?")
                num_turns = load.num_turns
                wait_for("turns go on", lambda: load.num_turns >= num_turns + 6, 60.0)
                load.stop()
                assert load.failures == []
                print(f"{load.num_turns} turns of three sessions, none failed, in {time.monotonic() - begun:.1f} s")
                assert receipt.num_cached_tokens + receipt.num_migrated_tokens > 500
                assert len(client.get_history(session_id).messages) == 4
                check_crossed(long_turn, newer)
                for crossed in load.acknowledged:
                    assert say(client, crossed, "still there?").num_prompt_tokens > 0
            assert len(newer.pids()) == NUM_GANGS
