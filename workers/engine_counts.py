"""What an engine counts of its work: since the start, and smoothed over recent steps and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from seamount.workers.events import Finished
from seamount.workers.scheduler import Schedule, Sequence


class StepKind(Enum):
    """What this rank computed in a step of its gang: nothing, tokens of answers, parts of prompts, or both."""

    IDLE = "idle"
    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"

    @staticmethod
    def of(schedule: Schedule) -> StepKind:
        if schedule.decode:
            return StepKind.MIXED if schedule.prefill else StepKind.DECODE
        return StepKind.PREFILL if schedule.prefill else StepKind.IDLE


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCounts:
    """Since the start: sequences that gave their pages back, requests that ended in an error."""

    num_preemptions: int
    num_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Counters since the start, and what is there now.

    num_computed_tokens: prompt tokens, recomputation included; num_background_tokens: not among those;
    num_running, num_waiting, queued_prefill_tokens (still to compute): without background requests; num_blocked:
    requests that found no place or no pages in the last step; prefill_tokens_per_s: over recent steps that only
    computed prompts; answer_s: smoothed, from the first step of an answer to its end; both 0 before the first;
    is_resting: no rank of the gang has work.
    """

    num_steps: int
    num_computed_tokens: int
    num_sampled_tokens: int
    num_background_tokens: int
    num_running: int
    num_waiting: int
    num_blocked: int
    queued_prefill_tokens: int
    prefill_tokens_per_s: float
    answer_s: float
    is_resting: bool


@dataclass(slots=True, kw_only=True)
class EngineCounts:
    """Written by the engine's thread alone; other threads may read it, fields a step apart from each other.

    num_computed_tokens: prompt tokens, recomputation included; num_background_tokens: not among those; num_blocked:
    requests that found no place or no pages in the last step; answer_s: smoothed, from the first step of an answer to
    its end, 0 before the first. prefill_chunk_tokens: the engine's limit.
    """

    prefill_chunk_tokens: int
    num_steps: int = 0
    num_computed_tokens: int = 0
    num_sampled_tokens: int = 0
    num_background_tokens: int = 0
    num_blocked: int = 0
    num_failed: int = 0
    answer_s: float = 0.0
    _recent_prefill_tokens: float = field(default=0.0, init=False)
    _recent_prefill_s: float = field(default=0.0, init=False)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Over recent steps that only computed prompts; 0 before the first."""
        return self._recent_prefill_tokens / (self._recent_prefill_s or 1.0)

    def step(self, schedule: Schedule, took_s: float) -> None:
        self.num_steps += 1
        if schedule.prefill and not schedule.decode:
            num_tokens = schedule.num_prefill_tokens
            keep = 0.5 ** (num_tokens / (8 * self.prefill_chunk_tokens))  # half forgotten after 8 chunks
            self._recent_prefill_tokens = keep * self._recent_prefill_tokens + num_tokens
            self._recent_prefill_s = keep * self._recent_prefill_s + took_s

    def computed(self, num_tokens: int, *, is_background: bool) -> None:
        if is_background:
            self.num_background_tokens += num_tokens
        else:
            self.num_computed_tokens += num_tokens

    def finished(self, sequence: Sequence, event: Finished) -> None:
        if sequence.samples and sequence.num_sampled:
            took_s = event.prefill_s + event.decode_s
            self.answer_s = 0.8 * self.answer_s + 0.2 * took_s if self.answer_s else took_s
