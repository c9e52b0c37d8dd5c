"""What it costs to lose a gang: the seconds that sessions will wait for it. Pure.

A page that its session wants again is moved to another gang or computed anew, whichever is sooner:

    page_s = 64 x min(kv_bytes_per_token / link_bytes_per_s, 1 / prompt_tokens_per_s of one rank)

and beyond the pages that are free elsewhere it is always computed. Each running answer waits for its own pages and for
being placed again; pages under a lease are wanted for certain, other cached ones with ``RETURN_CHANCE``; superseded
ones (of deleted sessions, of reasoning that was cut) are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from seamount.cluster.load import GangLoad
from seamount.wire.hashes import PAGE_SIZE

RETURN_CHANCE = 0.5
REPLACE_S = 0.5
"""Of a running answer: until another rank has taken it in."""


def cheapest_first(gangs: Sequence[GangLoad], *, beside: Iterable[GangLoad] = ()) -> list[GangLoad]:
    """The order in which gangs of one pool go: those that serve nobody yet first, then by ``losing_s``; where that is
    equal, the newest. A gang that has measured nothing yet counts like its peers. beside: gangs that stay for certain.
    """
    everyone = [*gangs, *beside]
    link_bytes_per_s = max((gang.link_bytes_per_s for gang in everyone), default=0.0)
    tokens_per_s = max((gang.prompt_tokens_per_s / gang.num_ranks for gang in everyone), default=0.0)

    def cost(gang: GangLoad) -> tuple[bool, float, int]:
        known = replace(
            gang,
            link_bytes_per_s=gang.link_bytes_per_s or link_bytes_per_s,
            prompt_tokens_per_s=gang.prompt_tokens_per_s or tokens_per_s * gang.num_ranks,
        )
        return gang.is_ready, losing_s(known, [other for other in everyone if other is not gang]), -gang.number

    return sorted(gangs, key=cost)


def losing_s(gang: GangLoad, others: Sequence[GangLoad]) -> float:
    """Seconds that sessions wait because ``gang`` goes; ``others``: who may take its pages."""
    room = sum(max(0, other.num_pages - other.num_held_pages) for other in others if other.is_ready)
    wanted = gang.num_held_pages + RETURN_CHANCE * gang.num_cached_pages
    compute_s = _page_compute_s(gang)
    move_s = min(_page_move_s(gang) or compute_s, compute_s)
    moved = min(wanted, room)
    return gang.num_running * REPLACE_S + moved * move_s + (wanted - moved) * compute_s


def _page_compute_s(gang: GangLoad) -> float:
    """1 s where nothing is measured: then pages alone decide."""
    rate = gang.prompt_tokens_per_s / gang.num_ranks
    return PAGE_SIZE / rate if rate > 0 else 1.0


def _page_move_s(gang: GangLoad) -> float:
    """0 where the link's speed is not measured."""
    return PAGE_SIZE * gang.kv_bytes_per_token / gang.link_bytes_per_s if gang.link_bytes_per_s > 0 else 0.0
