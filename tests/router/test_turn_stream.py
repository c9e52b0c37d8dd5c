"""One writer, many followers, none of them able to hurt the turn."""

from __future__ import annotations

import asyncio

from seamount.router.turn_stream import MAX_EVENTS_PER_BATCH, TurnStream
from seamount.v1.events_pb2 import TurnEvent


def event(sequence: int) -> TurnEvent:
    return TurnEvent(turn_id="t", sequence=sequence)


async def collect(stream: TurnStream) -> list[int]:
    return [item.sequence async for batch in stream.follow() for item in batch]


async def test_early_late_and_leaving_followers() -> None:
    stream = TurnStream()
    early = asyncio.create_task(collect(stream))
    leaver = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    stream.append([event(1), event(2)])
    await asyncio.sleep(0)
    leaver.cancel()
    stream.append([])
    stream.append([event(3)])
    stream.close()
    assert await asyncio.wait_for(early, 1) == [1, 2, 3]
    assert await asyncio.wait_for(collect(stream), 1) == [1, 2, 3]
    await asyncio.gather(leaver, return_exceptions=True)
    assert leaver.cancelled()


async def test_who_comes_late_gets_messages_of_a_bounded_size() -> None:
    stream = TurnStream()
    stream.append([event(number) for number in range(1, 3 * MAX_EVENTS_PER_BATCH)])
    stream.close()
    batches = [[item.sequence for item in batch] async for batch in stream.follow()]
    assert max(map(len, batches)) == MAX_EVENTS_PER_BATCH
    assert [number for batch in batches for number in batch] == list(range(1, 3 * MAX_EVENTS_PER_BATCH))
