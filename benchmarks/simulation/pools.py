"""Pools of gangs under a day's demand, second by second: turns are a fluid that waits in two queues.

    answers blocked  ->  prompts queued  ->  answers running  ->  done
       (decode pages)      (tokens, first come first)

A turn takes its place at a decode gang before its prompt is computed, as ``Reserve`` does: what waits for prefill holds
pages. Prompts are computed by the ranks of prefill gangs and, for ``append_share`` of their time, by those of decode
gangs, which decode more slowly meanwhile. Load is shared out evenly; caches are where they are wanted (``agents`` has
what they cost). A gang that is wanted holds its GPUs at once and serves when its weights are loaded; one that goes
serves nothing any more and holds them for ``leave_s``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from benchmarks.simulation.costs import V32_KV_BYTES_PER_TOKEN, StepCosts
from benchmarks.simulation.demand import DAY_S, MINUTE_S, Demand, Floats
from seamount.workers.spec import PoolName

GANG_RANKS = 8
"""GPUs of a gang: V3.2 on one node of H200."""
KV_BYTES = 40e9
"""Of a GPU of 141 GB, beside 86 GB of weights (671e9 parameters in FP8, scales, some BF16; over 8) and activations."""
WEIGHTS_BYTES, LOAD_BYTES_PER_S = 689e9, 5e9
"""A gang's weights, and one node's disk (data sheet)."""
MIN_START_S = 120.0
LEAVE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """What gangs can do. answers_per_gang: whose pages fit; prompt_tokens_per_s: of one gang; step_s: of a decode step
    with so many answers on a rank."""

    answers_per_gang: float
    prompt_tokens_per_s: float
    step_base_s: float
    step_s_per_answer: float
    num_output: float
    append_share: float = 0.25
    start_s: float = MIN_START_S
    leave_s: float = LEAVE_S

    @classmethod
    def of(cls, demand: Demand, costs: StepCosts, load_bytes_per_s: float = LOAD_BYTES_PER_S) -> Plant:
        base_s = costs.decode_base_s
        return cls(
            answers_per_gang=GANG_RANKS * KV_BYTES / V32_KV_BYTES_PER_TOKEN / demand.context,
            prompt_tokens_per_s=GANG_RANKS * demand.tokens_per_rank_s,
            step_base_s=base_s,
            step_s_per_answer=costs.step_s([round(demand.context)], []) - base_s,
            num_output=demand.num_output,
            start_s=max(MIN_START_S, WEIGHTS_BYTES / load_bytes_per_s),
        )

    def inter_token_s(self, running_per_gang: float, append_share: float) -> float:
        return (self.step_base_s + self.step_s_per_answer * running_per_gang / GANG_RANKS) / (1 - append_share)


@dataclass(slots=True, kw_only=True)
class Gang:
    name: str
    ready_at: float


@dataclass(slots=True, kw_only=True)
class Pool:
    """Gangs that are wanted, in the order of their start, and when those that leave are gone."""

    name: PoolName
    gangs: list[Gang] = field(default_factory=list)
    leaving: list[float] = field(default_factory=list)
    num_ready: int = 0
    _num_started: int = 0

    def want(self, number: int, now_s: float, plant: Plant, drain: tuple[str, ...] = ()) -> None:
        """Start gangs, or let some go: those of ``drain`` first, then the newest."""
        while len(self.gangs) < number:
            self._num_started += 1
            self.gangs.append(Gang(name=f"{self.name}-{self._num_started}", ready_at=now_s + plant.start_s))
        surplus = len(self.gangs) - number
        if surplus > 0:
            going = {*[name for name in drain if name.startswith(self.name)][:surplus]}
            going |= {*[gang.name for gang in reversed(self.gangs) if gang.name not in going][: surplus - len(going)]}
            self.leaving += [now_s + plant.leave_s for gang in self.gangs if gang.name in going]
            self.gangs = [gang for gang in self.gangs if gang.name not in going]
        self.tick(now_s)

    def begin(self, number: int) -> None:
        """The day begins with so many that serve."""
        self.gangs = [Gang(name=f"{self.name}-{index}", ready_at=0.0) for index in range(number)]
        self._num_started = self.num_ready = number

    def tick(self, now_s: float) -> None:
        self.num_ready = sum(gang.ready_at <= now_s for gang in self.gangs)
        self.leaving = [gone_at for gone_at in self.leaving if gone_at > now_s]

    @property
    def num_held(self) -> int:
        """Gangs that hold GPUs."""
        return len(self.gangs) + len(self.leaving)


@dataclass(slots=True, kw_only=True)
class State:
    """The deployment at one moment. num_prefilled: prompts that prefill gangs compute just now; num_prompt_tokens: that
    came since the beginning."""

    now_s: float
    prefill: Pool
    decode: Pool
    num_blocked: float = 0.0
    num_queued: float = 0.0
    queued_tokens: float = 0.0
    num_prefilled: float = 0.0
    num_running: float = 0.0
    inter_token_s: float = 0.0
    num_prompt_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Gangs of each pool; drain: which go where there are too many."""

    prefill: int
    decode: int
    drain: tuple[str, ...] = ()


class Scaler(Protocol):
    """Whoever says how many gangs there are to be. every_s: how often it is asked."""

    every_s: int

    def first(self) -> Wanted:
        """With what the day begins."""

    def look(self, state: State, plant: Plant) -> Wanted:
        """What there should be now."""


Series = Literal["prefill", "decode", "gangs", "queued_tokens", "blocked", "running"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """What came of a day. series: by second; first_token_s: of each turn."""

    series: dict[Series, Floats]
    first_token_s: Floats
    p99_by_minute: Floats

    @property
    def gpu_hours(self) -> float:
        """GPUs are held from the wish for a gang on until it has left."""
        return float(self.series["gangs"].sum()) * GANG_RANKS / 3600

    def met(self, target_s: float) -> float:
        """Share of the day's minutes with a first-token p99 within the target."""
        return float((self.p99_by_minute <= target_s).mean())


def run_day(demand: Demand, plant: Plant, scaler: Scaler, on_hour: Callable[[], None] = lambda: None) -> Day:
    """From an empty system with the scaler's first gangs."""
    wanted = scaler.first()
    prefill, decode = Pool(name="prefill"), Pool(name="decode")
    prefill.begin(wanted.prefill)
    decode.begin(wanted.decode)
    state = State(now_s=0.0, prefill=prefill, decode=decode, inter_token_s=plant.step_base_s)
    names: tuple[Series, ...] = ("prefill", "decode", "gangs", "queued_tokens", "blocked", "running")
    rows = np.zeros((DAY_S, len(names)))
    served = np.zeros(DAY_S)
    blocked_tokens = num_served = 0.0
    for second, (num_turns, num_tokens) in enumerate(
        zip(demand.num_turns.tolist(), demand.num_tokens.tolist(), strict=True)
    ):
        if second % scaler.every_s == 0:
            state.now_s = float(second)
            prefill.tick(second)
            decode.tick(second)
            wanted = scaler.look(state, plant)
            prefill.want(wanted.prefill, second, plant, wanted.drain)
            decode.want(wanted.decode, second, plant, wanted.drain)
        state.num_prompt_tokens += num_tokens
        state.num_blocked += num_turns
        blocked_tokens += num_tokens
        blocked_tokens -= _admit(state, blocked_tokens, plant)
        done = _compute(state, plant)
        _decode(state, plant)
        num_served += done
        served[second] = num_served
        rows[second] = (
            prefill.num_ready,
            decode.num_ready,
            prefill.num_held + decode.num_held,
            state.queued_tokens + blocked_tokens,
            state.num_blocked,
            state.num_running,
        )
        if second % 3600 == 3599:
            on_hour()
    first_token_s = _waits_s(demand, served)[demand.second] + demand.own_s + plant.step_base_s
    return Day(
        series={name: rows[:, at] for at, name in enumerate(names)},
        first_token_s=first_token_s,
        p99_by_minute=_p99_by_minute(demand, first_token_s),
    )


def _admit(state: State, blocked_tokens: float, plant: Plant) -> float:
    """Blocked turns take the places that there are; returns the tokens of their prompts."""
    room = state.decode.num_ready * plant.answers_per_gang - state.num_running - state.num_queued
    admitted = max(0.0, min(state.num_blocked, room))
    if admitted == 0.0:
        return 0.0
    tokens = blocked_tokens * admitted / state.num_blocked
    state.num_blocked -= admitted
    state.num_queued += admitted
    state.queued_tokens += tokens
    return tokens


def _compute(state: State, plant: Plant) -> float:
    """A second's prompt tokens, returned: decode gangs append what they may, prefill gangs compute the rest."""
    if state.queued_tokens <= 0.0:
        state.num_prefilled = 0.0
        return 0.0
    rate = plant.prompt_tokens_per_s
    appended = min(state.queued_tokens, state.decode.num_ready * rate * plant.append_share)
    rest = min(state.queued_tokens - appended, state.prefill.num_ready * rate)
    done = appended + rest
    answers = state.num_queued * done / state.queued_tokens
    state.num_queued -= answers
    state.queued_tokens -= done
    state.num_running += answers
    state.num_prefilled = rest / rate * GANG_RANKS
    decode_rate = state.decode.num_ready * rate
    share = appended / decode_rate if decode_rate else 0.0
    state.inter_token_s = plant.inter_token_s(state.num_running / max(1, state.decode.num_ready), share)
    return done


def _decode(state: State, plant: Plant) -> None:
    """A second's answers end."""
    state.num_running -= state.num_running * min(1.0, 1.0 / (plant.num_output * state.inter_token_s))


def _waits_s(demand: Demand, served: Floats) -> Floats:
    """By second: until the prompts that came in it have all been computed, or the day is over."""
    came = np.cumsum(demand.num_tokens)
    at = np.searchsorted(served, came * (1 - 1e-12) - 1e-3)
    return np.maximum(0.0, at - np.arange(DAY_S))


def _p99_by_minute(demand: Demand, first_token_s: Floats) -> Floats:
    """0 for a minute without turns."""
    edges = np.searchsorted(demand.second, np.arange(0, DAY_S + 1, MINUTE_S))
    return np.array(
        [
            np.percentile(first_token_s[start:end], 99) if end > start else 0.0
            for start, end in itertools.pairwise(edges)
        ]
    )
