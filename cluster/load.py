"""What scaling looks at: the gangs and routers of a deployment at one moment, and what they are to hold. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from seamount.workers.spec import PoolName


@dataclass(frozen=True, slots=True, kw_only=True)
class GangLoad:
    """One gang, summed over its ranks. Gangs that are leaving are not among the loads.

    is_ready: False while it starts; num_held_pages: of its devices, in use by answers or under a lease;
    num_cached_pages: of its devices or the tier below, left by sessions without a lease that may come back;
    num_running, num_blocked: answers in the making, and those that wait for one of num_places (0 = not known) or for
    pages; num_queued_tokens: of prompts, still to compute. Measured and smoothed, 0 = not yet:
    prompt_tokens_per_s (all ranks together), inter_token_s (of one answer), link_bytes_per_s (of one rank).
    """

    name: str
    pool: PoolName
    is_ready: bool = True
    num_ranks: int = 1
    num_pages: int = 0
    num_held_pages: int = 0
    num_cached_pages: int = 0
    num_running: int = 0
    num_blocked: int = 0
    num_places: int = 0
    num_queued_tokens: int = 0
    prompt_tokens_per_s: float = 0.0
    inter_token_s: float = 0.0
    kv_bytes_per_token: int = 0
    link_bytes_per_s: float = 0.0

    @property
    def number(self) -> int:
        """How late it was started among those of its pool."""
        return int(self.name.rpartition("-")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoad:
    """One router. cores: CPU seconds that it uses each second."""

    name: str
    num_streams: int = 0
    cores: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many there are at the least and at the most; ranks_per_gang: 1 for routers."""

    at_least: int = 1
    at_most: int = 1
    ranks_per_gang: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What is promised, and how near to its bounds the system is run.

    recover_s: in which a queue is to be gone once gangs are up; max_utilisation: share of their time that prefill gangs
    compute; append_share: of a decode gang's time that appends may take from its streams; max_occupancy: of a decode
    gang's pages and places that may be taken; shrink_margin: what is left after a gang has gone carries the load at
    this part of those bounds; flow_window_s: over which the flow of prompts is measured; grow_after_s, shrink_after_s:
    how long the load must have asked for it.
    """

    first_token_s: float = 2.0
    inter_token_s: float = 0.05
    prefill: Limits = Limits(at_least=0)
    decode: Limits = Limits()
    routers: Limits = Limits()
    recover_s: float = 10.0
    max_utilisation: float = 0.7
    append_share: float = 0.25
    max_occupancy: float = 0.8
    streams_per_router: int = 1_000
    cores_per_router: float = 0.7
    shrink_margin: float = 0.8
    flow_window_s: float = 120.0
    grow_after_s: float = 3.0
    shrink_after_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """How many gangs (or routers) the load asks for. grow: at the bounds of the Slo; keep: with room below them, so
    that none goes that comes back at once. reason: what asks for the most of them."""

    grow: int = 0
    keep: int = 0
    reason: str = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look came to; ``History`` keeps them. num_held_pages: of all decode gangs; answers: that run at a decode
    gang, 0 where none does; inter_token_s: between two tokens of one of them."""

    now_s: float
    num_prompt_tokens: int
    num_held_pages: int
    answers: float = 0.0
    inter_token_s: float = 0.0
    prefill: Need = Need()
    decode: Need = Need()
    routers: Need = Need()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds between the tokens of an answer: without another one at its gang, and what each of them adds."""

    base_s: float
    each_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Looks, the oldest first, and what was wanted last (None: as many as there are). step: None until it is known."""

    looks: tuple[Look, ...] = ()
    step: StepTimes | None = None
    prefill: int | None = None
    decode: int | None = None
    routers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a decision is made from.

    now_s: of any clock that never goes back; num_prompt_tokens: all that ever came to be computed, from any moment on;
    *_start_s: from the wish for a gang until it serves, measured; history: as the decision before gave it.
    """

    now_s: float
    gangs: tuple[GangLoad, ...]
    routers: tuple[RouterLoad, ...] = ()
    num_prompt_tokens: int = 0
    prefill_start_s: float = 120.0
    decode_start_s: float = 120.0
    history: History = History()

    def of(self, pool: PoolName) -> list[GangLoad]:
        """The pool's gangs, those that start included."""
        return [gang for gang in self.gangs if gang.pool == pool]

    def ready(self, pool: PoolName) -> list[GangLoad]:
        return [gang for gang in self.gangs if gang.pool == pool and gang.is_ready]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Wanted gangs and routers; drain: names of the gangs that are too many, the cheapest to lose first."""

    prefill: int
    decode: int
    routers: int
    drain: tuple[str, ...] = ()
    look: Look
    history: History
