"""A request on its way through the engine: what is computed of it, and what comes next."""

from __future__ import annotations

from dataclasses import dataclass

from seamount.workers.events import Finished, FinishReason
from seamount.workers.requests import EngineRequest

PROBATION_TOKENS = 2
"""What a request in steps of its own samples before it joins the others: the token at which its last rank died, and one
more."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request on its way through the engine; changed by the engine's thread only.

    arrival: its place in the order of submission. num_computed: prompt tokens computed here, recomputation included;
    reached_len: the furthest position computed so far; times are seconds of the engine's clock.
    """

    request: EngineRequest
    arrival: int
    submitted_at: float
    is_preempted: bool = False
    num_sampled: int = 0
    num_computed: int = 0
    num_preemptions: int = 0
    reached_len: int = 0
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def samples(self) -> bool:
        return self.request.sampling is not None

    @property
    def target_len(self) -> int:
        """The position up to which entries are wanted now."""
        num_tokens = len(self.request.reservation.token_ids)
        until = self.request.prefill_until
        return num_tokens if self.samples or until is None else min(until, num_tokens)

    @property
    def first_missing(self) -> int:
        """A sequence that samples computes its last token always, for its logits."""
        computed_len = self.request.reservation.present_len
        return min(computed_len, self.target_len - 1) if self.samples else computed_len

    @property
    def num_missing(self) -> int:
        return max(0, self.target_len - self.first_missing)

    @property
    def is_on_probation(self) -> bool:
        return self.request.alone and self.num_sampled < PROBATION_TOKENS

    @property
    def decodes(self) -> bool:
        """Whether its next step computes one token and samples the one after it."""
        return self.samples and self.num_missing == 1

    @property
    def output_index(self) -> int:
        """Of the token to sample next."""
        assert self.request.sampling is not None, "only sequences that sample have outputs"
        return self.request.sampling.first_output_index + self.num_sampled

    def note_computed(self, first: int, end: int) -> int:
        """Positions [first, end) were computed. Returns how many count: prompt, and what was computed once before."""
        known_len = max(self.request.reservation.prompt_len, self.reached_len)
        num_computed = max(0, min(end, known_len) - first)
        self.num_computed += num_computed
        self.reached_len = max(self.reached_len, end)
        return num_computed

    def finished(self, reason: FinishReason, now: float) -> Finished:
        started_at = now if self.started_at is None else self.started_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return Finished(
            reason=reason,
            num_computed=self.num_computed,
            num_preemptions=self.num_preemptions,
            queue_s=started_at - self.submitted_at,
            prefill_s=first_token_at - started_at,
            decode_s=now - first_token_at,
        )
