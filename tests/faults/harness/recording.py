"""Clients that write down what they are told, and what must hold of it whatever died meanwhile."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from seamount.router.client import AsyncClient
from seamount.router.session_service import FORCED_TOKENS_KEY
from seamount.v1 import events_pb2

Event = events_pb2.TurnEvent


@dataclass(slots=True, kw_only=True)
class Told:
    """All that one client heard of one turn: each call's events as they came, repeated ones too."""

    calls: list[list[tuple[float, Event]]] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        """Each once, in order. Raises AssertionError where a call left one out, or two calls tell different ones."""
        known: dict[int, Event] = {}
        for call in self.calls:
            numbers = [event.sequence for _, event in call]
            assert all(later == earlier + 1 for earlier, later in pairwise(numbers)), f"events of a call: {numbers}"
            for _, event in call:
                before = known.setdefault(event.sequence, event)
                assert before == event, f"event {event.sequence} changed: {before} to {event}"
        assert list(known) == list(range(1, len(known) + 1)), f"events are missing: {sorted(known)}"
        return list(known.values())

    def silence_s(self, when: float) -> float:
        """The longest time without a new event from ``when`` on: what was on its way then comes first."""
        known: set[int] = set()
        times = [when]
        for call in self.calls:
            for at, event in call:
                if event.sequence not in known and at > when:
                    times.append(at)
                known.add(event.sequence)
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    def first_token_after(self, when: float) -> float:
        """When the first event came that a token made."""
        return min(at for call in self.calls for at, event in call if at > when and not event.HasField("started"))


class RecordingClient(AsyncClient):
    """``told`` grows with every frame of every stream; ``forced``: ids that turns take instead of sampled ones."""

    def __init__(self, address: str, *, forced: Sequence[int] = (), **options: Any) -> None:
        super().__init__(address, **options)
        if forced:
            self._calls.metadata = (*self._calls.metadata, (FORCED_TOKENS_KEY, ",".join(map(str, forced))))
        self.told = Told()
        self._told_by, self._calls.stream = self._calls.stream, self._recorded  # type: ignore[method-assign]

    async def _recorded(self, begin: Callable[..., Any]) -> AsyncGenerator[Any, None]:
        call: list[tuple[float, Event]] = []
        self.told.calls.append(call)
        async with aclosing(self._told_by(begin)) as answers:
            async for answer in answers:
                now = time.monotonic()
                call += [(now, event) for event in answer.events]
                yield answer


_OF_ONE_TURN = {"started": "session_id", "tool_call_started": "id", "usage": "num_cached_tokens", "finished": "receipt"}


def said(events: Sequence[Event]) -> list[Event]:
    """What a turn says, without its ids and its account: equal for equal turns of different sessions."""
    plain: list[Event] = []
    for event in events:
        copy = Event.FromString(event.SerializeToString())
        copy.ClearField("turn_id")
        for part, name in _OF_ONE_TURN.items():
            if copy.HasField(part):
                getattr(copy, part).ClearField(name)
        plain.append(copy)
    return plain
