"""What is asked of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from seamount.wire.errors import InvalidArgument
from seamount.wire.limits import (
    MAX_LOGPROBS,
    MAX_OUTPUT_TOKENS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    check_length,
    check_range,
)
from seamount.workers.cache.reservation import Reservation
from seamount.workers.events import EngineEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; nothing is left open.

    temperature: 0 = greedy, ties to the lowest id; top_p: 1 = off; top_k: 0 = off; seed: with the output index it
    determines each draw, whatever the worker or the batch; max_output_tokens: at least 1, counted from
    ``first_output_index``; num_logprobs: -1 = none, 0 = the sampled token's only; first_output_index: output index of
    the next token to sample. Raises InvalidArgument for a value outside the limits of ``seamount.wire.limits``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_output_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int = -1
    first_output_index: int = 0

    def __post_init__(self) -> None:
        check_range(self.temperature, field="temperature", low=0, high=MAX_TEMPERATURE)
        check_range(self.top_p, field="top_p", low=0, high=1, low_open=True)
        check_range(self.top_k, field="top_k", low=0, high=MAX_TOP_K)
        if not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"seed is {self.seed}; it must be at least 0 and below 2^64", field="seed")
        check_range(self.max_output_tokens, field="max_output_tokens", low=1, high=MAX_OUTPUT_TOKENS)
        check_length(self.stop_token_ids, field="stop_token_ids", high=MAX_STOP_TOKEN_IDS, unit="ids")
        check_range(self.num_logprobs, field="num_logprobs", low=-1, high=MAX_LOGPROBS)
        check_range(self.first_output_index, field="first_output_index", low=0, high=(1 << 32) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """Compute what a reservation lacks, then sample, or stop at a position.

    id: the reservation's. sampling: None for prefill only: compute up to the position ``prefill_until`` (exclusive;
    None = all tokens) and finish. forced_token_ids: taken instead of sampled ones, one after the other; sampling goes
    on after the last. sink: called on the engine's thread; must return at once and not raise.
    alone: a rank died while it computed this request; it gets steps of its own until it has sampled a few tokens. If
    that happens again, it is known to be at fault, and takes no other with it.
    is_background: prefill alone, while no rank of the gang has anything else to do; other work ends it with
    ``cancelled``.
    on_layer: called on the engine's thread in mid-step with (layer, first position, end position) once that layer's
    cache entries of these positions are written; same duties.
    """

    id: str
    reservation: Reservation
    sampling: SamplingParams | None
    sink: Callable[[EngineEvent], None]
    prefill_until: int | None = None
    forced_token_ids: tuple[int, ...] = ()
    alone: bool = False
    is_background: bool = False
    on_layer: Callable[[int, int, int], None] | None = None

    def check(self, *, vocab_limit: int, max_context_tokens: int) -> None:
        """Raises InvalidArgument: an id that is not to be computed (``token_ids``, ``forced_token_ids``),
        ``prefill_until`` outside the tokens or beside sampling, a prompt that fills the context (CONTEXT_TOO_LONG)."""
        tokens, until = self.reservation.token_ids, self.prefill_until
        if until is not None and (self.sampling is not None or not 0 < until <= len(tokens)):
            raise InvalidArgument(
                f"prefill_until is {until}; it must be at least 1 and at most the {len(tokens)} tokens, and only "
                "requests that do not sample may have it",
                field="prefill_until",
            )
        if self.sampling is not None and len(tokens) >= max_context_tokens:
            raise InvalidArgument(
                f"the prompt has {len(tokens)} tokens; the context ends at {max_context_tokens}: shorten it",
                field="token_ids",
                reason="CONTEXT_TOO_LONG",
                metadata={"num_tokens": str(len(tokens)), "max_context_tokens": str(max_context_tokens)},
            )
        missing = tokens[self.reservation.computed_len :]  # what is cached was checked when it was computed
        for field, ids in (("token_ids", missing), ("forced_token_ids", self.forced_token_ids)):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_limit):
                raise InvalidArgument(
                    f"{field} holds an id outside the vocabulary; each must be at least 0 and below {vocab_limit}",
                    field=field,
                    metadata={"vocab_limit": str(vocab_limit)},
                )
