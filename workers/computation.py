"""A step's computation: pages held, the model run over the chunks, tokens sampled, the caches brought up to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from seamount.wire import failpoints
from seamount.wire.errors import Internal, SeamountError
from seamount.workers.cache.reservations import Reservations
from seamount.workers.engine_counts import EngineCounts
from seamount.workers.events import EngineEvent, Failed, FinishReason, Progress, Tokens
from seamount.workers.runner import Runner
from seamount.workers.sampling import Draw, Sampled, sample
from seamount.workers.schedule import Chunk
from seamount.workers.sequence import Sequence

_LOG = logging.getLogger(__name__)

Outcome = tuple[Sequence, EngineEvent]


class Computation:
    """Of one engine, on its thread.

    is_alone: whether no gang waits in a collective; eos_token_id, vocab_limit: as of ``Engine``; max_context_tokens:
    an answer ends there.
    """

    def __init__(
        self,
        runner: Runner,
        reservations: Reservations,
        counts: EngineCounts,
        *,
        is_alone: bool,
        eos_token_id: int,
        vocab_limit: int,
        max_context_tokens: int,
    ) -> None:
        self._runner, self._reservations, self._counts = runner, reservations, counts
        self._is_alone = is_alone
        self._eos_token_id, self._vocab_limit = eos_token_id, vocab_limit
        self._max_context_tokens = max_context_tokens

    def run(self, chunks: tuple[Chunk, ...]) -> list[Outcome]:
        """Run the model over the chunks, sample, and record what is in the cache now.

        A failure fails the chunks' requests. Only one in mid-forward of a gang leaves this function.
        """
        outcomes: list[Outcome] = []
        with self._pages_in_use(chunks, outcomes) as held:
            try:
                batch, failure = self._runner.lay_out(held), None
            except Exception as cause:  # no collective has begun: join the gang's with zero tokens
                _LOG.exception("layout_failed")
                batch, failure = self._runner.lay_out(()), cause
            try:
                logits, hook_errors = self._runner.forward(batch, () if failure else held)
            except Exception as cause:
                if not self._is_alone:  # the others wait in a collective that this rank will never join
                    raise
                _LOG.exception("forward_failed")
                failure = failure or cause
            if failure is None:
                try:
                    draws = [_draw(chunk) for chunk in held if chunk.samples]
                    tokens = iter(sample(logits, draws, vocab_limit=self._vocab_limit))
                except Exception as cause:
                    _LOG.exception("sampling_failed")
                    failure = cause
            if failure is not None:
                outcomes.extend((chunk.sequence, Failed(error=step_failed(failure))) for chunk in held)
                return outcomes
            for chunk in held:
                token = next(tokens) if chunk.samples else None
                outcomes.extend(self._commit(chunk, token, hook_errors.get(chunk.sequence.request.id)))
        return outcomes

    @contextmanager
    def _pages_in_use(self, chunks: tuple[Chunk, ...], outcomes: list[Outcome]) -> Iterator[list[Chunk]]:
        """The chunks whose reservations still hold: none of their pages goes to another before this is over."""
        held: list[Chunk] = []
        now = time.monotonic()
        try:
            for chunk in chunks:
                try:
                    self._reservations.uses.begin(chunk.sequence.request.id)
                except SeamountError as error:  # ended since it was scheduled
                    outcomes.append((chunk.sequence, Failed(error=error)))
                    continue
                held.append(chunk)
                if chunk.sequence.started_at is None:
                    chunk.sequence.started_at = now
            yield held
        finally:
            for chunk in held:
                self._reservations.uses.end(chunk.sequence.request.id)

    def _commit(self, chunk: Chunk, token: Sampled | None, hook_error: Exception | None) -> Iterable[Outcome]:
        """The chunk's entries are present, and its sequence may be one token longer."""
        sequence = chunk.sequence
        request = sequence.request
        try:
            if hook_error is not None:
                raise step_failed(hook_error)
            self._reservations.advance(request.id, chunk.end)
            num_computed = sequence.note_computed(chunk.first, chunk.end)
            self._counts.computed(num_computed, is_background=request.is_background)
            if not chunk.samples:
                yield sequence, Progress(num_computed=sequence.num_computed, in_batch=True)
                if sequence.num_missing == 0:
                    yield sequence, sequence.finished("prefilled", time.monotonic())
                return
            if token is None:
                raise Internal("the model's logits are not finite", reason="LOGITS_NOT_FINITE")
            self._reservations.append_token(request.id, token.token_id)
        except SeamountError as error:
            yield sequence, Failed(error=error)
            return
        now = time.monotonic()
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        failpoints.reached("rank.token", sequence.output_index)
        logprobs = () if token.logprobs is None else (token.logprobs,)
        yield sequence, Tokens(first_index=sequence.output_index, token_ids=(token.token_id,), logprobs=logprobs)
        sequence.num_sampled += 1
        self._counts.num_sampled_tokens += 1
        reason = self._finish_reason(sequence, token.token_id)
        if reason is not None:
            yield sequence, sequence.finished(reason, now)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        assert sampling is not None, "only sequences that sample come here"
        if token_id == self._eos_token_id:
            return "stop"
        if token_id in sampling.stop_token_ids:
            return "stop_sequence"
        num_tokens = len(sequence.request.reservation.token_ids)
        if sequence.num_sampled >= sampling.max_output_tokens or num_tokens >= self._max_context_tokens:
            return "length"
        return None


def _draw(chunk: Chunk) -> Draw:
    sequence = chunk.sequence
    sampling, forced = sequence.request.sampling, sequence.request.forced_token_ids
    assert sampling is not None, "only sequences that sample come here"
    forced_id = forced[sequence.num_sampled] if sequence.num_sampled < len(forced) else None
    return Draw(params=sampling, output_index=sequence.output_index, forced_token_id=forced_id)


def step_failed(cause: Exception) -> SeamountError:
    """What requests fail with where a step did."""
    if isinstance(cause, SeamountError):
        return cause
    return Internal(f"the step failed with {type(cause).__name__}; see the rank's log", reason="STEP_FAILED")
