"""A day of agents' turns, millions of them, in order of time.

Sessions of ``traffic`` start at a rate that follows the hours. Beside them programs start agents in bursts: sessions
of one request each, at a rate that climbs in a straight line for ``RAMP_S`` and falls again in three times as long. How
high is set such that the busiest minute has ``peak`` times the turns of the median one. Each session is one of
``NUM_PLANS`` made-up plans, whose turns come at its waits and at the times that turns take on an idle system: late
answers do not hold later turns up, which is harder on queues. The day is a ring: it begins with the evening's sessions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.costs import StepCosts
from benchmarks.simulation.traffic import SYSTEM_TOKENS, Generator, Plan, Step

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DAY_S = 86_400
MINUTE_S = 60
NUM_MINUTES = DAY_S // MINUTE_S
NUM_PLANS = 600
NUM_BURSTS = 6
RAMP_S = 600.0
QUIET_SHARE = 0.3
"""Of the rate at noon that the nights have."""
MAX_CONTEXT_TOKENS = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """[turns] each: came_s: seconds from the first; num_new: tokens to compute, own_s: how long one rank takes for it;
    context: tokens that the answer holds at its end; num_output: tokens that it samples."""

    came_s: Floats
    num_new: Floats
    own_s: Floats
    context: Floats
    num_output: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A day. second: in which each turn came, ascending; own_s: of each; by second: turns, their tokens to compute.

    tokens_per_rank_s: computed by one rank, at the positions that come; context, num_output: means.
    """

    second: Ints
    own_s: Floats
    num_turns: Floats
    num_tokens: Floats
    tokens_per_rank_s: float
    context: float
    num_output: float

    @property
    def peak(self) -> float:
        """Turns of the busiest minute over those of the median one."""
        by_minute = self.num_turns.reshape(-1, MINUTE_S).sum(axis=1)
        return float(by_minute.max() / np.median(by_minute))


def turns_of(plan: Plan, costs: StepCosts) -> Turns:
    """When a session's turns come and what they bring, forks and all, on a system that is idle.

    What the next question cuts, everything from the first old thought on, is to be computed again.
    """
    rows: list[tuple[float, float, float, float, float]] = []
    _follow(plan.steps, SYSTEM_TOKENS[plan.agent], 0.0, costs, rows)
    columns = np.array(rows).T
    return Turns(came_s=columns[0], num_new=columns[1], own_s=columns[2], context=columns[3], num_output=columns[4])


def _follow(
    steps: Sequence[Step],
    size: int,
    at_s: float,
    costs: StepCosts,
    rows: list[tuple[float, float, float, float, float]],
) -> None:
    first_size, thoughts, answers = 0, 0, 0
    step_s = costs.step_s([size], [])
    for number, step in enumerate(steps):
        at_s += step.wait_s if number else 0.0
        num_new = step.num_appended + (number > 0)  # the last sampled token was never fed back
        if step.resets:
            size, thoughts, answers = first_size, 0, 0
        elif not step.tool and thoughts:
            size -= thoughts
            num_new = step.num_appended + answers
            thoughts = answers = 0
        end = size + step.num_appended
        own_s = costs.step_s([], [(end - num_new, end)])
        num_output = step.num_reasoning + step.num_output
        size = end + num_output
        rows.append((at_s, num_new, own_s, size, num_output))
        at_s += own_s + num_output * step_s
        first_size = first_size or end
        answers += step.num_output + (step.num_appended if thoughts else 0)
        thoughts += step.num_reasoning
        if step.forks:
            _follow(step.forks, size, at_s + step.forks[0].wait_s, costs, rows)


def day_of_agents(*, seed: int, turns_per_s: float, peak: float, costs: StepCosts) -> Demand:
    """turns_per_s: mean of the day without bursts."""
    rng = np.random.default_rng(seed)
    generator = Generator(seed=seed, max_context_tokens=MAX_CONTEXT_TOKENS)
    plans = [generator.plan() for _ in range(NUM_PLANS)]
    people = _Kind([turns_of(plan, costs) for plan in plans])
    programs = _Kind([turns_of(one_request(plan), costs) for plan in plans])
    hours = np.arange(NUM_MINUTES) / 60
    usual = QUIET_SHARE + (1 - QUIET_SHARE) * np.clip(np.sin(math.pi * (hours - 7) / 14), 0, None)
    usual *= turns_per_s * DAY_S / usual.sum() / people.mean_turns
    bursts = _bursts(rng)
    height = _height(people.turns_by_minute(usual), programs.turns_by_minute(bursts), peak)
    parts = [people.day(rng, usual), programs.day(rng, height * bursts)]
    turns = Turns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in Turns.__slots__})
    second = turns.came_s.astype(np.int64)
    order = np.argsort(second, kind="stable")
    return Demand(
        second=second[order],
        own_s=turns.own_s[order],
        num_turns=np.bincount(second, minlength=DAY_S).astype(np.float64),
        num_tokens=np.bincount(second, weights=turns.num_new, minlength=DAY_S),
        tokens_per_rank_s=float(turns.num_new.sum() / turns.own_s.sum()),
        context=float(turns.context.mean()),
        num_output=float(turns.num_output.mean()),
    )


def one_request(plan: Plan) -> Plan:
    """The session up to its person's second message."""
    end = next((at for at, step in enumerate(plan.steps) if at and not step.tool), len(plan.steps))
    return replace(plan, steps=plan.steps[:end])


class _Kind:
    """Sessions of one kind: the turns of all its plans, one plan after the other."""

    def __init__(self, plans: Sequence[Turns]) -> None:
        self._lengths = np.array([len(plan.came_s) for plan in plans])
        self._turns = Turns(**{name: np.concatenate([getattr(one, name) for one in plans]) for name in Turns.__slots__})

    @property
    def mean_turns(self) -> float:
        return float(self._lengths.mean())

    def turns_by_minute(self, starts: Floats) -> Floats:
        """Expected, where so many sessions start in each minute: a circular convolution."""
        minutes = (self._turns.came_s // MINUTE_S).astype(np.int64) % NUM_MINUTES
        by_minute = np.bincount(minutes, minlength=NUM_MINUTES) / len(self._lengths)
        return np.fft.irfft(np.fft.rfft(starts) * np.fft.rfft(by_minute), NUM_MINUTES)

    def day(self, rng: np.random.Generator, starts: Floats) -> Turns:
        """Turns of a day in which so many sessions start in each minute on average."""
        num_sessions = rng.poisson(starts)
        start_s = MINUTE_S * (np.repeat(np.arange(NUM_MINUTES), num_sessions) + rng.random(num_sessions.sum()))
        plan = rng.integers(0, len(self._lengths), len(start_s))
        num_turns, first = self._lengths[plan], np.cumsum(self._lengths) - self._lengths
        rows = np.arange(num_turns.sum()) + np.repeat(first[plan] - (np.cumsum(num_turns) - num_turns), num_turns)
        turns = Turns(**{name: getattr(self._turns, name)[rows] for name in Turns.__slots__})
        return replace(turns, came_s=(turns.came_s + np.repeat(start_s, num_turns)) % DAY_S)


def _bursts(rng: np.random.Generator) -> Floats:
    """By minute; 1 at their tops."""
    rate = np.zeros(NUM_MINUTES)
    for top in rng.choice(NUM_MINUTES, NUM_BURSTS, replace=False):
        ramps = ((np.arange(NUM_MINUTES) - top) * MINUTE_S / RAMP_S + 1) % (DAY_S / RAMP_S)  # since its beginning
        rate = np.maximum(rate, np.minimum(ramps, (4 - ramps) / 3))
    return rate


def _height(usual: Floats, bursts: Floats, peak: float) -> float:
    """By what ``bursts`` are to be multiplied; the median hardly moves with it."""
    low, high = 0.0, 2 * peak * float(usual.max() / bursts.max())
    for _ in range(50):
        height = (low + high) / 2
        turns = usual + height * bursts
        low, high = (height, high) if turns.max() < peak * np.median(turns) else (low, height)
    return low
