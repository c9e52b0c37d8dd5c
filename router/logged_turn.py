"""A turn as its log tells it: the same events as its router tells, from the same token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from seamount.router.events import TurnEvents, status_of, turn_events
from seamount.router.messages import thinking_mode_from_proto
from seamount.router.parsing import OutputMode
from seamount.router.stored import LogEntry
from seamount.router.token_log import START_ID
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2
from seamount.wire.errors import DataLoss, SeamountError
from seamount.wire.ids import TurnId


@dataclass(slots=True, kw_only=True)
class LoggedTurn:
    """What a log holds so far; ``take`` its entries in order.

    num_prompt_tokens: 0 until it is logged; decode_rank: where the last tokens were sampled; end: id of the last entry;
    final_event: of a turn that ended without a commit; committed_index: of one that was committed.
    """

    start: record_pb2.TurnStart = field(default_factory=record_pb2.TurnStart)
    num_prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    decode_rank: str = ""
    end: str = ""
    final_event: events_pb2.TurnEvent | None = None
    committed_index: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether there was a log at all."""
        return bool(self.end)

    @property
    def is_over(self) -> bool:
        return self.final_event is not None or self.committed_index is not None

    def take(self, entries: Iterable[LogEntry]) -> None:
        """Raises ``DataLoss`` for entries that no router wrote."""
        for entry in entries:
            try:
                self._take(entry)
            except (DecodeError, ValueError) as error:
                raise _damaged() from error
            self.end = entry.id

    def _take(self, entry: LogEntry) -> None:
        if (entry.kind == "start") != (entry.id == START_ID) or (not self.end and entry.id != START_ID):
            raise _damaged()
        match entry.kind:
            case "start":
                self.start = record_pb2.TurnStart.FromString(entry.value)
            case "tokens":
                tokens = record_pb2.LoggedTokens.FromString(entry.value)
                self.num_prompt_tokens = self.num_prompt_tokens or tokens.num_prompt_tokens
                self.token_ids.extend(tokens.token_ids)
                self.logprobs.extend(tokens.logprobs)
                self.decode_rank = tokens.decode_rank or self.decode_rank
            case "ended":
                self.final_event = events_pb2.TurnEvent.FromString(entry.value)
            case "committed":
                self.committed_index = int(entry.value)
            case _:
                raise _damaged()


class LogEvents:
    """The events that a log makes, as it grows. Those of a committed turn's end stand in its record, not here."""

    def __init__(self, turn_id: TurnId, session: session_pb2.Session, tokenizer: Tokenizer, logged: LoggedTurn) -> None:
        self._logged = logged
        self._session = session
        mode = OutputMode.of(thinking_mode_from_proto(session.thinking_mode))
        self._events: TurnEvents = turn_events(turn_id, mode, logged.start.sampling, tokenizer)
        self._num_taken = 0
        self._has_started = False

    def news(self) -> list[events_pb2.TurnEvent]:
        """The events of what was logged since the last call."""
        logged, told = self._logged, list[events_pb2.TurnEvent]()
        if logged.num_prompt_tokens and not self._has_started:
            self._has_started = True
            told.append(started_event(self._events, self._session, logged))
        first, self._num_taken = self._num_taken, len(logged.token_ids)
        told += self._events.tokens(logged.token_ids[first:], logged.logprobs[first:])
        if logged.final_event is not None:
            if logged.final_event.WhichOneof("event") == "finished":
                told += self._events.cancelled(logged.num_prompt_tokens)
            else:
                told.append(logged.final_event)
        return told

    def cancelled(self) -> list[events_pb2.TurnEvent]:
        """The last events of the turn, were it cancelled now."""
        return self._events.cancelled(self._logged.num_prompt_tokens)

    def failed(self, error: SeamountError) -> events_pb2.TurnEvent:
        """The last event of the turn, did it fail now."""
        return self._events.failed(status_of(error))


def started_event(events: TurnEvents, session: session_pb2.Session, logged: LoggedTurn) -> events_pb2.TurnEvent:
    """The first event of a turn."""
    return events.started(
        session_id=session.id,
        model=session.model,
        num_prompt_tokens=logged.num_prompt_tokens,
        seed=logged.start.sampling.seed,
    )


def _damaged() -> DataLoss:
    return DataLoss("the token log of a turn is damaged; run the turn again", reason="LOG_DAMAGED")
