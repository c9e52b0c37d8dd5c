"""The token log's writer: tokens of running turns go to Redis first, their events to the clients then.

One flush of a router is in flight at a time. It starts at once, with whatever the turns have; what arrives meanwhile
goes with the next. So one turn waits for one round trip, and a thousand turns share it. While Redis is away the same
entries are sent again and again: turns stall until it is back, or until their deadlines.

A turn that has had nothing to log for a while repeats its last entry's id: that writes nothing, and is refused where
the turn was cancelled or deleted at another router, or taken over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from weakref import WeakSet

from seamount.router.begun_turn import BegunTurn
from seamount.router.sessions import Sessions
from seamount.router.stored import AppendArguments
from seamount.v1 import common_pb2, events_pb2, record_pb2
from seamount.wire import failpoints
from seamount.wire.errors import SeamountError, Unavailable
from seamount.wire.ids import RankId

MAX_WAITING_TOKENS = 1024
"""Of one turn: more are not taken from the rank before some are logged."""
START_ID = "0-1"
PROMPT_ID = "0-2"
_RETRY_S = 0.05
ASK_EVERY_S = 0.5
"""How soon a turn that stands still, in a long prefill for example, hears that it is over."""

Events = Sequence[events_pb2.TurnEvent]


def entry_id(num_tokens: int) -> str:
    """The id of the entry whose last token is the ``num_tokens``-th; that of the prompt's for 0."""
    return f"{num_tokens}-0" if num_tokens else PROMPT_ID


class TurnLog:
    """One turn's part of the log. ``end``: id of the last entry that is known to be logged.

    error: what the log was refused with (another router holds the turn, the session is deleted, …), else None.
    on_refused: called then.
    """

    def __init__(
        self,
        turn: BegunTurn,
        *,
        end: str,
        num_tokens: int,
        deliver: Callable[[Events], None],
        wake: Callable[[TurnLog], None],
    ) -> None:
        """end, num_tokens: of what is logged already; deliver: takes events once what they are made of is logged."""
        self.end = end
        self.error: SeamountError | None = None
        self.on_refused: Callable[[], None] | None = None
        self._turn = turn
        self._num_tokens = num_tokens
        self._deliver = deliver
        self._wake = wake
        self._waiting = record_pb2.LoggedTokens()
        self._waiting_events: list[events_pb2.TurnEvent] = []
        self._sent: AppendArguments | None = None
        self._sent_events: Events = ()
        self._settled = asyncio.Event()
        self._is_still = self._asks = self._is_dropped = False

    def add_prompt(self, num_prompt_tokens: int, events: Events) -> None:
        """The length of the prompt, before any token; once."""
        self._waiting.num_prompt_tokens = num_prompt_tokens
        self._waiting_events.extend(events)
        self._wake(self)

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[common_pb2.TokenLogprobs],
        events: Events,
        *,
        decode_rank: RankId | None,
    ) -> None:
        """Sampled tokens and the events that they make; without tokens, the events come behind those of all before."""
        self._waiting.token_ids.extend(token_ids)
        self._waiting.logprobs.extend(logprobs)
        self._waiting.decode_rank = decode_rank or ""
        self._waiting_events.extend(events)
        self._wake(self)

    async def has_room(self) -> None:
        """Return when few enough tokens wait. Raises what the log was refused with."""
        while len(self._waiting.token_ids) > MAX_WAITING_TOKENS and self.error is None:
            await self._next_settled()
        self._check()

    async def is_logged(self) -> None:
        """Return when everything is logged and delivered. Raises what the log was refused with."""
        while (self._sent is not None or self.has_news) and self.error is None:
            await self._next_settled()
        self._check()

    def drop(self) -> None:
        """Log nothing more; events that were not delivered are not."""
        self._is_dropped = True
        self._waiting.Clear()
        self._waiting_events.clear()
        self._sent, self._sent_events = None, ()

    def note_end(self, end: str) -> bool:
        """The log was read: its last entry is ``end``. Whether that is what was sent last; it is delivered then."""
        if self._sent is None or self._sent.id != end:
            return False
        self.settle(None)
        return True

    # ---- for the flush

    @property
    def has_news(self) -> bool:
        return bool(self._waiting.token_ids or self._waiting.num_prompt_tokens)

    def ask_if_still(self) -> bool:
        """Whether nothing was sent since the last call: the next flush then asks whose the turn is."""
        self._asks, self._is_still = self._is_still, True
        return self._asks

    def to_send(self) -> AppendArguments | None:
        """The entry that has no answer yet, else one of all that waits, else the question; None for nothing."""
        asks, self._asks = self._asks, False
        if self._sent is not None or self.error is not None or self._is_dropped:
            return self._sent
        if self.has_news:
            self._num_tokens += len(self._waiting.token_ids)
            self._sent = self._entry(entry_id(self._num_tokens))
            self._sent_events, self._waiting_events = self._waiting_events, []
            self._waiting.Clear()
            self._is_still = False
        elif asks:
            self._sent = self._entry(self.end)
        return self._sent

    def _entry(self, end: str) -> AppendArguments:
        """What waits, as the entry of that id: of the last entry's, it is known already."""
        return AppendArguments(
            tenant=self._turn.tenant,
            session_id=self._turn.session_id,
            turn_id=self._turn.turn_id,
            epoch=self._turn.epoch,
            before=self.end,
            id=end,
            tokens=self._waiting.SerializeToString(),
        )

    def settle(self, refusal: SeamountError | None) -> None:
        """What was sent is logged, or refused for good."""
        if self._sent is None:  # dropped meanwhile
            return
        if refusal is not None:
            self.error = refusal
            if self.on_refused is not None:
                self.on_refused()
        else:
            self.end = self._sent.id
            self._sent, events, self._sent_events = None, self._sent_events, ()
            self._deliver(events)
        self._settled.set()

    async def _next_settled(self) -> None:
        self._settled.clear()
        await self._settled.wait()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error


class TokenLog:
    """All turns of one router. ``close`` at the end."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._news: dict[TurnLog, None] = {}
        self._flushing: asyncio.Task[None] | None = None
        self._open: WeakSet[TurnLog] = WeakSet()
        self._asking: asyncio.Task[None] | None = None

    def open(
        self, turn: BegunTurn, deliver: Callable[[Events], None], *, end: str = START_ID, num_tokens: int = 0
    ) -> TurnLog:
        """The writer for a turn that this router holds; ``end``, ``num_tokens``: of what is logged already."""
        log = TurnLog(turn, end=end, num_tokens=num_tokens, deliver=deliver, wake=self._wake)
        self._open.add(log)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="token log: whose")
        return log

    async def close(self) -> None:
        """Stop; what is not logged yet is not delivered either."""
        for task in (self._asking, self._flushing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    def _wake(self, log: TurnLog) -> None:
        self._news[log] = None
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush_all(), name="token log")

    async def _ask(self) -> None:
        """While turns are open: let those that stand still ask."""
        while self._open:
            await asyncio.sleep(ASK_EVERY_S)
            for log in [log for log in self._open if log.ask_if_still()]:
                self._wake(log)
        self._asking = None

    async def _flush_all(self) -> None:
        try:
            while self._news:
                await self._flush()
        finally:
            self._flushing = None

    async def _flush(self) -> None:
        logs, self._news = list(self._news), {}
        sending = [(log, entry) for log in logs if (entry := log.to_send()) is not None]
        if not sending:
            return
        ids = ",".join(entry.id for _, entry in sending)
        answers: Sequence[SeamountError | None]
        failpoints.reached("router.append", ids)
        try:
            answers = await self._sessions.append_tokens([entry for _, entry in sending])
        except Unavailable:
            self._news.update(dict.fromkeys(logs))
            await asyncio.sleep(_RETRY_S)
            return
        except SeamountError as error:
            answers = [error] * len(sending)
        failpoints.reached("router.appended", ids)
        for (log, _), refusal in zip(sending, answers, strict=True):
            log.settle(refusal)
            if log.has_news and refusal is None:
                self._news[log] = None
