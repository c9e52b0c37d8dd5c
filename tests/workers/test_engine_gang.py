"""Engines of one gang, experts split over them: lock-step, idling and waking, leaving, a lost peer."""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from seamount.wire.errors import SeamountError, Unavailable
from seamount.workers.experts.dispatch import GangExperts
from seamount.workers.gang import Gang
from seamount.workers.requests import SamplingParams

GROUP_TIMEOUT_S = 2.0
NUM_EXPERTS = 4


@pytest.fixture
def make_gang(
    make_rank: Callable[..., Any], sharded_model: Callable[..., Any], form_gang: Callable[..., list[Gang]]
) -> Iterator[Callable[..., list[Any]]]:
    """Makes the started ranks of a gang in this process, each with its share of the experts."""
    gangs: list[list[Any]] = []

    def make(size: int = 2, **settings: Any) -> list[Any]:
        members = form_gang(size, GROUP_TIMEOUT_S)
        ranks = []
        for gang in members:
            assert gang.group is not None
            model = sharded_model(GangExperts(gang.group, NUM_EXPERTS))
            ranks.append(make_rank(model=model, gang=gang, num_pages=100, **settings))
        gangs.append(ranks)
        return ranks

    yield make
    for ranks in gangs:
        stop_together(ranks)


def stop_together(ranks: list[Any]) -> None:
    threads = [threading.Thread(target=rank.engine.stop, daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    return [
        [rng.randrange(131) for _ in range(rng.choice([1, 63, 64, 65, rng.randrange(2, 150)]))] for _ in range(count)
    ]


def test_ranks_of_a_gang_give_the_tokens_of_a_single_one(
    make_rank: Callable[..., Any], make_gang: Callable[..., list[Any]], rng: random.Random
) -> None:
    work = [
        (ids, SamplingParams(seed=rng.randrange(1 << 64), temperature=rng.choice([0.0, 1.0]), max_output_tokens=8))
        for ids in prompts(rng, 12)
    ]
    single = make_rank(num_pages=200)
    expected = [single.generate(ids, params) for ids, params in work]
    ranks = make_gang(chunk=32)
    clients = [ranks[rng.randrange(2)].ask(ids, params) for ids, params in work]
    for client in clients:
        client.finished()
    assert [client.token_ids for client in clients] == expected


def test_a_rank_without_work_steps_along_then_all_rest(make_gang: Callable[..., list[Any]], rng: random.Random) -> None:
    first, second = make_gang()
    client = first.ask([1, 2, 3], SamplingParams(max_output_tokens=20))
    client.finished()
    time.sleep(0.1)
    counts = [rank.engine.state().num_steps for rank in (first, second)]
    assert counts == [20, 20]
    assert second.engine.state().num_computed_tokens == 0
    cpu = time.process_time()
    time.sleep(0.3)
    assert [rank.engine.state().num_steps for rank in (first, second)] == counts
    assert time.process_time() - cpu < 0.15


def test_first_token_after_idling(make_gang: Callable[..., list[Any]]) -> None:
    ranks = make_gang()
    times = []
    for number in range(30):
        rank = ranks[number % 2]
        start = time.perf_counter()
        client = rank.ask([number, 5], SamplingParams(max_output_tokens=1))
        assert client.first_token.wait(10)
        times.append(time.perf_counter() - start)
        client.finished()
        rank.reservations.release(client.reservation.id)
        time.sleep(0.002)
    print(f"first token {statistics.median(times) * 1e3:.1f} ms after idling (median)")
    assert statistics.median(times) < 0.5


def test_a_peers_stream_narrows_the_prompt_chunks(make_gang: Callable[..., list[Any]], rng: random.Random) -> None:
    first, second = make_gang(chunk=10, max_batch_tokens=64)
    stream = first.ask([1, 2], SamplingParams(max_output_tokens=3000))
    assert stream.first_token.wait(10)
    long = [second.ask([rng.randrange(131) for _ in range(100)], None) for _ in range(3)]
    for client in long:
        client.finished()
    assert all(sorted({*client.progress} - {0}) == list(range(10, 101, 10)) for client in long)
    before = second.engine.state().num_steps
    assert before >= 30, "three prompts of ten chunks, one chunk a step"
    first.engine.abort(stream.reservation.id)
    stream.finished()


class Unreadable(list[int]):
    """Grows like any list: the step under way as it is put in place ends well."""

    def __getitem__(self, place: Any) -> Any:
        raise ValueError("unreadable")


def test_failures_of_one_rank_leave_its_peer_alone(
    make_gang: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_gang()
    steady = second.ask([4, 5, 6], SamplingParams(max_output_tokens=400))

    def broken(*_: object) -> None:
        raise ValueError("broken")

    assert steady.first_token.wait(10)
    hooked = first.ask([7] * 20, SamplingParams(), on_layer=broken)
    assert hooked.failed().error.reason == "STEP_FAILED"
    with monkeypatch.context() as patch:
        patch.setattr(first.reservations, "ensure_capacity", broken)
        assert first.ask([7], SamplingParams(max_output_tokens=100)).failed().error.reason == "STEP_FAILED"
    damaged = first.ask([7], SamplingParams(max_output_tokens=5000))
    assert damaged.first_token.wait(10)
    token_ids = damaged.reservation.token_ids
    damaged.reservation.token_ids = Unreadable(token_ids)  # its rows cannot be laid out
    assert damaged.failed().error.reason == "STEP_FAILED"
    damaged.reservation.token_ids = token_ids
    assert first.ask([1], SamplingParams(max_output_tokens=3)).finished().reason == "length"
    assert steady.finished().reason == "length"


def test_leaving_waits_for_the_others(make_gang: Callable[..., list[Any]]) -> None:
    first, second = make_gang()
    client = second.ask([1, 2, 3], SamplingParams(max_output_tokens=150))
    assert client.first_token.wait(10)
    leaving = threading.Thread(target=first.engine.stop, kwargs={"timeout_s": 20.0})
    leaving.start()
    assert client.finished().reason == "length", "the peer's stream ends in peace"
    assert leaving.is_alive()
    start = time.monotonic()
    second.engine.stop()
    leaving.join(5)
    assert not leaving.is_alive()
    assert time.monotonic() - start < 2


def test_health_of_an_idle_gang_is_a_step_of_all(make_gang: Callable[..., list[Any]]) -> None:
    first, second = make_gang(health_timeout_s=1.0)
    time.sleep(0.4)
    beat = second.engine._heartbeat._beat_at
    assert first.engine.healthy()
    time.sleep(0.2)
    assert first.engine.healthy()
    assert second.engine._heartbeat._beat_at > beat


@pytest.mark.parametrize("busy", [True, False])
def test_a_lost_peer_is_fatal(make_gang: Callable[..., list[Any]], busy: bool) -> None:
    fatal: queue.Queue[SeamountError] = queue.Queue()
    first, second = make_gang(on_fatal=fatal.put, health_timeout_s=1.0)
    client = second.ask([1, 2, 3], SamplingParams(max_output_tokens=5000)) if busy else None
    assert client is None or client.first_token.wait(10)
    start = time.monotonic()
    first.engine.stop(timeout_s=0.0)  # leaves although its gang does not
    while fatal.empty() and time.monotonic() - start < GROUP_TIMEOUT_S + 5:
        second.engine.healthy()  # as its replica's health check does: an idle gang is asked to step
        time.sleep(0.05)
    error = fatal.get(timeout=1)
    print(f"noticed after {time.monotonic() - start:.2f} s")
    assert isinstance(error, Unavailable)
    if client is not None:
        assert client.failed().error.reason == "GANG_LOST", "nothing that this rank computed"
    assert not second.engine.healthy()
    with pytest.raises(Unavailable):
        second.ask([1], SamplingParams())


def test_background_work_gives_way_to_the_work_of_a_peer(
    make_gang: Callable[..., list[Any]], rng: random.Random
) -> None:
    first, second = make_gang(chunk=16)
    both = [
        rank.ask(ids, None, is_background=True)
        for rank, ids in zip((first, second), ([5] * 900, [6] * 40), strict=True)
    ]
    assert both[1].finished().reason == "prefilled", "two of a kind do not stop each other"
    client = second.ask([1, 2, 3], SamplingParams(max_output_tokens=5))
    client.finished()
    ended = both[0].finished()
    assert (ended.reason, ended.num_computed < 900) == ("cancelled", True)
    assert len(client.token_ids) == 5
