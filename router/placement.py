"""Which decode rank a turn goes to, and where the missing part of its prompt is computed. Pure functions.

Of each candidate the time to the first token is estimated, and the least is taken, where memory allows it:

    first token = queue + restore of lower tiers + move of pages from the rank that has them + missing tokens / rate

Missing tokens are appended locally, which delays every stream of the rank's gang and is charged once for each of them,
or computed by a prefill rank: its queue, the pull of the cached prefix, the computation and the push. Rates are the
ranks' own, medians or smoothed; a rank that has measured nothing yet counts like its peers. Where nobody has, the
rank that holds the session's caches is taken, and a long prompt (over ``local_append_max_tokens``) goes to a prefill
rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from seamount.wire.hashes import PAGE_SIZE
from seamount.wire.ids import RankId

PathPolicy = Literal["auto", "local", "remote"]
TenantKey = TypeVar("TenantKey")

ALIKE = 1.25
"""Estimates within this factor of the least are taken for equal, and the rank with the least work gets the turn: speeds
are measured on a machine with other things to do."""
MIN_MOVE_GAIN_S = 0.05
"""What must be gained besides, before a session leaves the rank that has its caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """What placement needs to know of one live rank. Rates are 0 where nothing was measured.

    num_cached_pages: that nobody uses and no lease holds; num_answers: answers in the making there, those that this
    router placed a moment ago included: the rank's own counts are older, and turns that start together must not all see
    the same idle rank. num_gang_answers: those of all ranks of its gang, which step together; num_blocked: answers that
    wait there for a place or for pages; answer_s: how long an answer takes from its first step to its end.
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
    num_gang_answers: int = 0
    num_blocked: int = 0
    answer_s: float = 0.0
    restore_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRules:
    """Deployment's choices. ``policy``: auto compares estimates; local and remote never do."""

    policy: PathPolicy = "auto"
    local_append_max_tokens: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What is to be placed: a prompt, and where its caches are believed to be.

    num_home: tokens of the prompt whose entries are at the rank ``home``; num_below: those of them that lie in a lower
    tier there; tenant_weight: as ``tenant_weight`` says.
    """

    num_tokens: int
    home: RankId | None = None
    num_home: int = 0
    num_below: int = 0
    tenant_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds until the first token at one rank; num_moved: tokens whose pages come from the session's home."""

    queue_s: float
    restore_s: float
    move_s: float
    compute_s: float
    num_moved: int = 0

    @property
    def first_token_s(self) -> float:
        return self.queue_s + self.restore_s + self.move_s + self.compute_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The chosen rank. ``estimate``: None where speeds are not measured; moves: whether the pages of the session's home
    are worth fetching."""

    rank: RankLoad
    estimate: Estimate | None
    moves: bool


def choose_decode_rank(
    ranks: Sequence[RankLoad],
    need: Need,
    *,
    source: RankLoad | None = None,
    prefills: Sequence[RankLoad] = (),
    rules: PathRules | None = None,
    excluded: Collection[RankId] = (),
) -> Placed | None:
    """The rank with the first token soonest, among those that have the pages if any has; None where no rank is left.

    source: the session's home, if it is alive; it may be leaving, and no candidate itself. The home stays the choice
    unless another rank is sooner by a clear margin. Of ranks that are alike the one with the fewest answers is taken,
    then the one with the most usable pages, then the lowest id, so that every router chooses alike.
    """
    rules = rules or PathRules()
    candidates = [rank for rank in ranks if rank.rank_id not in excluded]
    candidates = [rank for rank in candidates if _has_room(rank, need)] or candidates
    if not candidates:
        return None
    home = next((rank for rank in candidates if rank.rank_id == need.home), None)
    fleet = _Fleet.of(ranks, prefills)
    estimates = {rank.rank_id: estimate(rank, need, source=source, fleet=fleet, rules=rules) for rank in candidates}
    known = {rank_id: found for rank_id, found in estimates.items() if found is not None}
    if len(known) < len(candidates):
        rank = home or min(candidates, key=_busyness)
        return Placed(rank=rank, estimate=None, moves=rank is not home and need.num_home >= PAGE_SIZE)
    least_s = min(found.first_token_s for found in known.values())
    if home is not None and known[home.rank_id].first_token_s <= least_s * ALIKE + MIN_MOVE_GAIN_S:
        rank = home
    else:
        rank = min((r for r in candidates if known[r.rank_id].first_token_s <= least_s * ALIKE), key=_busyness)
    chosen = known[rank.rank_id]
    return Placed(rank=rank, estimate=chosen, moves=chosen.num_moved > 0)


def is_far_worse(need: Need, num_cached: int, rules: PathRules) -> bool:
    """Whether the home has so much less than was believed that the choice is worth repeating."""
    return num_cached < need.num_home / 2 and need.num_home - num_cached > rules.local_append_max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fleet:
    """What ranks that have measured nothing are taken to do: as well as the best of their peers."""

    prefills: Sequence[RankLoad]
    local_tokens_per_s: float
    remote_tokens_per_s: float
    link_bytes_per_s: float

    @classmethod
    def of(cls, ranks: Sequence[RankLoad], prefills: Sequence[RankLoad]) -> _Fleet:
        everyone = [*ranks, *prefills]
        local = max((rank.prefill_tokens_per_s for rank in ranks), default=0.0)
        remote = max((rank.prefill_tokens_per_s for rank in prefills), default=0.0)
        return cls(
            prefills=prefills,
            local_tokens_per_s=local or remote,
            remote_tokens_per_s=remote or local,
            link_bytes_per_s=max((max(r.pull_bytes_per_s, r.push_bytes_per_s) for r in everyone), default=0.0),
        )


def estimate(
    rank: RankLoad, need: Need, *, source: RankLoad | None, fleet: _Fleet, rules: PathRules
) -> Estimate | None:
    """Of one candidate; None where the speeds that it takes are not measured."""
    is_home = rank.rank_id == need.home
    num_here = min(need.num_home, need.num_tokens - 1) if is_home else 0
    compute_s = _compute_s(rank, num_here, need, fleet, rules)
    if compute_s is None:
        return None
    best = Estimate(
        queue_s=_blocked_s(rank),
        restore_s=_seconds(need.num_below if is_home else 0, rank.kv_bytes_per_token, rank.restore_bytes_per_s),
        move_s=0.0,
        compute_s=compute_s,
    )
    num_moved = min(need.num_home, need.num_tokens - 1) // PAGE_SIZE * PAGE_SIZE  # full pages alone
    if is_home or source is None or not num_moved:
        return best
    rest_s = _compute_s(rank, num_moved, need, fleet, rules)
    if rest_s is None:
        return best
    moved = Estimate(
        queue_s=best.queue_s,
        restore_s=_seconds(need.num_below, source.kv_bytes_per_token, source.restore_bytes_per_s),
        move_s=_seconds(num_moved, rank.kv_bytes_per_token, rank.pull_bytes_per_s or fleet.link_bytes_per_s),
        compute_s=rest_s,
        num_moved=num_moved,
    )
    return min(best, moved, key=lambda found: found.first_token_s)


def tenant_weight(num_answers: Mapping[TenantKey, int], tenant: TenantKey) -> float:
    """How much the delay of others counts against a tenant's append: its share of the answers in the making, times the
    number of tenants that have any; 1 for all that have no more than an equal share."""
    total = sum(num_answers.values())
    own = num_answers.get(tenant, 0)
    return max(1.0, own * len(num_answers) / total) if own else 1.0


def choose_path(
    decode: RankLoad,
    prefills: Sequence[RankLoad],
    *,
    num_cached: int,
    num_missing: int,
    rules: PathRules,
    excluded: Collection[RankId] = (),
    tenant_weight: float = 1.0,
) -> RankLoad | None:
    """The prefill rank that should compute ``num_missing`` prompt tokens, or None for the decode rank itself.

    num_missing counts the last prompt token, which the decode rank always computes: with 1 missing there is nothing
    to send away. The answer itself counts among the decode rank's already.
    """
    candidates = [rank for rank in prefills if rank.rank_id not in excluded]
    if rules.policy == "local" or num_missing <= 1 or not candidates:
        return None
    best = min(candidates, key=lambda rank: (rank.num_queued_prefill_tokens, rank.rank_id))
    if rules.policy == "remote":
        return best
    if num_missing <= rules.local_append_max_tokens:
        return None
    measured = max(rank.prefill_tokens_per_s for rank in candidates)
    if decode.prefill_tokens_per_s <= 0 or measured <= 0:
        return best
    local_s = local_append_s(
        decode,
        num_missing,
        tokens_per_s=decode.prefill_tokens_per_s,
        num_delayed=max(0, decode.num_gang_answers - 1),
        tenant_weight=tenant_weight,
    )

    def cost_s(rank: RankLoad) -> tuple[float, str]:  # one that has computed nothing yet counts like its peers
        return remote_s(rank, num_cached, num_missing, tokens_per_s=rank.prefill_tokens_per_s or measured), rank.rank_id

    cheapest = min(candidates, key=cost_s)
    return cheapest if cost_s(cheapest)[0] < local_s else None


def local_append_s(
    decode: RankLoad, num_missing: int, *, tokens_per_s: float, num_delayed: int, tenant_weight: float = 1.0
) -> float:
    """Seconds until the first token by local append, charged once more for each stream that waits meanwhile."""
    alone_s = (decode.num_queued_prefill_tokens + num_missing) / tokens_per_s
    return alone_s * (1 + tenant_weight * num_delayed)


def remote_s(prefill: RankLoad, num_cached: int, num_missing: int, *, tokens_per_s: float) -> float:
    """Seconds until the decode rank has the prompt by way of ``prefill``, which computes at ``tokens_per_s``.

    It pulls the cached prefix, or computes it where that is sooner.
    """
    compute_s = (prefill.num_queued_prefill_tokens + num_missing) / tokens_per_s
    pull_s = _seconds(num_cached, prefill.kv_bytes_per_token, prefill.pull_bytes_per_s)
    push_s = _seconds(num_missing, prefill.kv_bytes_per_token, prefill.push_bytes_per_s)
    return compute_s + min(pull_s, num_cached / tokens_per_s) + push_s


def _compute_s(rank: RankLoad, num_cached: int, need: Need, fleet: _Fleet, rules: PathRules) -> float | None:
    """Of what is missing behind ``num_cached`` tokens, the cheaper way that the rules leave; None where unmeasured."""
    num_missing = need.num_tokens - num_cached
    is_short = rules.policy == "auto" and num_missing <= rules.local_append_max_tokens
    may_be_remote = bool(fleet.prefills) and rules.policy != "local" and num_missing > 1 and not is_short
    ways: list[float] = []
    tokens_per_s = rank.prefill_tokens_per_s or fleet.local_tokens_per_s
    if tokens_per_s > 0 and not (may_be_remote and rules.policy == "remote"):
        ways.append(
            local_append_s(
                rank,
                num_missing,
                tokens_per_s=tokens_per_s,
                num_delayed=rank.num_gang_answers,
                tenant_weight=need.tenant_weight,
            )
        )
    if may_be_remote and fleet.remote_tokens_per_s > 0:
        ways.extend(
            remote_s(p, num_cached, num_missing, tokens_per_s=p.prefill_tokens_per_s or fleet.remote_tokens_per_s)
            for p in fleet.prefills
        )
    return min(ways, default=None)


def _blocked_s(rank: RankLoad) -> float:
    """Until a place comes free for one more, where others wait already: places come free at running / answer_s."""
    return (rank.num_blocked + 1) * rank.answer_s / max(1, rank.num_running) if rank.num_blocked else 0.0


def _has_room(rank: RankLoad, need: Need) -> bool:
    num_here = need.num_home // PAGE_SIZE if rank.rank_id == need.home else 0
    num_needed = need.num_tokens // PAGE_SIZE + 1 - num_here
    return num_needed <= rank.num_free_pages + rank.num_cached_pages


def _busyness(rank: RankLoad) -> tuple[int, int, str]:
    usable_pages = rank.num_free_pages + rank.num_cached_pages
    return rank.num_answers, -usable_pages, rank.rank_id


def _seconds(num_tokens: int, bytes_per_token: int, bytes_per_s: float) -> float:
    """0 where the speed is not measured: the first transfer is what measures it."""
    return num_tokens * bytes_per_token / bytes_per_s if bytes_per_s > 0 else 0.0
