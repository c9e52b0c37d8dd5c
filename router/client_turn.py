"""What a client sees of one turn: its events as they come, and the whole of it at the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from google.rpc import status_pb2

from seamount.router.messages import Message, Role, ToolCall
from seamount.v1 import common_pb2, events_pb2
from seamount.wire.errors import SeamountError, Unavailable, from_status

_MAX_DELAY_S = 5.0
"""A server that asks for a longer pause is not waited for: its error tells the caller how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A finished turn. The tokens and logprobs are there where they were asked for; ``token_ids`` of Generate only."""

    session_id: str
    turn_id: str
    model: str
    seed: int
    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: common_pb2.FinishReason
    usage: events_pb2.Usage
    receipt: events_pb2.Receipt
    logprobs: tuple[common_pb2.TokenLogprobs, ...]
    token_ids: tuple[int, ...]

    def message(self) -> Message:
        """The model's message, as a later conversation would hold it."""
        return Message(
            role=Role.ASSISTANT,
            content=self.content,
            reasoning_content=self.reasoning,
            tool_calls=self.tool_calls,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Bounded attempts with growing, jittered pauses; a server's own retry time counts where it is longer.

    resume_for_s: a session's turn goes on without its client, so its broken stream is opened again for as long as this,
    however many attempts that are, counted from its last event.
    """

    max_attempts: int = 3
    first_delay_s: float = 0.2
    resume_for_s: float = 30.0

    def delay_s(self, error: SeamountError, attempt: int, *, still_s: float | None = None) -> float | None:
        """How long to wait after ``attempt`` (from 1) failed; None = give up. still_s: since the last event of a
        turn that may be resumed."""
        passing = isinstance(error, Unavailable) or error.retry_after_s is not None
        asked_s = error.retry_after_s or 0.0
        has_time = still_s is not None and still_s < self.resume_for_s
        if not passing or (attempt >= self.max_attempts and not has_time) or asked_s > _MAX_DELAY_S:
            return None
        backoff = self.first_delay_s * 2.0 ** min(attempt - 1, 8) * random.uniform(0.5, 1.5)
        return min(max(asked_s, backoff), _MAX_DELAY_S)


Frame = tuple[Sequence[events_pb2.TurnEvent], Sequence[int]]
"""Events, and the token ids behind them (Generate only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How far a stream has come: the turn's id ('' before its first event) and the last event's number."""

    turn_id: str = ""
    sequence: int = 0


_NOTHING = Seen()


class TurnStream:
    """The events of one turn, in order, each once: ``async for event in stream``, then ``await stream.result()``.

    A broken stream of a session's turn is opened again, behind the last event that was seen. Leaving early (``aclose``,
    ``async with``) ends this stream alone, not a session's turn.
    Raises the typed error that the turn or the call ended with.
    """

    def __init__(
        self,
        open_frames: Callable[[Seen], AsyncGenerator[Frame, None]],
        retries: Retries,
        *,
        seen: Seen = _NOTHING,
    ) -> None:
        """seen: what was told of the turn before this stream."""
        self._open_frames = open_frames
        self._retries = retries
        self._first_seen = seen
        self._collected = _Collected(seen)
        self._events = self._follow()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> events_pb2.TurnEvent:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def result(self) -> Turn:
        """The whole turn, after waiting for its end; events that nobody took yet are taken in here."""
        async for _ in self:
            pass
        return self._collected.turn()

    async def aclose(self) -> None:
        """End the stream; repeating it is harmless."""
        await self._events.aclose()

    async def _follow(self) -> AsyncGenerator[events_pb2.TurnEvent, None]:
        attempt, moved_at = 1, time.monotonic()
        while not self._collected.ended:
            seen = self._collected.seen
            try:
                async with aclosing(self._open_frames(seen)) as frames:
                    async for events, token_ids in frames:
                        moved_at = time.monotonic()
                        for event in self._collected.take(events, token_ids):
                            yield event
                if not self._collected.ended and seen.sequence and seen == self._first_seen:
                    return  # whoever resumes behind the last event is told nothing more
                if not self._collected.ended:
                    raise Unavailable("the stream ended before the turn did", reason="STREAM_CUT", retry_after_s=0.0)
            except SeamountError as error:
                attempt = 1 if self._collected.seen != seen else attempt
                still_s = time.monotonic() - moved_at if self._collected.seen.turn_id else None
                delay_s = self._retries.delay_s(error, attempt, still_s=still_s)
                if delay_s is None:
                    raise
                attempt += 1
                await asyncio.sleep(delay_s)
        if self._collected.failure is not None:
            raise self._collected.failure


class _Collected:
    """Grows with a turn's events."""

    def __init__(self, seen: Seen) -> None:
        self.last_sequence = seen.sequence
        self.ended = False
        self.failure: SeamountError | None = None
        self._turn_id = seen.turn_id
        self._started = events_pb2.TurnStarted()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._usage = events_pb2.Usage()
        self._finished = events_pb2.TurnFinished()
        self._logprobs: list[common_pb2.TokenLogprobs] = []
        self._token_ids: list[int] = []

    @property
    def seen(self) -> Seen:
        return Seen(turn_id=self._turn_id, sequence=self.last_sequence)

    def take(self, events: Sequence[events_pb2.TurnEvent], token_ids: Sequence[int]) -> list[events_pb2.TurnEvent]:
        """The events among these that are new and for the reader: repeated ones, and a failure, are not."""
        new = [event for event in events if event.sequence > self.last_sequence]
        for event in new:
            self._take_one(event)
        self._token_ids += token_ids
        return [event for event in new if event.WhichOneof("event") != "failed"]

    def _take_one(self, event: events_pb2.TurnEvent) -> None:
        self.last_sequence = event.sequence
        self._turn_id = event.turn_id
        self._logprobs += event.logprobs
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
            case "reasoning_delta":
                self._reasoning.append(event.reasoning_delta.text)
            case "content_delta":
                self._content.append(event.content_delta.text)
            case "tool_call_started":
                started = event.tool_call_started
                self._calls.append(ToolCall(id=started.id, name=started.name, arguments_json=""))
            case "tool_call_arguments_delta":
                delta = event.tool_call_arguments_delta
                call = self._calls[delta.index]
                self._calls[delta.index] = replace(call, arguments_json=call.arguments_json + delta.arguments_json)
            case "usage":
                self._usage = event.usage
            case "finished":
                self._finished, self.ended = event.finished, True
            case "failed":
                status = status_pb2.Status.FromString(event.failed.status.SerializeToString())
                self.failure, self.ended = from_status(status), True

    def turn(self) -> Turn:
        return Turn(
            session_id=self._started.session_id,
            turn_id=self._turn_id,
            model=self._started.model,
            seed=self._started.seed,
            reasoning="".join(self._reasoning),
            content="".join(self._content),
            tool_calls=tuple(self._calls),
            finish_reason=self._finished.reason,
            usage=self._usage,
            receipt=self._finished.receipt,
            logprobs=tuple(self._logprobs),
            token_ids=tuple(self._token_ids),
        )
