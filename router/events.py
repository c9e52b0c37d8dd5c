"""A turn's events, numbered: a pure function of the turn's parameters and its token ids.

Tokens are parsed one at a time, so the sequence numbers do not depend on how they arrived. Only what a turn cost
(usage, receipt) comes from elsewhere; it stands in the last events.
"""

from __future__ import annotations

from collections.abc import Sequence

from seamount.router.deltas import CallArguments, CallFinished, CallStarted, ContentText, ParsedDelta, ReasoningText
from seamount.router.parsing import FinishReason, OutputMode, ParsedOutput, TurnParser
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, events_pb2
from seamount.wire.errors import SeamountError, to_status
from seamount.wire.ids import SessionId, TurnId


def call_id_prefix(turn_id: TurnId) -> str:
    """Ids of a turn's calls: this and the call's index. Derived, so a turn that is replayed names them alike."""
    return f"call_{turn_id}_"


class TurnEvents:
    """Makes the events of one turn, in order: ``started``, ``tokens`` …, ``output_ended``, ``finished``.

    ``failed`` ends it at any point.

    parser: None where the turn only records.
    """

    def __init__(self, turn_id: TurnId, parser: TurnParser | None) -> None:
        self._turn_id = turn_id
        self._parser = parser
        self._sequence = 0
        self._logprobs: list[common_pb2.TokenLogprobs] = []
        self._num_logprobs_sent = 0

    @property
    def output_is_over(self) -> bool:
        """EOS, a stop token or a stop string was met: more tokens are not wanted."""
        return self._parser is not None and self._parser.ended

    def started(
        self, *, session_id: SessionId | str, model: str, num_prompt_tokens: int, seed: int
    ) -> events_pb2.TurnEvent:
        """``session_id`` is empty for stateless calls."""
        return self._event(
            started=events_pb2.TurnStarted(
                session_id=session_id, model=model, num_prompt_tokens=num_prompt_tokens, seed=seed
            )
        )

    def tokens(
        self, token_ids: Sequence[int], logprobs: Sequence[common_pb2.TokenLogprobs] = ()
    ) -> list[events_pb2.TurnEvent]:
        """Take in sampled ids, with logprobs of all of them or of none; returns the events that they cause."""
        assert self._parser is not None, "a turn that only records has no tokens"
        events: list[events_pb2.TurnEvent] = []
        for i, token_id in enumerate(token_ids):
            if self._parser.ended:
                break
            if logprobs:
                self._logprobs.append(logprobs[i])
            for delta in self._parser.feed(token_id):
                events.append(self._delta(delta))
        return events

    def output_ended(self, reason: FinishReason) -> tuple[list[events_pb2.TurnEvent], ParsedOutput]:
        """No more tokens come; ``reason`` holds unless the output was over by itself. Lets out what was withheld."""
        assert self._parser is not None, "a turn that only records has no output"
        deltas, output = self._parser.finish(reason)
        kept = max(0, output.num_tokens - self._num_logprobs_sent)
        del self._logprobs[kept:]
        return [self._delta(delta) for delta in deltas], output

    def finished(
        self, reason: FinishReason, usage: events_pb2.Usage, receipt: events_pb2.Receipt | None = None
    ) -> list[events_pb2.TurnEvent]:
        """The last two events."""
        return [
            self._event(usage=usage),
            self._event(finished=events_pb2.TurnFinished(reason=reason, receipt=receipt)),
        ]

    def cancelled(self, num_prompt_tokens: int) -> list[events_pb2.TurnEvent]:
        """The last two events of a turn that was cancelled. They carry no logprobs, whatever was still withheld."""
        self._logprobs = []
        usage = events_pb2.Usage(num_prompt_tokens=num_prompt_tokens)
        return self.finished(common_pb2.FINISH_REASON_CANCELLED, usage)

    def failed(self, status: common_pb2.Status) -> events_pb2.TurnEvent:
        """The last event of a turn that failed, without logprobs."""
        self._logprobs = []
        return self._event(failed=events_pb2.TurnFailed(status=status))

    def told_until(self, sequence: int) -> None:
        """The events after this number are not told after all: others take their numbers."""
        self._sequence = sequence

    def _delta(self, delta: ParsedDelta) -> events_pb2.TurnEvent:
        if isinstance(delta, ContentText):
            return self._event(content_delta=events_pb2.ContentDelta(text=delta.text))
        if isinstance(delta, ReasoningText):
            return self._event(reasoning_delta=events_pb2.ReasoningDelta(text=delta.text))
        if isinstance(delta, CallStarted):
            return self._event(
                tool_call_started=events_pb2.ToolCallStarted(index=delta.index, id=delta.id, name=delta.name)
            )
        if isinstance(delta, CallArguments):
            return self._event(
                tool_call_arguments_delta=events_pb2.ToolCallArgumentsDelta(
                    index=delta.index, arguments_json=delta.arguments_json
                )
            )
        assert isinstance(delta, CallFinished)
        return self._event(tool_call_finished=events_pb2.ToolCallFinished(index=delta.index))

    def _event(
        self,
        *,
        started: events_pb2.TurnStarted | None = None,
        reasoning_delta: events_pb2.ReasoningDelta | None = None,
        content_delta: events_pb2.ContentDelta | None = None,
        tool_call_started: events_pb2.ToolCallStarted | None = None,
        tool_call_arguments_delta: events_pb2.ToolCallArgumentsDelta | None = None,
        tool_call_finished: events_pb2.ToolCallFinished | None = None,
        usage: events_pb2.Usage | None = None,
        finished: events_pb2.TurnFinished | None = None,
        failed: events_pb2.TurnFailed | None = None,
    ) -> events_pb2.TurnEvent:
        self._sequence += 1
        logprobs, self._logprobs = self._logprobs, []
        self._num_logprobs_sent += len(logprobs)
        return events_pb2.TurnEvent(
            turn_id=self._turn_id,
            sequence=self._sequence,
            started=started,
            reasoning_delta=reasoning_delta,
            content_delta=content_delta,
            tool_call_started=tool_call_started,
            tool_call_arguments_delta=tool_call_arguments_delta,
            tool_call_finished=tool_call_finished,
            usage=usage,
            finished=finished,
            failed=failed,
            logprobs=logprobs,
        )


def status_of(error: SeamountError) -> common_pb2.Status:
    """An error as ``TurnEvents.failed`` takes it."""
    return common_pb2.Status.FromString(to_status(error).SerializeToString())


def turn_events(
    turn_id: TurnId, mode: OutputMode, sampling: common_pb2.SamplingParameters, tokenizer: Tokenizer
) -> TurnEvents:
    """The events of a turn that generates: a function of these parameters and the token ids."""
    parser = TurnParser(
        tokenizer,
        mode,
        call_id_prefix=call_id_prefix(turn_id),
        stop_strings=sampling.stop_strings,
        stop_token_ids=sampling.stop_token_ids,
    )
    return TurnEvents(turn_id, parser)
