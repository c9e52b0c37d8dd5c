"""One turn, from its first event to its commit. Admission (``turns.py``) comes before, placement faults below
(``generation.py``)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from seamount.router.events import TurnEvents
from seamount.router.generation import Generation, deadline_passed
from seamount.router.history import pending_after, sampled_message
from seamount.router.messages import ThinkingMode, TurnPlan, tool_calls_to_proto
from seamount.router.parsing import ParsedOutput
from seamount.router.rendering import Rendering
from seamount.router.sessions import BegunTurn, Sessions
from seamount.router.tokenizer import Tokenizer
from seamount.router.turn_stream import TurnStream
from seamount.v1 import common_pb2, events_pb2, record_pb2, worker_pb2
from seamount.wire.errors import Aborted, Cancelled, Internal, SeamountError, Unavailable, to_status

_LOG = logging.getLogger(__name__)
COMMIT_BUDGET_S = 30.0
"""How long a computed turn tries to be committed: Redis may be restarting."""
FAIL_BUDGET_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnParts:
    """What every turn of a router shares."""

    sessions: Sessions
    rendering: Rendering
    tokenizer: Tokenizer


@dataclass(slots=True, kw_only=True)
class Turn:
    """One turn in the making; owned by its task. ``generation``: None where it only records; ``deadline``: by
    ``time.monotonic()``; ``is_ending``: its outcome is being stored, to cancel it is too late."""

    begun: BegunTurn
    input: Sequence[common_pb2.Message]
    plan: TurnPlan
    mode: ThinkingMode
    model: str
    sampling: common_pb2.SamplingParameters
    num_prompt_tokens: int
    generation: Generation | None
    events: TurnEvents
    deadline: float
    stream: TurnStream = field(default_factory=TurnStream)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    cancelled_by_client: bool = False
    is_ending: bool = False
    told_when_committed: Sequence[events_pb2.TurnEvent] = ()


async def run_turn(turn: Turn, parts: TurnParts) -> None:
    """Generate, commit, tell; whatever happens, the stream ends and the pages are given back. Never raises."""
    keep_len: int | None = None
    try:
        async with asyncio.timeout(turn.deadline - time.monotonic()):
            turn.stream.append([_started(turn)])
            output = await generate(turn) if turn.generation is not None else None
            turn.is_ending = True
            record = finished_turn(turn, output, parts)
            await commit(turn, record, parts)
            turn.stream.append(turn.told_when_committed)
            keep_len = turn.num_prompt_tokens + len(record.output.token_ids)
    except (SeamountError, TimeoutError, asyncio.CancelledError) as error:
        await end_without_commit(turn, _reason(turn, error), parts)
    except Exception:
        _LOG.exception("turn_failed", extra={"turn_id": turn.begun.turn_id})
        await end_without_commit(turn, Internal("a defect of the server; its log says more", reason="INTERNAL"), parts)
    finally:
        turn.stream.close()
        if turn.generation is not None:
            await turn.generation.release(keep_len)


async def generate(turn: Turn) -> ParsedOutput:
    """Tokens to events, until the model, the parser or the limit ends the output."""
    assert turn.generation is not None
    reason = common_pb2.FINISH_REASON_LENGTH
    async with aclosing(turn.generation.batches()) as batches:
        async for batch in batches:
            if isinstance(batch, worker_pb2.GenerateFinished):
                reason = batch.reason
                break
            turn.logprobs.extend(batch.logprobs)
            turn.stream.append(turn.events.tokens(batch.token_ids, batch.logprobs))
            if turn.events.output_is_over:
                break
    events, output = turn.events.output_ended(reason)
    turn.stream.append(events)
    return output


def finished_turn(turn: Turn, output: ParsedOutput | None, parts: TurnParts) -> record_pb2.TurnRecord:
    """What is stored of the turn, with its last events: not to be told before it is stored."""
    generation, begun = turn.generation, turn.begun
    record = record_pb2.TurnRecord(
        turn_id=begun.turn_id,
        input=turn.input,
        fingerprint=parts.rendering.history.fingerprint,
        sampling=turn.sampling,
        seed=turn.sampling.seed,
        num_prompt_tokens=turn.num_prompt_tokens,
        pending_tool_calls=tool_calls_to_proto(pending_after(turn.plan, output)),
    )
    usage = events_pb2.Usage(num_prompt_tokens=turn.num_prompt_tokens)
    reason = common_pb2.FINISH_REASON_RECORDED
    if output is not None and generation is not None:
        fed = generation.token_ids
        record.output.CopyFrom(sampled_message(fed, output, parts.tokenizer, turn.logprobs))
        record.output.cut_token_ids.extend(fed[output.num_tokens :])
        record.receipt.CopyFrom(
            generation.account.receipt(num_prompt=turn.num_prompt_tokens, num_output=output.num_tokens)
        )
        usage = generation.account.usage(output, num_prompt=turn.num_prompt_tokens)
        reason = output.reason
    turn.told_when_committed = turn.events.finished(reason, usage, record.receipt if output is not None else None)
    record.final_event.CopyFrom(turn.told_when_committed[-1])
    return record


async def commit(turn: Turn, record: record_pb2.TurnRecord, parts: TurnParts) -> None:
    """One durable, atomic step; refused if another epoch holds the session."""
    generation = turn.generation
    await parts.sessions.commit_turn(
        turn.begun,
        record,
        rank=(generation.decode_rank if generation is not None else None) or turn.begun.view.last_rank,
        num_context_tokens=await parts.rendering.num_context_tokens((*turn.begun.records, record), turn.mode),
        budget_s=COMMIT_BUDGET_S,
    )


async def end_without_commit(turn: Turn, error: SeamountError, parts: TurnParts) -> None:
    """Give the session back with its head as it was, then tell the clients; what they hear is what is stored."""
    turn.is_ending = True
    turn.events.untold(turn.told_when_committed)
    last_events = _without_commit(turn, error)
    begun = turn.begun
    try:
        await parts.sessions.fail_turn(begun.tenant, begun.session_id, begun, last_events[-1], budget_s=FAIL_BUDGET_S)
    except SeamountError as failure:  # superseded, deleted, or Redis is away: the turn's deadline frees the session
        _LOG.warning("turn_end_not_stored", extra={"turn_id": begun.turn_id, "reason": failure.reason})
        if isinstance(failure, Aborted) and failure.reason == "TURN_COMMITTED":
            last_events = turn.told_when_committed  # the commit came through, only its answer did not
        elif isinstance(failure, Unavailable) and turn.told_when_committed:
            turn.events.untold(last_events)
            last_events = _without_commit(turn, _outcome_unknown(failure))
    turn.stream.append(last_events)


def _without_commit(turn: Turn, error: SeamountError) -> Sequence[events_pb2.TurnEvent]:
    if isinstance(error, Cancelled):
        usage = events_pb2.Usage(num_prompt_tokens=turn.num_prompt_tokens)
        return turn.events.finished(common_pb2.FINISH_REASON_CANCELLED, usage)
    return [turn.events.failed(common_pb2.Status.FromString(to_status(error).SerializeToString()))]


def _outcome_unknown(failure: Unavailable) -> Unavailable:
    return Unavailable(
        "the session store does not say whether the turn was stored; retry with the same key",
        reason="OUTCOME_UNKNOWN",
        retry_after_s=failure.retry_after_s,
    )


def _started(turn: Turn) -> events_pb2.TurnEvent:
    return turn.events.started(
        session_id=turn.begun.session_id,
        model=turn.model,
        num_prompt_tokens=turn.num_prompt_tokens,
        seed=turn.sampling.seed,
    )


def _reason(turn: Turn, error: BaseException) -> SeamountError:
    match error:
        case SeamountError():
            return error
        case TimeoutError():
            return deadline_passed()
        case _ if turn.cancelled_by_client:
            return Cancelled("the turn was cancelled", reason="TURN_CANCELLED")
        case _:
            return Unavailable("this router is leaving; retry", reason="ROUTER_LEAVING", retry_after_s=0.5)
