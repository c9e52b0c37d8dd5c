"""One turn, from its first event to its commit. Admission (``admission.py``) comes before, placement faults below
(``generation.py``). What is told is logged before: another router can go on from any point (``take_over.py``)."""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from seamount.router.begun_turn import BegunTurn
from seamount.router.claim import deadline_passed
from seamount.router.context_policy import NOTHING, Discards
from seamount.router.events import TurnEvents, status_of
from seamount.router.generation import Generation
from seamount.router.history import common_len, pending_after, sampled_message
from seamount.router.messages import ThinkingMode, TurnPlan, tool_calls_to_proto
from seamount.router.metrics import RouterMetrics, TokenTimes
from seamount.router.rendering import Rendering
from seamount.router.retention import Retention
from seamount.router.sessions import Sessions
from seamount.router.token_log import TurnLog
from seamount.router.tokenizer import Tokenizer
from seamount.router.turn_stream import TurnStream, router_leaving
from seamount.v1 import common_pb2, events_pb2, record_pb2, worker_pb2
from seamount.wire import failpoints
from seamount.wire.errors import Aborted, Cancelled, NotFound, SeamountError, Unavailable, defect

_LOG = logging.getLogger(__name__)
COMMIT_BUDGET_S = 30.0
"""How long a computed turn tries to be committed: Redis may be restarting."""
FAIL_BUDGET_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnParts:
    """What every turn of a router shares."""

    sessions: Sessions
    retention: Retention
    rendering: Rendering
    tokenizer: Tokenizer
    metrics: RouterMetrics


@dataclass(slots=True, kw_only=True)
class Turn:
    """One turn in the making; owned by its task. ``discards``: what its prompt leaves out; ``generation``: None where
    it only records; ``deadline``: by ``time.monotonic()``; ``is_ending``: its outcome is being stored, to cancel it is
    too late; ``reuse_len``: of its tokens, what the next prompt can begin with. A turn that was taken over has its
    logged tokens in ``generation``, ``events`` and ``stream`` already, and no ``arrived``: when its request came, by
    ``time.monotonic()``."""

    begun: BegunTurn
    input: Sequence[common_pb2.Message]
    plan: TurnPlan
    mode: ThinkingMode
    model: str
    sampling: common_pb2.SamplingParameters
    num_prompt_tokens: int
    discards: Discards
    generation: Generation | None
    events: TurnEvents
    deadline: float
    log: TurnLog
    stream: TurnStream
    arrived: float | None = None
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    reuse_len: int | None = None
    cancelled_by_client: bool = False
    is_ending: bool = False
    told_when_committed: Sequence[events_pb2.TurnEvent] = ()
    committed: record_pb2.TurnRecord | None = None
    failure: SeamountError | None = None


async def run_turn(turn: Turn, parts: TurnParts) -> bool:
    """Generate, commit, tell; whatever happens, the pages are given back. Never raises.

    Returns whether the turn is over, its stream closed; False where it is another router's now.
    """
    keep_len: int | None = None
    try:
        async with asyncio.timeout(turn.deadline - time.monotonic()):
            if not turn.stream.last_sequence:
                turn.log.add_prompt(turn.num_prompt_tokens, [_started(turn)])
            ended_by = await generate(turn, parts.metrics) if turn.generation is not None else None
            await turn.log.is_logged()
            turn.is_ending = True
            record = finished_turn(turn, ended_by, parts)
            await commit(turn, record, parts)
            keep_len = turn.num_prompt_tokens + len(record.output.token_ids)
            turn.committed = record
        turn.stream.append(turn.told_when_committed)
        turn.stream.close()
        return True
    except (SeamountError, TimeoutError, asyncio.CancelledError) as error:
        if turn.log.error is not None:
            return await end_without_commit(turn, turn.log.error, parts)
        if isinstance(error, asyncio.CancelledError) and not turn.cancelled_by_client:
            return await hand_over(turn, parts)
        return await end_without_commit(turn, _reason(error), parts)
    except Exception:
        _LOG.exception("turn_failed", extra={"turn_id": turn.begun.turn_id})
        return await end_without_commit(turn, defect(), parts)
    finally:
        turn.log.drop()
        if turn.generation is not None:
            await turn.generation.release(keep_len, reuse_len=turn.reuse_len)


async def generate(turn: Turn, metrics: RouterMetrics) -> common_pb2.FinishReason:
    """Tokens to the log and to events, until the model, the parser or the limit ends the output. Returns why, which
    counts where the parser did not end it."""
    generation = turn.generation
    assert generation is not None
    if turn.events.output_is_over or generation.is_full:  # the router before this one did not come to commit it
        await generation.claim.adopt()
        return common_pb2.FINISH_REASON_LENGTH
    times = TokenTimes(metrics=metrics, account=generation.account, arrived=turn.arrived)
    async with aclosing(generation.batches()) as batches:
        async for batch in batches:
            if isinstance(batch, worker_pb2.GenerateFinished):
                return batch.reason
            times.tokens(len(batch.token_ids))
            turn.logprobs.extend(batch.logprobs)
            events = turn.events.tokens(batch.token_ids, batch.logprobs)
            turn.log.add(batch.token_ids, batch.logprobs, events, decode_rank=generation.decode_rank)
            if turn.events.output_is_over:
                break
            await turn.log.has_room()
    return common_pb2.FINISH_REASON_LENGTH


def finished_turn(turn: Turn, ended_by: common_pb2.FinishReason | None, parts: TurnParts) -> record_pb2.TurnRecord:
    """What is stored of the turn, with its last events: not to be told before it is stored. ended_by: None where it
    only records."""
    generation, begun = turn.generation, turn.begun
    withheld, output = turn.events.output_ended(ended_by) if ended_by is not None else ((), None)
    record = record_pb2.TurnRecord(
        turn_id=begun.turn_id,
        input=turn.input,
        fingerprint=parts.rendering.history.fingerprint,
        sampling=turn.sampling,
        seed=turn.sampling.seed,
        num_prompt_tokens=turn.num_prompt_tokens,
        pending_tool_calls=tool_calls_to_proto(pending_after(turn.plan, output)),
    )
    if turn.discards != NOTHING:
        record.discards.CopyFrom(turn.discards.to_proto())
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
    last_events = turn.events.finished(reason, usage, record.receipt if output is not None else None)
    turn.told_when_committed = [*withheld, *last_events]
    record.final_event.CopyFrom(turn.told_when_committed[-1])
    return record


async def commit(turn: Turn, record: record_pb2.TurnRecord, parts: TurnParts) -> None:
    """One durable, atomic step; refused if another epoch holds the session."""
    begun, rank = turn.begun, turn.generation.decode_rank if turn.generation is not None else None
    calls = [call.name for call in record.pending_tool_calls]
    lease = None
    if rank is not None and calls:
        lease = await parts.retention.while_tools_run(begun.tenant, begun.session_id, begun.epoch, rank, calls)
    failpoints.reached("router.commit", len(record.output.token_ids))
    context = await parts.rendering.context((*begun.records, record), turn.mode)
    if turn.generation is not None:
        turn.reuse_len = common_len(context, array("I", [*turn.generation.prompt, *record.output.token_ids]))
    await parts.sessions.commit_turn(
        begun,
        record,
        rank=rank or begun.view.last_rank,
        num_context_tokens=len(context),
        lease=lease,
        budget_s=COMMIT_BUDGET_S,
    )
    failpoints.reached("router.committed", len(record.output.token_ids))
    if turn.generation is not None and begun.records:
        parts.retention.note_wait(begun.tenant, begun.records[-1], turn.generation.account.started)


async def end_without_commit(turn: Turn, error: SeamountError, parts: TurnParts) -> bool:
    """Give the session back with its head as it was, then tell the clients: what they hear is what is stored.

    Returns as ``run_turn`` does."""
    turn.is_ending, turn.failure = True, error
    failure: SeamountError | None = None
    try:
        turn.stream.append(await _stored_end(turn, error, parts))
    except Aborted as refusal:
        if refusal.reason != "TURN_COMMITTED":
            return False
        turn.failure = None
        turn.stream.append(turn.told_when_committed)  # the commit came through, only its answer did not
    except NotFound:  # deleted, and what was told of it with it
        turn.stream.append(_last_events(turn, error))
    except Unavailable as unstored:  # whoever finds the turn without a router when Redis is back goes on with it
        _LOG.warning("turn_end_not_stored", extra={"turn_id": turn.begun.turn_id, "reason": unstored.reason})
        failure = _outcome_unknown(unstored)
    turn.stream.close(failure)
    return True


async def _stored_end(turn: Turn, error: SeamountError, parts: TurnParts) -> Sequence[events_pb2.TurnEvent]:
    """Store how the turn ended; returns its last events. Raises ``Aborted`` where it is not this router's to end."""
    begun = turn.begun
    while True:
        log_end, last_events = turn.log.end, _last_events(turn, error)
        try:
            stored = await parts.sessions.fail_turn(
                begun.tenant, begun.session_id, begun, last_events[-1], log_end=log_end, budget_s=FAIL_BUDGET_S
            )
        except Aborted as refusal:
            end = refusal.metadata.get("log_end")  # tokens came through after all: their events are told first
            if end is not None and (turn.log.end != log_end or turn.log.note_end(end)):
                continue
            raise
        if stored != last_events[-1]:
            raise Aborted("another router ended the turn before", reason="ENDED_ELSEWHERE")
        return last_events


async def hand_over(turn: Turn, parts: TurnParts) -> bool:
    """This router leaves: whoever looks first takes the turn over. Returns as ``run_turn`` does."""
    turn.is_ending = True
    with suppress(SeamountError):  # else it is found once this router is seen to have left
        await parts.sessions.release_turn(turn.begun, budget_s=FAIL_BUDGET_S)
    turn.stream.close(router_leaving())
    return True


def _last_events(turn: Turn, error: SeamountError) -> Sequence[events_pb2.TurnEvent]:
    turn.events.told_until(turn.stream.last_sequence)
    if isinstance(error, Cancelled):
        return turn.events.cancelled(turn.num_prompt_tokens if turn.stream.last_sequence else 0)
    return [turn.events.failed(status_of(error))]


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


def _reason(error: BaseException) -> SeamountError:
    match error:
        case SeamountError():
            return error
        case TimeoutError():
            return deadline_passed()
        case _:
            return Cancelled("the turn was cancelled", reason="TURN_CANCELLED")
