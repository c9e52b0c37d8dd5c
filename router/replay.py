"""A committed turn told again: the same events as the first time, from the stored ids alone."""

from __future__ import annotations

from seamount.router.events import TurnEvents, turn_events
from seamount.router.messages import thinking_mode_from_proto
from seamount.router.parsing import OutputMode
from seamount.router.session_view import ReplayedTurn
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, events_pb2, record_pb2


def replayed_events(
    replayed: ReplayedTurn, record: record_pb2.TurnRecord, tokenizer: Tokenizer
) -> list[events_pb2.TurnEvent]:
    """All events of the turn of ``record``. Pure: any thread."""
    session, output = replayed.view.session, record.output
    generated = record.HasField("output")
    mode = OutputMode.of(thinking_mode_from_proto(session.thinking_mode))
    turn_id = replayed.turn_id
    events = turn_events(turn_id, mode, record.sampling, tokenizer) if generated else TurnEvents(turn_id, None)
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
