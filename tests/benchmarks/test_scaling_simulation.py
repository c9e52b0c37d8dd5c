"""The day simulator: demand like the sessions it is made of, queues worked out by hand, the real policies at work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.simulation import demand as demand_module
from benchmarks.simulation.costs import h100_costs
from benchmarks.simulation.demand import DAY_S, MAX_CONTEXT_TOKENS, Demand, Floats, day_of_agents, turns_of
from benchmarks.simulation.pools import GANG_RANKS, Day, Plant, Pool, State, Wanted, run_day
from benchmarks.simulation.scalers import Fixed, Own, ServeDefault
from benchmarks.simulation.sessions import Session, shared_prefix
from benchmarks.simulation.traffic import SYSTEM_TOKENS, Generator
from seamount.cluster.load import Limits, Slo
from seamount.router.history import common_len

COSTS = h100_costs()
PLANT = Plant(
    answers_per_gang=100.0,
    prompt_tokens_per_s=1_000.0,
    step_base_s=0.02,
    step_s_per_answer=0.0,
    num_output=100.0,
    append_share=0.0,
)
"""A gang computes 1,000 prompt tokens a second; an answer takes 2 s."""


def steady(turns_per_s: Floats, num_tokens: float = 100.0, own_s: float = 0.5) -> Demand:
    """So many turns in each second, all alike."""
    return Demand(
        second=np.repeat(np.arange(DAY_S), turns_per_s.astype(np.int64)),
        own_s=np.full(int(turns_per_s.sum()), own_s),
        num_turns=turns_per_s,
        num_tokens=turns_per_s * num_tokens,
        tokens_per_rank_s=num_tokens / own_s,
        context=1_000.0,
        num_output=100.0,
    )


def test_a_plans_turns_compute_what_its_sessions_prompts_lack() -> None:
    generator = Generator(seed=3, max_context_tokens=MAX_CONTEXT_TOKENS)
    num_resets = 0
    for plan in (replace(generator.plan(), agent=0) for _ in range(60)):
        session = Session(number=1, plan=plan, kept=shared_prefix(0, SYSTEM_TOKENS[0]))
        lacking, sizes = [], []
        for step in plan.steps:
            left = session.context[:-1]
            prompt, _ = session.prompt()
            num_found = common_len(left, prompt) if left else SYSTEM_TOKENS[0]
            lacking.append(len(prompt) - min(num_found, len(prompt) - (step.num_appended == 0)))
            session.answered(prompt, session.fresh(step.num_reasoning + step.num_output))
            sizes.append(len(session.context))
            num_resets += step.resets
        turns = turns_of(replace(plan, steps=tuple(replace(step, forks=()) for step in plan.steps)), COSTS)
        assert turns.context.tolist() == sizes
        assert turns.num_new.tolist() == lacking
        assert (np.diff(turns.came_s) > 0).all()
    assert num_resets > 0


def test_a_day_has_the_turns_and_the_peak_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand_module, "NUM_PLANS", 60)
    day, again = (day_of_agents(seed=5, turns_per_s=4.0, peak=8.0, costs=COSTS) for _ in range(2))
    assert (day.second == again.second).all()
    assert (np.diff(day.second) >= 0).all()
    assert len(day.second) == len(day.own_s) == day.num_turns.sum()
    assert 7.0 < day.peak < 9.5
    quiet = np.median(day.num_turns.reshape(-1, 60).mean(axis=1))
    assert 2.5 < quiet < 6.0
    assert day.tokens_per_rank_s == pytest.approx(day.num_tokens.sum() / day.own_s.sum())


def test_prompts_wait_for_those_before_them() -> None:
    """1,000 tokens/s are served. From 100 s to 199 s twice as many come: they are done at 300 s."""
    turns = np.zeros(DAY_S)
    turns[100:200] = 20.0
    day = run_day(steady(turns), PLANT, Fixed(prefill=1, decode=100))
    waits = day.first_token_s.reshape(100, 20)[:, 0] - 0.5 - PLANT.step_base_s
    assert waits.tolist() == pytest.approx([float(at + 1) for at in range(100)])
    assert day.series["queued_tokens"].max() == pytest.approx(100_000.0)
    assert day.series["queued_tokens"][299] == pytest.approx(0.0, abs=1.0)
    assert run_day(steady(turns), PLANT, Fixed(prefill=2, decode=100)).first_token_s.max() == pytest.approx(0.52)


def test_turns_wait_for_places_at_decode_gangs() -> None:
    """100 answers fit and each takes 2 s, so that 50 a second end; 100 a second come for a while."""
    turns = np.zeros(DAY_S)
    turns[100:160] = 100.0
    day = run_day(steady(turns), PLANT, Fixed(prefill=100, decode=1))
    assert day.series["running"].max() <= 100.0
    assert day.series["blocked"].max() == pytest.approx(60 * 50.0, rel=0.05)
    assert day.first_token_s.max() == pytest.approx(60.0, rel=0.1)
    assert day.series["blocked"][-1] == 0.0


@dataclass(slots=True)
class At:
    """Wants other numbers from a second on."""

    second: int
    then: Wanted
    every_s: int = 1
    seen: list[tuple[int, int]] = field(default_factory=list)

    def first(self) -> Wanted:
        return Wanted(prefill=1, decode=1)

    def look(self, state: State, plant: Plant) -> Wanted:
        self.seen.append((state.prefill.num_ready, state.decode.num_ready))
        return self.then if state.now_s >= self.second else self.first()


def test_a_gang_is_paid_from_the_wish_on_and_serves_when_its_weights_are_loaded() -> None:
    plant, scaler = replace(PLANT, start_s=150.0), At(second=1_000, then=Wanted(prefill=1, decode=3))
    day = run_day(steady(np.ones(DAY_S)), plant, scaler)
    assert scaler.seen[1_149] == (1, 1)
    assert scaler.seen[1_151] == (1, 3)
    assert day.gpu_hours == pytest.approx(GANG_RANKS * (2 * DAY_S + 2 * (DAY_S - 1_000)) / 3600)


def test_the_gangs_that_are_named_go_first_and_hold_their_gpus_for_a_while() -> None:
    pool = Pool(name="decode")
    pool.begin(3)
    pool.want(5, 10.0, PLANT)
    pool.want(2, 20.0, PLANT, ("decode-0", "prefill-1", "decode-4"))
    assert [gang.name for gang in pool.gangs] == ["decode-1", "decode-2"]
    assert (pool.num_ready, pool.num_held) == (2, 5)
    pool.tick(20.0 + PLANT.leave_s)
    assert pool.num_held == 2


def test_weights_take_their_time_and_two_minutes_at_least() -> None:
    demand = steady(np.ones(DAY_S))
    assert Plant.of(demand, COSTS, load_bytes_per_s=1e9).start_s == 689.0
    assert Plant.of(demand, COSTS, load_bytes_per_s=1e12).start_s == 120.0


def test_serves_own_policy_waits_before_it_scales_whole_gangs() -> None:
    """16 ongoing requests a gang are wanted; 48 ask for three gangs, which come after 30 s of asking."""
    serve = ServeDefault(prefill_target=1.0, decode_target=2.0, begins_with=Wanted(prefill=1, decode=1), max_gangs=9)
    state = State(now_s=0.0, prefill=Pool(name="prefill"), decode=Pool(name="decode"), num_running=48.0)
    state.prefill.begin(1)
    state.decode.begin(1)
    wanted: dict[float, int] = {}
    for now_s in range(0, 2_000, 5):
        state.now_s = float(now_s)
        state.num_running = 48.0 if now_s < 1_000 else 1.0
        wanted[now_s] = serve.look(state, PLANT).decode
        state.decode.want(wanted[now_s], state.now_s, replace(PLANT, start_s=0.0))
    assert (wanted[25], wanted[30], wanted[995]) == (1, 3, 3)
    assert (wanted[1_590], wanted[1_700]) == (3, 1), "the mean over 30 s falls, and then 600 s pass"


def waves() -> Demand:
    """Quiet at 10 turns a second, and four hours of 60, each reached within 15 minutes."""
    since = np.arange(DAY_S) % (6 * 3600) - 3 * 3600
    share = np.clip(1.0 - np.abs(since) / 1_800, 0.0, 0.5) * 2
    return steady(np.round(10 + 50 * share))


def own() -> Own:
    limits = Limits(at_least=1, at_most=40, ranks_per_gang=GANG_RANKS)
    return Own(slo=Slo(prefill=limits, decode=limits), begins_with=Wanted(prefill=3, decode=2), every_s=15)


def test_the_systems_own_policy_follows_the_day() -> None:
    demand, plant, target_s = waves(), replace(PLANT, append_share=Slo().append_share), 2.0
    day = run_day(demand, plant, own())
    most = run_day(demand, plant, Fixed(prefill=6, decode=2))
    assert most.met(target_s) == 1.0
    assert run_day(demand, plant, Fixed(prefill=5, decode=2)).met(target_s) < 0.95
    assert day.met(target_s) >= 0.99
    assert day.gpu_hours < 0.7 * most.gpu_hours


def test_the_smallest_static_fleet_is_the_smallest() -> None:
    def meets(prefill: int, decode: int) -> bool:
        return decode >= 11 and 3 * prefill + 2 * decode >= 61

    fleets = [(p + d, p, d) for p in range(30) for d in range(30) if meets(p, d)]
    assert sum(scaling.smallest_static(meets)) == min(fleets)[0]
    assert meets(*scaling.smallest_static(meets))


def day_with(gpu_hours: float, met: float) -> Day:
    p99 = np.where(np.arange(1_000) < 1_000 * met, 1.0, 9.0)
    gangs = np.full(3600, gpu_hours / GANG_RANKS)
    return Day(series={"gangs": gangs}, first_token_s=np.ones(1), p99_by_minute=p99)


def test_the_best_of_a_grid_meets_the_target_at_the_least_cost() -> None:
    good, dear, cheap = day_with(10, 0.995), day_with(20, 1.0), day_with(5, 0.9)
    assert good.gpu_hours == pytest.approx(10.0)
    assert scaling.best([("dear", dear), ("good", good), ("cheap", cheap)], 2.0)[0] == "good"
    assert scaling.best([("worse", day_with(1, 0.5)), ("cheap", cheap)], 2.0)[0] == "cheap"


def test_the_verdicts_say_what_does_not_hold() -> None:
    def row(way: str, gpu_hours: float, met: float) -> dict[str, str | int | float]:
        return {"way": way, "seed": 1, "gpu_hours": gpu_hours, "minutes_met": met}

    rows = [row("smallest static", 100.0, 0.99), row("own", 60.0, 0.995), row("best of Serve", 70.0, 0.99)]
    assert all(line.count("holds") == 1 for line in scaling.verdicts(rows))
    rows[1] = row("own", 80.0, 0.98)
    assert all("DOES NOT HOLD" in line for line in scaling.verdicts(rows))
    assert not math.isnan(sum(float(one["gpu_hours"]) for one in rows))
