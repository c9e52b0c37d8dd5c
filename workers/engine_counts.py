"""What an engine counts of its work: since the start, and smoothed over recent steps and answers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from statistics import median_high

from seamount.workers.events import Finished
from seamount.workers.schedule import Schedule
from seamount.workers.sequence import Sequence

RECENT_PIECES = 9
"""An odd number: so many of a rank's last pieces of prompts say how fast it is."""


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
    requests that found no place or no pages in the last step; prefill_tokens_per_s: as of ``PieceRate``, of
    steps that only computed prompts; answer_s: smoothed, from the first step of an answer to its end, 0 before it;
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


class PieceRate:
    """Tokens a second of recent pieces: the median of the last ``RECENT_PIECES``, the greater of the middle two.

    A piece that took far too long (something was compiled, the machine stood still) does not move it, not even as one
    of the first two; a rank that is slower from now on shows it after ``RECENT_PIECES // 2 + 1`` pieces. A single piece
    says nothing yet. Written by one thread; ``per_s`` may be read from any.
    """

    def __init__(self) -> None:
        self.per_s = 0.0
        """0 before the second piece."""
        self._recent: deque[float] = deque(maxlen=RECENT_PIECES)

    def note(self, num_tokens: int, took_s: float) -> None:
        self._recent.append(num_tokens / max(took_s, 1e-9))
        if len(self._recent) > 1:
            self.per_s = median_high(self._recent)


@dataclass(slots=True, kw_only=True)
class EngineCounts:
    """Written by the engine's thread alone; other threads may read it, fields a step apart from each other.

    num_computed_tokens: prompt tokens, recomputation included; num_background_tokens: not among those; num_blocked:
    requests that found no place or no pages in the last step; answer_s: smoothed, from the first step of an answer to
    its end, 0 before the first. pieces: steps that only computed prompts.
    """

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_sampled_tokens: int = 0
    num_background_tokens: int = 0
    num_blocked: int = 0
    num_failed: int = 0
    answer_s: float = 0.0
    pieces: PieceRate = field(default_factory=PieceRate, init=False)

    def step(self, schedule: Schedule, took_s: float) -> None:
        self.num_steps += 1
        if schedule.prefill and not schedule.decode:
            self.pieces.note(schedule.num_prefill_tokens, took_s)

    def computed(self, num_tokens: int, *, is_background: bool) -> None:
        if is_background:
            self.num_background_tokens += num_tokens
        else:
            self.num_computed_tokens += num_tokens

    def finished(self, sequence: Sequence, event: Finished) -> None:
        if sequence.samples and sequence.num_sampled:
            took_s = event.prefill_s + event.decode_s
            self.answer_s = 0.8 * self.answer_s + 0.2 * took_s if self.answer_s else took_s
