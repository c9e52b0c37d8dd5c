"""What the fleet measures, and how it empties gangs."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import Future

import pytest

from harness.fleet_samples import Clock, gang, peer, rank
from seamount.cluster.fleet_draining import GangDrains
from seamount.cluster.fleet_meter import Meter, router_load
from seamount.cluster.fleet_plan import Cause, Phase
from seamount.cluster.load import RouterLoad
from seamount.router.directory import Role
from seamount.v1 import admin_pb2
from seamount.wire.errors import FailedPrecondition, NotFound
from seamount.wire.ids import RankId

# ---- Meter


def test_a_gangs_load_is_the_sum_of_its_ranks() -> None:
    ranks = [
        rank("decode-3-abc.0", num_free_pages=40, num_cached_pages=30, num_leased_pages=10, prefill_tokens_per_s=500.0),
        rank("decode-3-abc.1", num_free_pages=100, num_running=2, num_places=8, prefill_tokens_per_s=700.0),
    ]
    (load, starting) = Meter(Clock()).gangs(
        [gang(3), gang(4, phase=Phase.STARTING), gang(5, phase=Phase.LEAVING)], ranks
    )
    assert (load.name, load.is_ready, load.num_ranks, load.num_pages) == ("decode-3", True, 2, 200)
    assert (load.num_held_pages, load.num_cached_pages) == (40, 20)
    assert (load.num_running, load.num_places, load.prompt_tokens_per_s) == (2, 8, 1200.0)
    assert (starting.name, starting.is_ready) == ("decode-4", False)


def test_prompt_tokens_count_as_they_come_whether_computed_or_queued() -> None:
    meter = Meter(clock := Clock())
    for computed, queued in ((1000, 0), (1000, 500), (1400, 300), (1700, 0)):
        meter.gangs([gang(0)], [rank("decode-0-a.0", num_computed_tokens=computed, num_queued_prefill_tokens=queued)])
        clock.now_s += 1.0
    assert meter.num_prompt_tokens == 700
    meter.gangs([gang(0)], [rank("decode-0-b.0", num_computed_tokens=50)])  # a rank anew: nothing has come by that
    assert meter.num_prompt_tokens == 700


def test_the_time_between_tokens_is_measured_while_no_prompt_is_computed() -> None:
    meter = Meter(clock := Clock())

    def seen(sampled: int, *, running: int = 4, queued: int = 0) -> float:
        state = {"num_sampled_tokens": sampled, "num_running": running, "num_queued_prefill_tokens": queued}
        (load,) = meter.gangs([gang(0)], [rank("decode-0-a.0", **state)])
        clock.now_s += 1.0
        return load.inter_token_s

    assert seen(0) == 0.0
    assert seen(100) == pytest.approx(0.04)  # 4 answers, 100 tokens a second
    assert seen(110, queued=900) == pytest.approx(0.04)
    assert seen(120) == pytest.approx(0.04)  # a prompt was under way at the look before
    assert seen(320) == pytest.approx(0.04 + 0.3 * (0.02 - 0.04))


def test_a_router_of_another_release_may_say_nothing() -> None:
    record = peer("router-1", Role.ROUTER)
    said = admin_pb2.RouterState(num_streams=7, cores=0.5).SerializeToString()
    assert router_load(record, said) == RouterLoad(name="router-1", num_streams=7, cores=0.5)
    assert router_load(record, b"") == RouterLoad(name="router-1")
    assert router_load(record, b"\xff\xff") == RouterLoad(name="router-1")


# ---- GangDrains


class Ranks:
    """Answers drains as a test wants it; ``asked``: rank, seconds for turns, excluded."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, frozenset[RankId]]] = []
        self.answers: dict[str, list[admin_pb2.DrainRankResponse | Exception]] = {}
        self.told = threading.Event()

    def drain(
        self, rank_id: RankId, *, deadline_s: float, turns_s: float, excluded: Collection[RankId]
    ) -> Future[admin_pb2.DrainRankResponse]:
        self.asked.append((rank_id, turns_s, frozenset(excluded)))
        answers = self.answers.get(rank_id, [])
        answer = answers.pop(0) if answers else admin_pb2.DrainRankResponse(is_empty=True)
        told: Future[admin_pb2.DrainRankResponse] = Future()
        if isinstance(answer, Exception):
            told.set_exception(answer)
        else:
            told.set_result(answer)
        return told


RANKS = [rank("decode-0-a.0"), rank("decode-0-a.1"), rank("decode-1-b.0"), rank("decode-2-c.0")]


def begin(drains: GangDrains, name: str, *, timeout_s: float = 60.0) -> None:
    drains.begin(name, Cause.SCALE_DOWN, RANKS, turns_s=5.0, timeout_s=timeout_s, excluded_gangs={"decode-2"})


def test_every_rank_of_a_gang_is_drained_to_those_that_stay() -> None:
    ranks = Ranks()
    drains = GangDrains(ranks, clock := Clock())
    nobody = FailedPrecondition("nobody is there", reason="NO_OTHER_RANK")
    defect, gone = ValueError("not a typed error"), NotFound("gone", reason="RANK_NOT_FOUND")
    ranks.answers["decode-0-a.1"] = [nobody, defect, admin_pb2.DrainRankResponse(), gone]
    begin(drains, "decode-0")
    begin(drains, "decode-0")
    ended = until_ended(drains)
    assert [(one.name, one.is_empty) for one in ended] == [("decode-0", True)]
    asked = [rank_id for rank_id, _, _ in ranks.asked]
    assert (asked.count("decode-0-a.0"), asked.count("decode-0-a.1")) == (1, 4)
    assert all(excluded == {"decode-0-a.0", "decode-0-a.1", "decode-2-c.0"} for _, _, excluded in ranks.asked)
    assert "decode-0" in drains
    drains.forget("decode-0")
    assert "decode-0" not in drains
    assert clock.now_s == 100.0
    drains.stop()


def test_a_gang_that_cannot_be_emptied_goes_when_its_time_is_over() -> None:
    ranks = Ranks()
    drains = GangDrains(ranks, clock := Clock())
    ranks.answers["decode-1-b.0"] = [FailedPrecondition("nobody is there", reason="NO_OTHER_RANK")] * 1000
    begin(drains, "decode-1", timeout_s=50.0)
    assert drains.ended() == []
    drains.hasten("decode-1", timeout_s=20.0)
    clock.now_s += 21.0
    (ended,) = drains.ended()
    assert (ended.is_empty, ended.cause, ended.took_s) == (False, Cause.SCALE_DOWN, 21.0)
    drains.stop()


def until_ended(drains: GangDrains) -> list:
    waited = threading.Event()
    for _ in range(200):
        if ended := drains.ended():
            return ended
        waited.wait(0.05)
    raise AssertionError("not ended")
