"""From what ranks and routers say of themselves to the loads that scaling decides by."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from seamount.cluster.fleet_plan import Phase, RunningGang
from seamount.cluster.load import GangLoad, RouterLoad
from seamount.router.directory import PeerRecord
from seamount.v1 import admin_pb2, worker_pb2

_SMOOTHING = 0.3
"""Weight of a new measurement of the time between tokens."""
_SHORTEST_LOOK_S = 0.4
"""Between two measurements: shorter ones would show single steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRank:
    """One rank that is alive, with its last state."""

    record: PeerRecord
    state: worker_pb2.RankState


@dataclass(slots=True)
class _Before:
    """What a rank said at the last measurement."""

    at_s: float
    num_come: int
    num_sampled: int
    num_running: int
    num_queued: int
    inter_token_s: float = 0.0


class Meter:
    """Keeps what has to be measured over time: the prompt tokens that came, and the time between tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: dict[str, _Before] = {}
        self.num_prompt_tokens = 0
        """All that came to be computed since the first look."""

    def gangs(self, running: Iterable[RunningGang], ranks: Iterable[SeenRank]) -> tuple[GangLoad, ...]:
        """One load a gang that is not leaving."""
        by_gang: dict[str, list[SeenRank]] = defaultdict(list)
        for rank in ranks:
            by_gang[gang_name(rank.record.gang_id)].append(rank)
            self._measure(rank)
        seen = {rank.record.instance for members in by_gang.values() for rank in members}
        self._before = {instance: before for instance, before in self._before.items() if instance in seen}
        present = [gang for gang in running if gang.phase is not Phase.LEAVING]
        return tuple(self._load(gang, by_gang.get(gang.name, [])) for gang in present)

    def _measure(self, rank: SeenRank) -> None:
        state, now = rank.state, self._clock()
        num_come = state.num_computed_tokens + state.num_queued_prefill_tokens
        before = self._before.get(rank.record.instance)
        if before is None:
            self._before[rank.record.instance] = _Before(now, num_come, state.num_sampled_tokens, state.num_running, 0)
            return
        took_s = now - before.at_s
        if took_s < _SHORTEST_LOOK_S:
            return
        self.num_prompt_tokens += max(0, num_come - before.num_come)
        num_sampled = state.num_sampled_tokens - before.num_sampled
        is_appending = bool(state.num_queued_prefill_tokens or before.num_queued)
        if num_sampled > 0 and not is_appending:  # else running answers may be prompts
            found = took_s * (state.num_running + before.num_running) / 2 / num_sampled
            known = before.inter_token_s
            before.inter_token_s = found if not known else known + _SMOOTHING * (found - known)
        before.at_s, before.num_come, before.num_sampled = now, num_come, state.num_sampled_tokens
        before.num_running, before.num_queued = state.num_running, state.num_queued_prefill_tokens

    def _load(self, gang: RunningGang, ranks: Sequence[SeenRank]) -> GangLoad:
        states = [rank.state for rank in ranks]
        num_held = sum(map(num_held_pages, states))
        num_cached = sum(s.num_cached_pages - s.num_leased_pages - s.num_superseded_pages for s in states)
        below = sum(
            max(
                state.num_host_cached_pages - state.num_host_superseded_pages,
                state.num_disk_cached_pages - state.num_disk_superseded_pages,
            )
            for state in states
        )
        running = [(self._before[rank.record.instance].inter_token_s, rank.state.num_running) for rank in ranks]
        num_running = sum(number for _, number in running)
        return GangLoad(
            name=gang.name,
            pool=gang.pool,
            is_ready=gang.phase is Phase.READY and bool(states),
            num_ranks=max(1, len(states)),
            num_pages=sum(state.num_pages for state in states),
            num_held_pages=num_held,
            num_cached_pages=max(num_cached, below - num_held),
            num_running=num_running,
            num_blocked=sum(state.num_blocked for state in states),
            num_places=sum(state.num_places for state in states),
            num_queued_tokens=sum(state.num_queued_prefill_tokens for state in states),
            prompt_tokens_per_s=sum(state.prefill_tokens_per_s for state in states),
            inter_token_s=sum(found * number for found, number in running) / num_running if num_running else 0.0,
            kv_bytes_per_token=max((state.kv_bytes_per_token for state in states), default=0),
            link_bytes_per_s=max((max(s.pull_bytes_per_s, s.push_bytes_per_s) for s in states), default=0.0),
        )


def num_held_pages(state: worker_pb2.RankState) -> int:
    """In use, or under a lease and nowhere else."""
    return state.num_pages - state.num_free_pages - state.num_cached_pages + state.num_leased_pages


def router_load(record: PeerRecord, beat: bytes) -> RouterLoad:
    """Of a router, by its last beat; one of another version may say nothing."""
    try:
        state = admin_pb2.RouterState.FromString(beat)
    except DecodeError:
        state = admin_pb2.RouterState()
    return RouterLoad(name=record.peer_id, num_streams=state.num_streams, cores=state.cores)


def gang_name(gang_id: str) -> str:
    """The application of a gang, whose id has Serve's own for this start behind it."""
    return gang_id.rpartition("-")[0]
