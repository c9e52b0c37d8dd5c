"""What each turn of a simulated system cost, and the sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._report import Row, percentile


@dataclass(slots=True, kw_only=True)
class TurnAccount:
    """num_new: prompt tokens that nobody has seen, and the last sampled one of the turn before; num_forced: that the
    encoding's cut of reasoning, or a reset, moved to other positions; num_seen: all others; num_cached of them were
    found, num_restored of these in a lower tier. first_token_s: since the turn came; NaN before."""

    session: str
    tool: str
    came_at: float
    num_prompt: int
    num_new: int
    num_forced: int
    num_seen: int
    rank: str = ""
    num_cached: int = 0
    num_restored: int = 0
    num_refused: int = 0
    first_token_s: float = float("nan")
    ended_at: float = float("nan")

    @property
    def num_recomputed(self) -> int:
        return max(0, self.num_seen - self.num_cached)

    @property
    def num_computed(self) -> int:
        return self.num_prompt - self.num_cached


def summary(turns: Sequence[TurnAccount]) -> Row:
    """Of the turns that ended. amplification: tokens computed over tokens never seen, forced ones apart."""
    ended = [turn for turn in turns if turn.ended_at == turn.ended_at]
    first = [turn.first_token_s for turn in ended]
    num_new = sum(turn.num_new for turn in ended)
    num_recomputed, num_forced = sum(turn.num_recomputed for turn in ended), sum(turn.num_forced for turn in ended)
    return {
        "turns": len(ended),
        "first_ms_p50": 1e3 * percentile(first, 0.5),
        "first_ms_p99": 1e3 * percentile(first, 0.99),
        "new_tokens": num_new,
        "recomputed_tokens": num_recomputed,
        "amplification": (num_new + num_recomputed) / num_new,
        "with_forced": (num_new + num_recomputed + num_forced) / num_new,
        "hit_share": sum(turn.num_cached for turn in ended) / sum(turn.num_prompt for turn in ended),
        "restored_share": sum(turn.num_restored > 0 for turn in ended) / len(ended),
        "refused": sum(turn.num_refused for turn in ended),
    }
