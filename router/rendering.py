"""Prompts without a pause of the event loop: what is large is rendered and encoded on one thread beside it.

A history remembers what it has encoded and belongs to the loop's thread. A small turn is encoded there at once. For a
large one the thread encodes what is not remembered yet, with nothing shared, and the history then takes it over.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from seamount.router.context_policy import Discards, discards_of
from seamount.router.history import Ahead, History, rests
from seamount.router.messages import ASKING_ROLES, Message, ThinkingMode
from seamount.v1 import record_pb2

OFF_LOOP_BYTES = 32 << 10
"""About 10 ms of encoding."""

Result = TypeVar("Result")


class Rendering:
    """One router's prompts. ``close`` at the end."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rendering")

    def close(self) -> None:
        """Drop what still waits."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, num_bytes: int, work: Callable[[], Result]) -> Result:
        """Pure work on about ``num_bytes`` of input: here where that is little, else on the thread."""
        if num_bytes <= OFF_LOOP_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def prompt(
        self,
        records: Sequence[record_pb2.TurnRecord],
        messages: Sequence[Message],
        mode: ThinkingMode,
        *,
        num_bytes: int,
        discards: Discards | None = None,
    ) -> list[int]:
        """``History.prompt``; ``num_bytes``: of the messages."""
        asks = any(message.role in ASKING_ROLES for message in messages)
        discards = discards_of(records) if discards is None else discards
        ahead = await self._ahead(records, messages, mode, user_follows=asks, discards=discards, num_bytes=num_bytes)
        return self.history.prompt(records, messages, mode, discards=discards, ahead=ahead).token_ids

    async def num_context_tokens(self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode) -> int:
        """``History.num_context_tokens``."""
        return len(await self.context(records, mode))

    async def context(self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode) -> array[int]:
        """``History.context``."""
        await self._ahead(records, (), mode, user_follows=rests(records), discards=discards_of(records), num_bytes=0)
        return self.history.context(records, mode)

    async def settled(self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode) -> list[int]:
        """``History.settled``."""
        await self._ahead(records, (), mode, user_follows=True, discards=discards_of(records), num_bytes=0)
        return self.history.settled(records, mode)

    async def _ahead(
        self,
        records: Sequence[record_pb2.TurnRecord],
        messages: Sequence[Message],
        mode: ThinkingMode,
        *,
        user_follows: bool,
        discards: Discards,
        num_bytes: int,
    ) -> Ahead | None:
        history = self.history
        unknown = history.unknown(records, mode, user_follows=user_follows, discards=discards)
        if num_bytes + sum(place.record.ByteSize() for place in unknown) <= OFF_LOOP_BYTES:
            return None
        ahead = await asyncio.get_running_loop().run_in_executor(
            self._thread, history.encoded_ahead, unknown, records, messages, mode, discards
        )
        history.learn(ahead, mode)
        return ahead
