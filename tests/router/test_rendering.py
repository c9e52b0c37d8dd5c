"""Large inputs leave the event loop free; what they encode to is the same."""

from __future__ import annotations

import asyncio
import time

from seamount.router.context_policy import NOTHING
from seamount.router.history import History
from seamount.router.messages import Message, Role, ThinkingMode, message_to_proto
from seamount.router.rendering import OFF_LOOP_BYTES, Rendering
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import record_pb2

MODE = ThinkingMode.THINKING


def turn(number: int, text: str) -> record_pb2.TurnRecord:
    record = record_pb2.TurnRecord(turn_id=f"turn-{number}", fingerprint="f")
    record.input.append(message_to_proto(Message(role=Role.USER, content=text)))
    record.output.token_ids.extend([5, 6, 1])
    return record


async def longest_pause(stop: asyncio.Event) -> float:
    worst, before = 0.0, time.monotonic()
    while not stop.is_set():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        worst, before = max(worst, now - before), now
    return worst


async def test_large_inputs_are_encoded_beside_the_loop(tokenizer: Tokenizer) -> None:
    text = "the quick brown fox; " * 80_000
    started = time.monotonic()
    expected = History(tokenizer, "f").prompt((turn(0, text),), [Message(role=Role.USER, content=text[1:])], MODE)
    alone_s = time.monotonic() - started
    rendering, stop = Rendering(History(tokenizer, "f")), asyncio.Event()
    watching = asyncio.create_task(longest_pause(stop))
    await asyncio.sleep(0.01)
    message = Message(role=Role.USER, content=text[1:])
    records = (turn(0, text),)
    token_ids = await rendering.prompt(records, [message], MODE, num_bytes=len(text))
    stop.set()
    pause_s = await watching
    print(f"{2 * len(text):,} characters: {alone_s:.3f} s at once, longest pause {pause_s:.3f} s beside the loop")
    assert token_ids == expected.token_ids
    assert pause_s < alone_s / 4
    assert not rendering.history.unknown(records, MODE, user_follows=True, discards=NOTHING), "it is remembered"
    rendering.close()


async def test_what_is_remembered_or_small_takes_no_thread(tokenizer: Tokenizer) -> None:
    rendering = Rendering(History(tokenizer, "f"))
    text = "x " * OFF_LOOP_BYTES
    records = (turn(0, text),)
    message = Message(role=Role.USER, content="hello")
    first = await rendering.prompt(records, [message], MODE, num_bytes=5)
    assert rendering._thread._threads
    rendering._thread.shutdown()  # from here on it would raise
    assert await rendering.prompt(records, [message], MODE, num_bytes=5) == first
    assert await rendering.run(OFF_LOOP_BYTES, lambda: 7) == 7


async def test_the_length_of_a_context_counts_a_large_last_turn(tokenizer: Tokenizer) -> None:
    rendering = Rendering(History(tokenizer, "f"))
    records = tuple(turn(number, "word " * 20_000 * number) for number in range(3))
    length = await rendering.num_context_tokens(records, MODE)
    assert length == History(tokenizer, "f").num_context_tokens(records, MODE)
    rendering.close()
