"""What the engine tells a request's sink, always on the engine's thread. One ``Finished`` or ``Failed`` comes last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seamount.wire.errors import SeamountError

FinishReason = Literal["stop", "stop_sequence", "length", "cancelled", "prefilled"]
"""The model's end of sequence; a stop token id; the most output tokens or the context's end; aborted; a prefill-only
request reached its last position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities after temperature and before truncation (temperature 0 counts as 1).

    sampled: of the token itself; top: (token id, logprob) of the most likely ones, best first, ties to the lower id.
    """

    sampled: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """num_computed: prompt tokens computed here so far for this request, recomputation after preemption included;
    in_batch: whether the steps from now on compute it (True is told before the first of them)."""

    num_computed: int
    in_batch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Sampled tokens. first_index: output index of the first; logprobs: one a token where asked for, else empty."""

    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """num_computed: as in ``Progress``. queue_s: from submission to the first step; prefill_s: from there to the first
    token (or the end, if there is none); decode_s: from the first token to the last."""

    reason: FinishReason
    num_computed: int
    num_preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request is over and will get nothing more."""

    error: SeamountError


EngineEvent = Progress | Tokens | Finished | Failed
"""What a sink receives."""
