"""Redis dies between any two commands of a turn, or does one whose reply is lost, or stands still: turns stall and go
on, and nobody is taken for dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from harness.points import points, sample
from harness.recording import RecordingClient
from harness.recoveries import Promise
from harness.redis_proxy import Command, Fate
from harness.requests import SEEDED, SHORT
from harness.system import FaultSystem

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.cluster]

NUM_TOKENS = 8
STEPS = [("begin_turn", 0), *(("append_tokens", number) for number in range(NUM_TOKENS + 1)), ("commit_turn", 0)]
"""The commands of a turn: the begin, the entries of its log (of the prompt, of each token), the commit."""
PAUSE_S = 5.0
_ID = 8
"""Of append_tokens' arguments."""


def is_step(command: Command, name: str, number: int) -> bool:
    """number: tokens that the log has behind the entry, or more."""
    if command.name != name or name != "append_tokens":
        return command.name == name
    return int(command.arguments[_ID].decode().partition("-")[0]) >= number


class AtStep:
    """``Proxy.intercept``: does something to the first command that is this step, and lets all others pass."""

    def __init__(self, name: str, number: int, then: Callable[[], Awaitable[Fate]]) -> None:
        self.reached_at = 0.0
        self.over_at = 0.0
        self._step = name, number
        self._then = then

    async def __call__(self, command: Command) -> Fate:
        if self.reached_at or not is_step(command, *self._step):
            return Fate.PASS
        self.reached_at = time.monotonic()
        fate = await self._then()
        self.over_at = time.monotonic()
        return fate


async def one_turn(system: FaultSystem, step: AtStep, promise: Promise) -> None:
    """A turn at the first router, disturbed at a step; nobody dies of it, and nobody takes anything over."""
    asked = await system.afresh(SHORT)
    proxy = system.proxies["router-0"]
    proxy.intercept = step
    async with RecordingClient(system.addresses()) as client:
        answer = await system.begin(client, asked)
        await answer.task
        assert step.reached_at
        system.recoveries.note(promise, client.told.silence_s(step.over_at))
        assert client.told.events[-1].finished.receipt.num_retries == 0
        assert not taken_over(system)
        await system.check(answer, asked)


def taken_over(system: FaultSystem) -> list[Command]:
    return [c for proxy in system.proxies.values() for c in proxy.seen if c.name == "take_over_turn"]


@points("name,number", STEPS, seeded=1)
async def test_killed_before_a_command(system: FaultSystem, name: str, number: int) -> None:
    async def kill() -> Fate:
        await system.kill_redis()
        return Fate.PASS  # on a connection that is broken by now

    await one_turn(system, AtStep(name, number, kill), Promise.REDIS_KILLED)


@points("name,number", STEPS, seeded=1)
async def test_the_reply_is_lost(system: FaultSystem, name: str, number: int) -> None:
    async def lose() -> Fate:
        return Fate.LOSE_REPLY

    await one_turn(system, AtStep(name, number, lose), Promise.REPLY_LOST)


@points("name,number", sample(STEPS, 4), seeded=0)
async def test_stands_still(system: FaultSystem, name: str, number: int) -> None:
    async def stop() -> Fate:
        async with system.stopped(system.redis.pid):
            await asyncio.sleep(PAUSE_S)
        return Fate.PASS

    await one_turn(system, AtStep(name, number, stop), Promise.REDIS_PAUSED)
    assert await system.all_are_alive()


@pytest.mark.faults
async def test_one_router_is_cut_off(system: FaultSystem) -> None:
    """Redis answers the other one, which takes the turn over; the first tells the rest when it is back."""
    asked = await system.afresh(SEEDED)
    proxy = system.proxies["router-0"]

    async def cut_off() -> Fate:
        proxy.pause()
        return Fate.PASS

    proxy.intercept = AtStep("append_tokens", 5, cut_off)
    async with RecordingClient(system.addresses(0)) as client:
        answer = await system.begin(client, asked)
        async with asyncio.timeout(20):
            while not any(command.reply == b"TAKEN" for command in taken_over(system)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        proxy.go_on()
        await answer.task
        await system.check(answer, asked)


@pytest.mark.faults
async def test_connections_break_all_the_time(system: FaultSystem) -> None:
    asked = await system.afresh(SEEDED)
    proxy = system.proxies["router-0"]
    async with RecordingClient(system.addresses()) as client:
        answer = await system.begin(client, asked)
        while not answer.task.done():
            proxy.cut()
            await asyncio.sleep(0.02)
        await answer.task
        await system.check(answer, asked)
