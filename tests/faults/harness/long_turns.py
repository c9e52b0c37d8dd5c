"""Turns that are under way for a minute, and what their clients saw of them."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.recording import RecordingClient, Told
from harness.scaling import MAX_CONTEXT_TOKENS
from seamount.router.client import Client, Sampling, user
from seamount.v1 import events_pb2
from seamount.wire.errors import SeamountError

LONG_S = 60.0
AIM_S = 1.3 * LONG_S
"""What turns are made for that are to last for ``LONG_S``."""
MOST_TOKENS = MAX_CONTEXT_TOKENS - 1024
_DEADLINE_S = 600.0
_MEASURED_TOKENS = 400
_MAX_ATTEMPTS = 3
_OF_TOKENS = {"reasoning_delta", "content_delta", "tool_call_started", "tool_call_arguments_delta"}


@dataclass(slots=True, kw_only=True)
class LongTurn:
    """A greedy turn of ``num_tokens`` that one client follows, from a thread of its own."""

    address: str
    session_id: str
    num_tokens: int
    told: Told = field(default_factory=Told)
    failure: str = ""
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._follow()), daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """It has told something, and has not ended."""
        return bool(self.told.calls and self.told.calls[0]) and self._thread is not None and self._thread.is_alive()

    def result(self) -> events_pb2.Receipt:
        """When it is over: told in order, each event once."""
        assert self._thread is not None
        self._thread.join(_DEADLINE_S)
        assert not self._thread.is_alive()
        assert not self.failure, self.failure
        events = self.told.events
        assert events[-1].HasField("finished")
        assert events[-1].finished.receipt.num_output_tokens == self.num_tokens
        return events[-1].finished.receipt

    @property
    def token_times(self) -> list[float]:
        """When each event came that tokens made, by the client's monotonic clock."""
        return [at for call in self.told.calls for at, event in call if event.WhichOneof("event") in _OF_TOKENS]

    @property
    def lasted_s(self) -> float:
        """From the first token to the last one."""
        times = self.token_times
        return times[-1] - times[0]

    async def _follow(self) -> None:
        try:
            async with RecordingClient(self.address) as client:
                client.told = self.told
                await client.run_turn(
                    self.session_id,
                    [user(f"Count. {secrets.token_hex(4)}")],  # no other turn has these pages
                    sampling=Sampling(max_output_tokens=self.num_tokens, temperature=0.0),
                    deadline_s=_DEADLINE_S,
                ).result()
        except SeamountError as error:
            self.failure = f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """When a gang began to drain under a turn, and when its processes were gone; by the monotonic clock."""

    began_at: float
    gone_at: float


def check_told(turn: LongTurn, leaving: Leaving) -> events_pb2.Receipt:
    """That the turn ran for ``LONG_S``, before and after its gang was emptied, and told everything in one call."""
    receipt = turn.result()
    times = turn.token_times
    first, last = times[0], times[-1]
    assert last - first >= LONG_S
    assert first < leaving.began_at < leaving.gone_at < last
    assert len(turn.told.calls) == 1
    assert receipt.num_retries >= 1
    assert receipt.num_migrated_tokens > 0
    print(
        f"{receipt.num_output_tokens} tokens in {last - first:.1f} s on one stream: {leaving.began_at - first:.1f} s "
        f"before its gang was drained, {leaving.gone_at - leaving.began_at:.1f} s until that was gone, "
        f"{last - leaving.gone_at:.1f} s afterwards; {receipt.num_migrated_tokens} tokens moved with it, "
        f"longest silence {turn.told.silence_s(first):.2f} s"
    )
    return receipt


def num_tokens_in(seconds: float, address: str, client: Client) -> int:
    """How many tokens one turn tells in that time, as fast as this machine is now. address: of the router."""
    turn = LongTurn(address=address, session_id=client.create_session().id, num_tokens=_MEASURED_TOKENS)
    turn.start()
    turn.result()
    client.delete_session(turn.session_id)  # its pages would count for the gang
    return min(int(_MEASURED_TOKENS * seconds / turn.lasted_s), MOST_TOKENS)


def lasting(num_tokens: int, scene: Callable[[int], tuple[LongTurn, Leaving]]) -> events_pb2.Receipt:
    """Play ``scene`` with a turn of ``num_tokens``; again with more where that was over too soon, because the machine
    had other things to do when they were counted. Checked with ``check_told``."""
    for _ in range(_MAX_ATTEMPTS):
        turn, leaving = scene(num_tokens)
        turn.result()
        if turn.lasted_s >= LONG_S:
            return check_told(turn, leaving)
        print(f"{num_tokens} tokens took {turn.lasted_s:.1f} s")
        num_tokens = min(int(num_tokens * AIM_S / turn.lasted_s), MOST_TOKENS)
    raise AssertionError(f"none of {_MAX_ATTEMPTS} turns lasted for {LONG_S:g} s")
