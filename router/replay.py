"""A committed turn told again: the same events as the first time, from the stored ids alone."""

from __future__ import annotations

from seamount.router.events import TurnEvents, call_id_prefix
from seamount.router.messages import ThinkingMode, thinking_mode_from_proto
from seamount.router.parsing import OutputMode, TurnParser
from seamount.router.session_view import ReplayedTurn
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, events_pb2, record_pb2
from seamount.wire.ids import TurnId


def turn_events(
    turn_id: TurnId, mode: ThinkingMode, sampling: common_pb2.SamplingParameters, tokenizer: Tokenizer | None
) -> TurnEvents:
    """The events of a session's turn: a function of these parameters and the token ids. tokenizer: None where the turn
    only records."""
    if tokenizer is None:
        return TurnEvents(turn_id, None)
    parser = TurnParser(
        tokenizer,
        OutputMode.of(mode),
        call_id_prefix=call_id_prefix(turn_id),
        stop_strings=sampling.stop_strings,
        stop_token_ids=sampling.stop_token_ids,
    )
    return TurnEvents(turn_id, parser)


def replayed_events(
    replayed: ReplayedTurn, record: record_pb2.TurnRecord, tokenizer: Tokenizer
) -> list[events_pb2.TurnEvent]:
    """All events of the turn of ``record``. Pure: any thread."""
    session, output = replayed.view.session, record.output
    generated = record.HasField("output")
    mode = thinking_mode_from_proto(session.thinking_mode)
    events = turn_events(replayed.turn_id, mode, record.sampling, tokenizer if generated else None)
    told = [
        events.started(
            session_id=session.id, model=session.model, num_prompt_tokens=record.num_prompt_tokens, seed=record.seed
        )
    ]
    finished = record.final_event.finished
    usage = events_pb2.Usage(num_prompt_tokens=record.num_prompt_tokens)
    if generated:
        no_logprobs = [common_pb2.TokenLogprobs()] * len(output.cut_token_ids)
        logprobs = [*output.logprobs, *no_logprobs] if output.logprobs else []
        told += events.tokens([*output.token_ids, *output.cut_token_ids], logprobs)
        told += events.output_ended(finished.reason)[0]
        usage.num_cached_tokens = record.receipt.num_cached_tokens
        usage.num_output_tokens = len(output.token_ids)
        usage.num_reasoning_tokens = output.num_reasoning_tokens
    return told + events.finished(finished.reason, usage, finished.receipt if generated else None)
