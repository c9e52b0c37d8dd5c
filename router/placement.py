"""Which decode rank a turn goes to, and where the missing part of its prompt is computed. Pure functions.

Estimates follow the design: local append costs ``missing / local rate`` and delays every stream of the rank; a prefill
rank costs its queue, the pull of the cached prefix, the computation and the push. Rates are the ranks' own, measured
and smoothed; where one is not measured yet, a long prompt (over ``local_append_max_tokens``) goes to a prefill rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from seamount.wire.ids import RankId

PathPolicy = Literal["auto", "local", "remote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """What placement needs to know of one live rank. Rates are 0 where nothing was measured.

    num_cached_pages: that nobody uses and no lease holds; num_answers: answers in the making there, those that this
    router placed a moment ago included: the rank's own counts are older, and turns that start together must not all see
    the same idle rank.
    """

    rank_id: RankId
    address: str
    num_free_pages: int
    num_cached_pages: int
    num_running: int
    num_answers: int
    num_queued_prefill_tokens: int
    prefill_tokens_per_s: float
    pull_bytes_per_s: float
    push_bytes_per_s: float
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRules:
    """Deployment's choices. ``policy``: auto compares estimates; local and remote never do."""

    policy: PathPolicy = "auto"
    local_append_max_tokens: int = 512


def choose_decode_rank(
    ranks: Sequence[RankLoad], *, preferred: RankId | None, excluded: Collection[RankId] = ()
) -> RankLoad | None:
    """The rank that holds the session's caches, else the one with the least work, then the most usable pages.

    None where no rank is left. Ties go to the lowest rank id, so that every router chooses alike.
    """
    candidates = [rank for rank in ranks if rank.rank_id not in excluded]
    for rank in candidates:
        if rank.rank_id == preferred:
            return rank
    return min(candidates, key=_busyness, default=None)


def _busyness(rank: RankLoad) -> tuple[int, int, str]:
    usable_pages = rank.num_free_pages + rank.num_cached_pages
    return rank.num_answers, -usable_pages, rank.rank_id


def choose_path(
    decode: RankLoad,
    prefills: Sequence[RankLoad],
    *,
    num_cached: int,
    num_missing: int,
    rules: PathRules,
    excluded: Collection[RankId] = (),
) -> RankLoad | None:
    """The prefill rank that should compute ``num_missing`` prompt tokens, or None for the decode rank itself.

    num_missing counts the last prompt token, which the decode rank always computes: with 1 missing there is nothing
    to send away.
    """
    candidates = [rank for rank in prefills if rank.rank_id not in excluded]
    if rules.policy == "local" or num_missing <= 1 or not candidates:
        return None
    best = min(candidates, key=lambda rank: (rank.num_queued_prefill_tokens, rank.rank_id))
    if rules.policy == "remote":
        return best
    if num_missing <= rules.local_append_max_tokens:
        return None
    local_s = local_append_s(decode, num_missing)
    if local_s is None:
        return best
    measured = max(rank.prefill_tokens_per_s for rank in candidates)
    if measured <= 0:
        return best

    def cost_s(rank: RankLoad) -> tuple[float, str]:  # one that has computed nothing yet counts like its peers
        return remote_s(rank, num_cached, num_missing, tokens_per_s=rank.prefill_tokens_per_s or measured), rank.rank_id

    cheapest = min(candidates, key=cost_s)
    return cheapest if cost_s(cheapest)[0] < local_s else None


def local_append_s(decode: RankLoad, num_missing: int) -> float | None:
    """Seconds until the first token by local append, charged once to each stream that waits meanwhile."""
    if decode.prefill_tokens_per_s <= 0:
        return None
    alone_s = (decode.num_queued_prefill_tokens + num_missing) / decode.prefill_tokens_per_s
    return alone_s * (1 + decode.num_running)


def remote_s(prefill: RankLoad, num_cached: int, num_missing: int, *, tokens_per_s: float) -> float:
    """Seconds until the decode rank has the prompt by way of ``prefill``, which computes at ``tokens_per_s``."""
    compute_s = (prefill.num_queued_prefill_tokens + num_missing) / tokens_per_s
    return (
        compute_s
        + _move_s(prefill, num_cached, prefill.pull_bytes_per_s)
        + _move_s(prefill, num_missing, prefill.push_bytes_per_s)
    )


def _move_s(rank: RankLoad, num_tokens: int, bytes_per_s: float) -> float:
    """0 where the link's speed is not measured: the first transfer is what measures it."""
    return num_tokens * rank.kv_bytes_per_token / bytes_per_s if bytes_per_s > 0 else 0.0
