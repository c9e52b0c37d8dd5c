"""The simulator: the same seed gives the same turns, no page is lost, traces worked out by hand, the future helps."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from array import array
from collections.abc import Iterable
from dataclasses import replace

import pytest

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import StepCosts, h100_costs
from benchmarks.simulation.mooncake import ANSWER_S_PER_TOKEN, BLOCK_TOKENS, parse_requests, plans_of
from benchmarks.simulation.orders import share_over
from benchmarks.simulation.scenario import Order, Outcome, Scenario, agents, simulate
from benchmarks.simulation.sessions import Session
from benchmarks.simulation.traffic import SUBAGENT, Generator, Plan, Step
from seamount.router.history import common_len
from seamount.wire.errors import InvalidArgument
from seamount.workers.cache import eviction_order
from seamount.workers.cache.retention import Candidate, Tier
from seamount.workers.scheduler import EngineLimits

COSTS = StepCosts(
    base_s=0.0,
    decode_base_s=0.01,
    decode=((0.0, 0.0),),
    prefill=((0.0, 0.001),),
    kv_bytes_per_token=1,
    turn_s=0.5,
    host_tokens_per_s=1_000.0,
    disk_tokens_per_s=100.0,
    restore_s=0.25,
)
"""A prompt token takes 1 ms, a decode step 10 ms, a turn 0.5 s besides, a restore 0.25 s and 1 ms a token."""
SMALL = Scenario(
    costs=COSTS,
    page_size=64,
    device_pages=64,
    limits=EngineLimits(max_batch_tokens=4_096, max_running=8, prefill_chunk_tokens=1_024),
    until_s=1e4,
    warm_s=0.0,
    start_within_s=0.0,
)


def step(num_appended: int, wait_s: float, num_output: int = 11, **more: object) -> Step:
    text = more.pop("text", None)
    assert text is None or isinstance(text, array)
    return Step(
        tool="read", wait_s=wait_s, num_appended=num_appended, num_reasoning=0, num_output=num_output, text=text
    )


def texts(number: int, lengths: list[int], num_output: int = 11) -> list[array[int]]:
    """Prompts of session ``number``: each begins with the one before and its answer."""
    first, fresh, text, made = number << 21, itertools.count((number << 21) + (1 << 20)), array("I"), []
    for index, length in enumerate(lengths):
        if index:
            start = first + (index - 1) * num_output
            text = text + array("I", range(start, start + num_output))
        text = text + array("I", itertools.islice(fresh, length - len(text)))
        made.append(text)
    return made


def plan(number: int, lengths: list[int], waits_s: list[float]) -> Plan:
    prompts = texts(number, lengths)
    known = [0, *(len(prompt) + 11 - 1 for prompt in prompts)]  # the last sampled token is never fed back
    steps = [
        step(len(text) - num_known, wait_s, text=text)
        for text, num_known, wait_s in zip(prompts, known[:-1], waits_s, strict=True)
    ]
    return Plan(agent=0, steps=tuple(steps), starts_after_s=waits_s[0])


def run(scenario: Scenario, plans: list[Plan]) -> Outcome:
    return simulate(scenario, [iter([one]) for one in plans])


def test_events_come_in_order_of_time_and_ties_in_order_of_arrival() -> None:
    clock, seen = Clock(), list[tuple[str, float]]()
    for name, time_s in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("never", 9.0)):
        clock.at(time_s, lambda name=name: seen.append((name, clock.now)))  # type: ignore[misc]
    clock.at(1.0, lambda: clock.at(0.0, lambda: seen.append(("late", clock.now))))
    clock.run(5.0)
    assert seen == [("a", 1.0), ("b", 1.0), ("late", 1.0), ("c", 2.0)]
    assert clock.next_s == 9.0


def test_a_trace_worked_out_by_hand() -> None:
    """One session, alone: 640 tokens come after 1 s; the next turn's prompt has 189 more than it and its answer."""
    outcome = run(SMALL, [plan(1, [640, 840], [1.0, 3.0])])
    first, second = outcome.turns
    assert (first.came_at, first.num_prompt, first.num_cached) == (1.0, 640, 0)
    assert first.first_token_s == pytest.approx(0.5 + 0.640)
    assert first.ended_at == pytest.approx(1.0 + 0.5 + 0.640 + 10 * 0.010)
    assert second.came_at == pytest.approx(first.ended_at + 3.0)
    assert (second.num_cached, second.num_restored) == (650, 0), "the last token of the answer was never fed back"
    assert second.first_token_s == pytest.approx(0.5 + 0.190)
    assert (second.num_recomputed, first.num_recomputed) == (0, 0)


def test_what_has_left_the_device_comes_back_from_the_host_by_hand() -> None:
    """20 pages; the second session's 16 push out all but the first 3 pages of the first one's 10 and its tail."""
    scenario = replace(SMALL, device_pages=20, host_pages=100)
    outcome = run(scenario, [plan(1, [640, 840], [1.0, 60.0]), plan(2, [1_000], [30.0])])
    back = next(turn for turn in outcome.turns if turn.session == "s1" and turn.num_prompt == 840)
    assert back.num_cached == 640, "the tail of 10 tokens lives on the device only"
    assert 0 < back.num_restored <= 640
    assert back.num_recomputed == 650 - 640
    restored_s = 0.25 + back.num_restored / 1_000.0
    assert back.first_token_s == pytest.approx(max(0.5, restored_s) + 0.200, abs=1e-6)
    without = run(replace(scenario, host_pages=0), [plan(1, [640, 840], [1.0, 60.0]), plan(2, [1_000], [30.0])])
    lost = next(turn for turn in without.turns if turn.session == "s1" and turn.num_prompt == 840)
    assert lost.num_recomputed == 650 - lost.num_cached > back.num_recomputed


def test_sequences_share_steps() -> None:
    """Two prompts of 1,000 come together: chunks alternate, and both decode in the same steps."""
    outcome = run(SMALL, [plan(1, [1_000], [1.0]), plan(2, [1_000], [1.0])])
    ends = sorted(turn.ended_at for turn in outcome.turns)
    assert ends[1] == pytest.approx(1.0 + 0.5 + 2.0 + 10 * 0.010)
    assert all(turn.first_token_s == pytest.approx(2.5) for turn in outcome.turns), "one step computed both"


def traffic(num_sessions: int, seed: int) -> list[Iterable[Plan]]:
    return agents(num_sessions, seed=seed, max_context_tokens=32_768)


AGENTS = Scenario(
    costs=h100_costs(prefill_gpus=4),
    page_size=512,
    device_pages=160,
    host_pages=200,
    limits=EngineLimits(max_batch_tokens=8_192, max_running=32, prefill_chunk_tokens=4_096),
    until_s=900.0,
    warm_s=300.0,
    start_within_s=300.0,
)


def told(outcome: Outcome) -> list[tuple[object, ...]]:
    return [
        (turn.session, turn.came_at, turn.num_cached, turn.num_restored, turn.first_token_s) for turn in outcome.turns
    ]


def test_the_same_seed_gives_the_same_turns_and_all_pages_are_kept_account_of() -> None:
    outcome, again = (simulate(AGENTS, traffic(6, 3)) for _ in range(2))
    assert len(outcome.turns) > 20
    assert str(told(outcome)) == str(told(again))
    assert str(told(outcome)) != str(told(simulate(AGENTS, traffic(6, 4))))
    placed = [turn for turn in outcome.system.turns if math.isnan(turn.ended_at) and turn.rank]
    (rank,) = outcome.system.ranks.values()
    assert rank.caches.state().num_reservations == len(placed), "all others gave their pages back"
    rank.caches.check_invariants()


def test_whoever_knows_the_future_recomputes_least() -> None:
    """Belady's bound: three sessions come in turn, at times that are known, and two of them fit."""
    lengths = [1_100, 1_200, 1_300, 1_400]
    plans = [plan(number, lengths, [10.0 * number, 40.0, 20.0 * number, 40.0]) for number in (1, 2, 3)]
    recomputed = {}
    for order in ("belady", "system", "lru"):
        scenario = replace(SMALL, device_pages=50, order=order, leases=False)  # type: ignore[arg-type]
        turns = run(scenario, plans).turns
        assert len(turns) == 12
        recomputed[order] = sum(turn.num_recomputed for turn in turns)
    assert recomputed["belady"] <= recomputed["system"] + 64, "it counts pages: a tail is one, however full"
    assert recomputed["belady"] < recomputed["lru"]


@pytest.mark.parametrize("order", ["belady", "distribution"])
def test_an_order_to_compare_with_decides_in_every_tier(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    def own_order(page: Candidate) -> tuple[int, float]:
        raise AssertionError("the system's own order was asked")

    monkeypatch.setattr(eviction_order, "eviction_key", own_order)
    outcome = simulate(replace(AGENTS, order=order, leases=False), traffic(6, 3))
    (rank,) = outcome.system.ranks.values()
    counts = rank.caches.tiers.counts()
    assert counts[Tier.DEVICE].num_evicted > 0
    assert counts[Tier.HOST].num_evicted > 0


def test_made_up_sessions_are_like_the_measured_ones() -> None:
    generator = Generator(seed=1, max_context_tokens=1 << 20)
    plans = [generator.plan() for _ in range(400)]
    requests = sorted(sum(not one.tool for one in plan.steps) for plan in plans)
    assert (requests[len(requests) // 4], requests[len(requests) // 2]) == (1, 1)
    assert share_over(1) == pytest.approx(requests.count(1) / len(requests), abs=0.1)
    assert 12 <= requests[int(0.9 * len(requests))] <= 24
    assert 7 <= statistics.mean(requests) <= 12
    tool_steps = [sum(bool(one.tool) for one in plan.steps) for plan in plans]
    assert 6 <= sum(tool_steps) / sum(requests) <= 9.5
    steps = [one for plan in plans for one in plan.steps]
    assert 400 <= statistics.mean(one.num_reasoning + one.num_output for one in steps) <= 650
    assert 0.3 <= statistics.mean(any(one.tool == SUBAGENT for one in plan.steps) for plan in plans) <= 0.6
    waits = sorted(one.wait_s for one in steps if one.tool and one.tool != SUBAGENT)
    assert 0.75 <= sum(wait < 10 for wait in waits) / len(waits) <= 0.9
    assert waits[0] >= 0.1
    assert waits[-1] > 120


def test_a_question_cuts_reasoning_and_a_reset_leaves_the_first_question() -> None:
    steps = (
        Step(tool="", wait_s=1.0, num_appended=10, num_reasoning=3, num_output=2),
        Step(tool="read", wait_s=1.0, num_appended=5, num_reasoning=3, num_output=2),
        Step(tool="", wait_s=1.0, num_appended=7, num_reasoning=3, num_output=2),
        Step(tool="read", wait_s=1.0, num_appended=0, num_reasoning=3, num_output=2, resets=True),
    )
    session = Session(number=1, plan=Plan(agent=0, steps=steps), kept=array("I", range(100)))
    lengths, commons, expected = [], [], []
    for _ in steps:
        before = session.context
        reuse_len = session.reuse_len() if before else 0
        prompt, _ = session.prompt()
        lengths.append(len(prompt))
        commons.append(common_len(before, prompt))
        expected.append(reuse_len)
        session.answered(prompt, session.fresh(5))
    assert lengths == [110, 120, 100 + 10 + 2 + 5 + 2 + 7, 110]
    assert commons == expected == [0, 115, 110, 110]


def requests(*lines: tuple[float, int, list[int]]) -> list[str]:
    return [
        json.dumps({"timestamp": 1e3 * at, "input_length": length, "output_length": 100, "hash_ids": ids})
        for at, length, ids in lines
    ]


def test_a_mooncake_trace_becomes_sessions_with_their_think_time() -> None:
    lines = requests(
        (10.0, 1_100, [1, 2, 3]),
        (13.0, 600, [1, 4]),  # shares a block, and goes its own way
        (25.0, 2_000, [1, 2, 5, 6]),  # goes on behind the first one's full blocks
        (60.0, 2_100, [1, 2, 5, 7, 8]),
    )
    first, second = plans_of(parse_requests(lines))
    assert (first.starts_after_s, second.starts_after_s) == (0.0, 3.0)
    assert [len(one.steps) for one in (first, second)] == [3, 1]
    assert [one.num_appended for one in first.steps] == [1_100, 2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS]
    assert first.steps[1].wait_s == pytest.approx(15.0 - 100 * ANSWER_S_PER_TOKEN)
    prompts = [one.text for one in first.steps if one.text is not None]
    assert [len(prompt) for prompt in prompts] == [1_100, 2_000, 2_100]
    assert [common_len(one, other) for one, other in itertools.pairwise(prompts)] == [1_024, 1_536]
    outcome = run(SMALL, [first, second])
    assert [(turn.session, turn.num_cached) for turn in outcome.turns] == [
        ("s1", 0),
        ("s2", 512),
        ("s1", 1_024),
        ("s1", 1_536),
    ]


@pytest.mark.parametrize(
    ("line", "named"),
    [("{", "line 1"), ("{}", "line 1"), (requests((0.0, 1_000, [1]))[0], "hash_ids"), ("[1]", "line 1")],
)
def test_what_is_no_such_trace_is_refused(line: str, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        parse_requests([line])


def test_v32_on_h100_costs_what_its_kernels_cost() -> None:
    costs = h100_costs()
    prefill_s = costs.step_s([], [(0, 4_096)])
    assert 0.3 < prefill_s < 1.5
    assert costs.step_s([], [(100_000, 104_096)]) > 1.3 * prefill_s
    assert h100_costs(prefill_gpus=4).step_s([], [(0, 4_096)]) == pytest.approx(prefill_s / 4)
    assert costs.step_s([1_000] * 8, []) < costs.step_s([100_000] * 8, []) < 2 * costs.step_s([1_000] * 8, [])
    assert costs.step_s([], []) == 0.0
