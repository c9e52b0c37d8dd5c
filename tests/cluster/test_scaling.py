"""Decisions of the scaling policy, by table and in small runs of virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from seamount.cluster.load import Decision, GangLoad, History, Limits, RouterLoad, Slo, Snapshot, StepTimes
from seamount.cluster.moving import losing_s
from seamount.cluster.scaling import decide

SLO = Slo(
    first_token_s=2.0,
    inter_token_s=0.05,
    prefill=Limits(at_least=0, at_most=8),
    decode=Limits(at_least=1, at_most=8),
    routers=Limits(at_least=1, at_most=4),
    flow_window_s=20.0,
    grow_after_s=2.0,
    shrink_after_s=30.0,
)


def decode(number: int, **changes: Any) -> GangLoad:
    """An idle gang of 1,000 pages that computes 1,000 prompt tokens a second."""
    gang = GangLoad(name=f"decode-{number}", pool="decode", num_pages=1_000, prompt_tokens_per_s=1_000.0)
    return replace(gang, **({"kv_bytes_per_token": 50_000, "link_bytes_per_s": 1e9} | changes))


def prefill(number: int, **changes: Any) -> GangLoad:
    gang = GangLoad(name=f"prefill-{number}", pool="prefill", num_pages=1_000, prompt_tokens_per_s=10_000.0)
    return replace(gang, **changes)


def settled(
    gangs: list[GangLoad], *, flow: float = 0.0, slo: Slo = SLO, for_s: float = 60.0, start_s: float = 10.0
) -> Decision:
    """The decision after the gangs have looked like this for a while, with ``flow`` prompt tokens a second."""
    history = History()
    now_s = 0.0
    while True:
        snapshot = Snapshot(
            now_s=now_s,
            gangs=tuple(gangs),
            routers=(RouterLoad(name="router-0"),),
            num_prompt_tokens=round(flow * now_s),
            prefill_start_s=start_s,
            decode_start_s=start_s,
            history=history,
        )
        decision = decide(snapshot, slo)
        if now_s >= for_s:
            return decision
        history = decision.history
        now_s += 1.0


@pytest.mark.parametrize(
    ("gangs", "flow", "wanted"),
    [
        pytest.param([decode(0)], 0, (0, 1), id="idle: the least"),
        pytest.param([decode(0), prefill(0)], 0, (0, 1), id="idle: prefill goes to zero"),
        pytest.param([decode(0)], 150, (0, 1), id="a little is appended locally"),
        pytest.param([decode(0)], 1_000, (2, 1), id="more than append_share: prefill, taken to be as fast as decode"),
        pytest.param([decode(0), prefill(0)], 6_000, (1, 1), id="within a gang's utilisation"),
        pytest.param([decode(0), prefill(0)], 20_000, (3, 1), id="20,000 / 0.7 - 250 over 10,000"),
        pytest.param([decode(0), prefill(0), prefill(1)], 6_000, (2, 1), id="no room below the bound: none goes"),
        pytest.param([decode(0), prefill(0), prefill(1)], 4_000, (1, 1), id="room below the bound: one goes"),
        pytest.param([decode(0), prefill(0)], 200_000, (8, 1), id="at most"),
        pytest.param([decode(0, num_held_pages=790)], 0, (0, 1), id="790 pages of 1,000 fit into 0.8"),
        pytest.param([decode(0, num_held_pages=900)], 0, (0, 2), id="900 do not"),
        pytest.param(
            [decode(0, num_held_pages=700), prefill(0, num_held_pages=700)], 0, (0, 1), id="prefill's are its own"
        ),
        pytest.param([decode(n, num_held_pages=900) for n in range(3)], 0, (0, 4), id="2,700 / 800"),
        pytest.param([decode(n, num_held_pages=420) for n in range(2)], 0, (0, 2), id="840 / 640: two stay"),
        pytest.param([decode(n, num_held_pages=300) for n in range(2)], 0, (0, 1), id="600 / 640: one goes"),
        pytest.param([decode(0, num_running=4, num_blocked=4)], 0, (0, 2), id="half of the answers wait"),
        pytest.param([decode(0, num_running=3, num_blocked=1, num_places=6)], 0, (0, 1), id="they wait at one rank"),
        pytest.param(
            [decode(0, num_held_pages=600, num_running=2, num_blocked=2, num_places=99)], 0, (0, 2), id="for pages"
        ),
        pytest.param([decode(0, num_running=6, num_places=8)], 0, (0, 1), id="6 of 8 places"),
        pytest.param([decode(0, num_running=7, num_places=8)], 0, (0, 2), id="7 of 8 places"),
        pytest.param([decode(n, num_running=3, num_places=8) for n in range(2)], 0, (0, 2), id="6 / 5.12: two stay"),
        pytest.param([decode(0, num_running=9, inter_token_s=0.12)], 0, (0, 3), id="0.12 s against 0.05 s"),
        pytest.param([decode(0, num_running=1, inter_token_s=0.12)], 0, (0, 1), id="one answer has nobody to share"),
        pytest.param(
            [decode(n, num_running=9, inter_token_s=0.045) for n in range(2)], 0, (0, 2), id="near the target: stay"
        ),
        pytest.param(
            [decode(n, num_running=9, inter_token_s=0.015) for n in range(2)], 0, (0, 1), id="far below it: one goes"
        ),
        pytest.param(
            [decode(0, num_held_pages=900), decode(1, is_ready=False)], 0, (0, 2), id="one that starts counts"
        ),
    ],
)
def test_settled_load(gangs: list[GangLoad], flow: float, wanted: tuple[int, int]) -> None:
    decision = settled(gangs, flow=flow)
    assert (decision.prefill, decision.decode) == wanted
    assert len(decision.drain) == max(0, len(gangs) - sum(wanted))


def test_four_long_prompts_scale_prefill_and_not_decode() -> None:
    busy = decode(0, num_running=4, num_queued_tokens=40_000, inter_token_s=0.4)
    decision = settled([busy], for_s=3.0)
    assert (decision.prefill, decision.decode) == (4, 1)  # one a prompt: no more could share the work


def test_a_queue_that_is_gone_before_a_gang_could_start_starts_none() -> None:
    gangs = [decode(0), prefill(0, num_running=9, num_queued_tokens=300_000)]
    assert settled(gangs, for_s=3.0, start_s=2.0).prefill == 3
    assert settled(gangs, for_s=3.0, start_s=20.0).prefill == 1
    assert settled(gangs, for_s=60.0, start_s=20.0).prefill == 1  # and it stays until the queue is gone


def test_without_prefill_gangs_decode_gangs_compute_everything() -> None:
    slo = replace(SLO, prefill=Limits(at_least=0, at_most=0))
    assert settled([decode(0)], flow=700, slo=slo).decode == 1
    assert settled([decode(0)], flow=2_000, slo=slo).decode == 3
    assert settled([decode(0, num_running=2, inter_token_s=0.1)], slo=slo).decode == 2


def test_while_nothing_is_measured_the_first_prompt_starts_one() -> None:
    new = decode(0, prompt_tokens_per_s=0.0)
    assert settled([new]).prefill == 0
    assert settled([replace(new, num_queued_tokens=5)]).prefill == 1


def test_a_moment_of_load_starts_nothing_and_a_moment_without_ends_nothing() -> None:
    full, idle = decode(0, num_held_pages=2_000), decode(0)
    assert played([lambda t: [full] if t % 3 == 0 else [idle]]) == [1]
    two = [replace(idle, name=f"decode-{n}", num_held_pages=700) for n in range(2)]
    assert played([lambda t: two if t % 20 == 0 else [decode(0), decode(1)]]) == [2]


def test_what_a_gang_costs_to_start_delays_its_end() -> None:
    gangs = [decode(0), decode(1)]
    assert settled(gangs, for_s=60, start_s=10).decode == 1
    assert settled(gangs, for_s=60, start_s=100).decode == 2
    assert settled(gangs, for_s=110, start_s=100).decode == 1


def test_rising_load_is_met_before_it_is_there() -> None:
    """Held pages grow by 10 a second, a gang takes 30 s: 560 pages now are 860 then."""
    history, decision = History(), None
    for now_s in range(57):
        gang = decode(0, num_held_pages=10 * now_s)
        snapshot = Snapshot(now_s=now_s, gangs=(gang,), decode_start_s=30.0, prefill_start_s=30.0, history=history)
        decision = decide(snapshot, SLO)
        history = decision.history
    assert decision is not None
    assert decision.decode == 2


def played(load: list[Callable[[int], list[GangLoad]]]) -> list[int]:
    """Wanted decode gangs that were ever seen over 200 s of a load by time."""
    history, seen = History(), set()
    for now_s in range(200):
        snapshot = Snapshot(now_s=now_s, gangs=tuple(load[0](now_s)), decode_start_s=5.0, history=history)
        decision = decide(snapshot, SLO)
        history = decision.history
        seen.add(decision.decode)
    return sorted(seen)


def test_routers_by_streams_and_by_cpu() -> None:
    def wanted(*routers: RouterLoad) -> int:
        history = History()
        for now_s in range(50):
            snapshot = Snapshot(now_s=now_s, gangs=(decode(0),), routers=routers, history=history)
            decision = decide(snapshot, SLO)
            history = decision.history
        return decision.routers

    assert wanted(RouterLoad(name="a", num_streams=10)) == 1
    assert wanted(RouterLoad(name="a", num_streams=1_500)) == 2
    assert wanted(RouterLoad(name="a", num_streams=10, cores=1.5)) == 3
    assert wanted(RouterLoad(name="a", num_streams=900), RouterLoad(name="b", num_streams=10)) == 2
    assert wanted(RouterLoad(name="a", num_streams=400), RouterLoad(name="b", num_streams=10)) == 1


def test_the_gang_that_is_cheapest_to_lose_goes_not_the_newest() -> None:
    gangs = [
        decode(0, num_held_pages=100, num_running=2),
        decode(1, num_cached_pages=80),
        decode(2, num_held_pages=60),
        decode(3, num_cached_pages=300),
    ]
    assert settled(gangs).drain == ("decode-1", "decode-2", "decode-3")
    assert settled([*gangs, decode(4, is_ready=False)]).drain[0] == "decode-4"


def test_a_gang_that_has_measured_nothing_counts_like_its_peers() -> None:
    new = decode(1, num_held_pages=50, link_bytes_per_s=0.0, prompt_tokens_per_s=0.0)
    assert settled([decode(0, num_held_pages=60), new]).drain == ("decode-1",)
    assert settled([decode(0, num_held_pages=40), new]).drain == ("decode-0",)


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        pytest.param({"num_cached_pages": 100}, {"num_held_pages": 100}, id="a lease is wanted for certain"),
        pytest.param({"num_held_pages": 100}, {"num_held_pages": 100, "num_running": 1}, id="an answer runs"),
        pytest.param({"num_held_pages": 100}, {"num_held_pages": 100, "link_bytes_per_s": 1e6}, id="a slow link"),
        pytest.param(
            {"num_held_pages": 100, "link_bytes_per_s": 0.0, "prompt_tokens_per_s": 9_000.0},
            {"num_held_pages": 100, "link_bytes_per_s": 0.0},
            id="sooner computed anew",
        ),
        pytest.param({}, {"num_cached_pages": 1}, id="nothing to lose"),
    ],
)
def test_what_losing_a_gang_costs(cheaper: dict[str, Any], dearer: dict[str, Any]) -> None:
    others = [decode(9)]
    assert losing_s(decode(0, **cheaper), others) < losing_s(decode(0, **dearer), others)


def test_pages_that_find_no_room_elsewhere_are_computed_anew() -> None:
    gang = decode(0, num_held_pages=500)
    roomy, full = decode(1), decode(1, num_held_pages=1_000)
    assert losing_s(gang, [roomy]) == pytest.approx(500 * 64 * 50_000 / 1e9)
    assert losing_s(gang, [full]) == pytest.approx(500 * 64 / 1_000)
    assert losing_s(gang, [replace(roomy, is_ready=False)]) == losing_s(gang, [full])


def test_any_load_whatever_stays_within_limits_and_drains_what_is_there() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(200):
        history, num_tokens = History(), 0
        for now_s in range(0, 100, 5):
            gangs = [_any_gang(draw, n) for n in range(draw.randrange(10))]
            num_tokens += draw.choice([0, 10, 10_000_000])
            snapshot = Snapshot(now_s=now_s, gangs=tuple(gangs), num_prompt_tokens=num_tokens, history=history)
            decision = decide(snapshot, SLO)
            history = decision.history
            assert 0 <= decision.prefill <= 8
            assert 1 <= decision.decode <= 8
            assert 1 <= decision.routers <= 4
            assert set(decision.drain) <= {gang.name for gang in gangs}
            for pool, wanted in (("prefill", decision.prefill), ("decode", decision.decode)):
                present = sum(gang.pool == pool for gang in gangs)
                assert sum(name.startswith(pool) for name in decision.drain) == max(0, present - wanted)


def _any_gang(draw: random.Random, number: int) -> GangLoad:
    pages = draw.choice([0, 2, 1_000])
    return (prefill if draw.random() < 0.5 else decode)(
        number,
        is_ready=draw.random() < 0.8,
        num_pages=pages,
        num_held_pages=draw.randint(0, pages),
        num_cached_pages=draw.choice([0, 5_000]),
        num_running=draw.choice([0, 1, 70]),
        num_blocked=draw.choice([0, 0, 500]),
        num_queued_tokens=draw.choice([0, 1, 1_000_000]),
        prompt_tokens_per_s=draw.choice([0.0, 1e-3, 5e4]),
        inter_token_s=draw.choice([0.0, 1e-6, 3.0]),
        link_bytes_per_s=draw.choice([0.0, 1.0, 1e11]),
    )


def test_a_flow_that_climbs_is_carried_on_until_a_gang_is_up() -> None:
    """f(t) = 100 t tokens/s: at 300 s the window of 20 s measures 29,000, and 31,000 are to come when a gang is up."""
    history, slo = History(), replace(SLO, max_utilisation=1.0)
    for now_s in range(301):
        snapshot = Snapshot(
            now_s=float(now_s),
            gangs=(decode(0), *(prefill(number) for number in range(4))),
            num_prompt_tokens=50 * now_s**2,
            prefill_start_s=10.0,
            history=history,
        )
        decision = decide(snapshot, slo)
        history = decision.history
    assert decision.look.prefill.grow == 4, "31,000 - 250 over 10,000"


def loaded(number: int, num_running: int, base_s: float = 0.02, each_s: float = 0.0005) -> GangLoad:
    return decode(number, num_running=num_running, inter_token_s=base_s + each_s * num_running)


def test_what_an_answer_adds_to_a_step_is_learnt_from_loads_that_differ() -> None:
    """0.02 s a step and 0.5 ms for each answer: at 0.05 s a gang decodes 60 answers."""
    heavy = Snapshot(now_s=0.0, gangs=tuple(loaded(number, 50) for number in range(4)))
    light = Snapshot(now_s=1.0, gangs=tuple(loaded(number, 10) for number in range(4)))
    unknown = decide(light, SLO)
    assert unknown.history.step is None
    assert unknown.look.decode.keep == 3, "4 x 0.025 / 0.05 / 0.8, as if nothing were read for no answer"
    known = decide(replace(light, history=decide(heavy, SLO).history), SLO)
    step = known.history.step
    assert step is not None
    assert (step.base_s, step.each_s) == (pytest.approx(0.02), pytest.approx(0.0005))
    assert known.look.decode.keep == 1, "40 / 60 / 0.8"
    later = decide(replace(light, now_s=1e4, history=known.history), SLO)
    assert later.look.decode.keep == 1, "it stays known"


def test_step_times_that_were_learnt_wrongly_do_not_hide_a_missed_target() -> None:
    history = History(step=StepTimes(base_s=0.0, each_s=1e-6))
    missed = Snapshot(now_s=0.0, gangs=tuple(loaded(number, 80) for number in range(3)), history=history)
    assert decide(missed, SLO).look.decode.grow == 4, "3 x 0.06 / 0.05"
