"""What keeps KubeRay from turning to a Ray cluster whose gangs do not serve yet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.fleet_samples import states
from seamount.cluster.declared import readiness
from seamount.cluster.fleet_state import FleetState, Progress, connect
from seamount.cluster.readiness import wait_until_up, what_is_missing
from seamount.cluster.redis_server import RedisServer
from seamount.wire.errors import DeadlineExceeded, InvalidArgument


def application(status: str, message: str = "") -> SimpleNamespace:
    deployments = {"v1": SimpleNamespace(message=message)}
    return SimpleNamespace(status=SimpleNamespace(value=status), message="", deployments=deployments)


async def wait(state: FleetState, *, timeout_s: float, **reported: Any) -> None:
    await wait_until_up(state, lambda: reported, timeout_s=timeout_s, poll_s=0.02)


async def test_it_waits_until_the_fleet_has_noted_that_all_are_up_and_never_again(redis_url: str) -> None:
    (state,) = states(redis_url, "ready")
    waiting = asyncio.create_task(wait(state, timeout_s=30.0))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await asyncio.to_thread(state.note_served)
    await waiting
    state.tell_siblings(is_serving=True, progress={"decode": Progress(num_ready=0, num_wanted=2)})
    await wait(state, timeout_s=0.01)  # started anew, on another head, say
    state.forget()


async def test_after_its_time_it_tells_what_is_missing(redis_url: str) -> None:
    (state,) = states(redis_url, "missing")
    with pytest.raises(DeadlineExceeded, match=r"after 0\.1 s: the fleet has not told what it wants") as caught:
        await wait(state, timeout_s=0.1)
    assert caught.value.reason == "GANGS_MISSING"
    wanted = {"decode": Progress(num_ready=1, num_wanted=4), "prefill": Progress(num_ready=0, num_wanted=0)}
    state.tell_siblings(is_serving=False, progress=wanted)
    with pytest.raises(DeadlineExceeded, match=r"s: decode 1 of 4; decode-1: no room"):
        await wait(
            state,
            timeout_s=0.1,
            **{"decode-0": application("RUNNING"), "decode-1": application("DEPLOYING", "pending\nno room")},
        )
    state.forget()


async def test_a_redis_that_is_away_is_waited_for(tmp_path: Path) -> None:
    server = RedisServer()
    url = server.start(tmp_path)
    state = FleetState(connect(url, timeout_s=0.2), cluster_name="test", ray_session="away")
    state.claim()
    state.note_served()
    server.stop()
    with pytest.raises(DeadlineExceeded, match="Redis does not answer"):
        await wait(state, timeout_s=0.1)
    waiting = asyncio.create_task(wait(state, timeout_s=30.0))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await asyncio.to_thread(server.start, tmp_path)
    await waiting
    server.stop()


def test_what_is_missing_names_no_more_than_a_few_and_not_itself() -> None:
    reported = {f"decode-{number}": application("DEPLOYING") for number in range(8)}
    reported |= {"router": application("RUNNING"), "readiness": application("DEPLOYING")}
    said = what_is_missing({"decode": Progress(num_ready=0, num_wanted=8)}, reported)
    assert said.startswith("decode 0 of 8; decode-0: DEPLOYING; ")
    assert said.endswith("decode-4: DEPLOYING; and 3 more")


@pytest.mark.parametrize("wrong", [0, -1, "soon", None, float("inf")])
def test_a_time_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidArgument, match="start_timeout_s is") as caught:
        readiness({"cluster_name": "test", "start_timeout_s": wrong})
    assert caught.value.field == "start_timeout_s"
