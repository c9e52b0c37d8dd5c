"""The scheduler's decisions over real reservations: no model, no torch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from seamount.wire.errors import InvalidArgument, NotFound, ResourceExhausted
from seamount.workers.cache.reservations import Reservations
from seamount.workers.requests import EngineRequest, SamplingParams
from seamount.workers.schedule import Chunk, Schedule
from seamount.workers.scheduler import EngineLimits, Scheduler
from seamount.workers.sequence import PROBATION_TOKENS
from seamount.workers.sequence import Sequence as EngineSequence

PAGE = 4


@dataclass
class Desk:
    """A scheduler whose steps always succeed."""

    reservations: Reservations
    scheduler: Scheduler
    names: dict[str, EngineSequence] = field(default_factory=dict)

    def add(
        self, name: str, num_tokens: int, *, samples: bool = True, until: int | None = None, **more: bool
    ) -> EngineSequence:
        reservation = self.reservations.reserve(
            session_id="",
            turn_id=name,
            epoch=1,
            attempt=1,
            salt=name.encode(),
            token_ids=range(num_tokens),
            time_to_live_s=60,
        )
        request = EngineRequest(
            id=reservation.id,
            reservation=reservation,
            sampling=SamplingParams() if samples else None,
            sink=lambda event: None,
            prefill_until=until,
            **more,
        )
        sequence = EngineSequence(request=request, arrival=len(self.names), submitted_at=0.0)
        self.names[name] = sequence
        self.scheduler.add(sequence)
        return sequence

    def step(self, schedule: Schedule | None = None) -> list[tuple[str, int, int, bool]]:
        """Decide and carry out one step; returns (name, first, end, samples) of each chunk."""
        schedule = schedule or self.scheduler.schedule()
        for chunk in schedule.chunks:
            self.reservations.advance(chunk.sequence.request.id, chunk.end)
            chunk.sequence.note_computed(chunk.first, chunk.end)
            if chunk.samples:
                self.reservations.append_token(chunk.sequence.request.id, 9)
                chunk.sequence.num_sampled += 1
        return [self.describe(chunk) for chunk in schedule.chunks]

    def describe(self, chunk: Chunk) -> tuple[str, int, int, bool]:
        name = next(name for name, sequence in self.names.items() if sequence is chunk.sequence)
        return name, chunk.first, chunk.end, chunk.samples

    def end(self, name: str) -> None:
        sequence = self.names[name]
        self.scheduler.remove(sequence)
        self.reservations.release(sequence.request.id)


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(*, num_pages: int = 64, batch: int = 16, running: int = 4, chunk: int = 8) -> Desk:
        reservations = Reservations(num_pages=num_pages, page_size=PAGE, fingerprint="f", layout="l")
        limits = EngineLimits(max_batch_tokens=batch, max_running=running, prefill_chunk_tokens=chunk)
        desks.append(Desk(reservations, Scheduler(reservations=reservations, limits=limits)))
        return desks[-1]

    yield make
    for desk in desks:
        for name in desk.names:
            desk.end(name)
        assert len(desk.scheduler) == 0
        desk.reservations.check_invariants()
        state = desk.reservations.state()
        assert (state.num_reservations, state.num_free + state.num_cached) == (0, state.num_pages)


def test_imports_no_torch() -> None:
    code = "import sys, seamount.workers.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_prompt_is_chunked_then_decodes(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    desk.add("a", 19)
    assert desk.step() == [("a", 0, 8, False)]
    assert desk.step() == [("a", 8, 16, False)]
    assert desk.step() == [("a", 16, 19, True)]
    assert desk.step() == [("a", 19, 20, True)]
    assert desk.step() == [("a", 20, 21, True)]
    assert desk.names["a"].num_computed == 19


def test_decode_goes_first_and_narrows_the_prompts(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    desk.add("a", 3)
    assert desk.step() == [("a", 0, 3, True)]
    desk.add("b", 30)
    desk.add("c", 30)
    assert desk.step() == [("a", 3, 4, True), ("b", 0, 8, False)], "one chunk in all while somebody decodes"
    desk.end("a")
    assert desk.step() == [("b", 8, 16, False), ("c", 0, 8, False)], "one chunk each within the batch otherwise"


def test_newcomers_delay_nobody_older(make_desk: Callable[..., Desk]) -> None:
    def steps_to_first_token(newcomers: bool) -> dict[str, int]:
        desk = make_desk(batch=5, chunk=4, running=5)
        for name in "abc":
            desk.add(name, 9)
        reached: dict[str, int] = {}
        for number in range(60):
            if newcomers and number < 30:
                desk.add(f"new{number}", 2)
            for name, _, _, samples in desk.step():
                if samples:
                    desk.end(name)
                    reached[name] = number
        return reached

    alone, crowded = steps_to_first_token(False), steps_to_first_token(True)
    assert {name: crowded[name] for name in "abc"} == alone
    assert len(crowded) == 33, "newcomers have their turn"


def test_places_are_bounded(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(running=2)
    for name in "abcd":
        desk.add(name, 1)
    assert [name for name, *_ in desk.step()] == ["a", "b"]
    assert [sequence.arrival for sequence in desk.scheduler.waiting] == [2, 3]
    desk.end("a")
    assert [name for name, *_ in desk.step()] == ["b", "c"]


def test_prefill_only_ends_where_told(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    desk.add("a", 20, samples=False, until=11)
    assert desk.step() == [("a", 0, 8, False)]
    assert desk.step() == [("a", 8, 11, False)]
    schedule = desk.scheduler.schedule()
    assert schedule.complete == (desk.names["a"],)
    assert schedule.chunks == ()


def test_a_suspect_gets_steps_of_its_own_until_it_has_sampled(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    desk.add("a", 3)
    assert [name for name, *_ in desk.step()] == ["a"]
    desk.add("suspect", 12, alone=True)
    desk.add("another", 9, alone=True)
    desk.add("b", 3)
    steps = [[name for name, *_ in desk.step()] for _ in range(12)]
    until = next(number for number, names in enumerate(steps) if len(names) > 1)
    assert all(names in (["suspect"], ["another"]) for names in steps[:until])
    assert steps[:until] == sorted(steps[:until], reverse=True), "the older one first, to its end"
    assert desk.names["suspect"].num_sampled >= PROBATION_TOKENS
    assert desk.names["another"].num_sampled >= PROBATION_TOKENS
    assert set(steps[until]) == {"a", "suspect", "another", "b"}


def test_the_gangs_budget_cuts_the_youngest_chunks(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    desk.add("a", 5)
    desk.add("b", 7)
    schedule = desk.scheduler.schedule()
    assert schedule.num_prefill_tokens == 12
    assert schedule.within(12) is schedule
    assert [desk.describe(chunk) for chunk in schedule.within(9).chunks] == [("a", 0, 5, True), ("b", 0, 4, False)]
    assert [desk.describe(chunk) for chunk in schedule.within(5).chunks] == [("a", 0, 5, True)]
    assert desk.step(schedule.within(4)) == [("a", 0, 4, False)]
    assert desk.step() == [("a", 4, 5, True), ("b", 0, 7, True)]


def test_the_youngest_gives_its_pages_back(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(num_pages=4)
    for name in "abc":
        desk.add(name, 3)  # one page each: three tokens and one more
    assert len(desk.step()) == 3
    assert len(desk.step()) == 3
    # Each needs a second page now; one is free. a takes it, b takes c's.
    assert desk.step() == [("a", 4, 5, True), ("b", 4, 5, True)]
    assert desk.names["c"].is_preempted
    assert desk.names["c"].num_preemptions == 1
    assert desk.step() == [("a", 5, 6, True), ("b", 5, 6, True)], "c waits for pages"
    desk.end("a")
    assert desk.step() == [("b", 6, 7, True), ("c", 0, 5, True)], "its page had been taken: computed again"
    assert desk.names["c"].num_computed == 3 + 4


def test_a_waiting_sequence_gives_its_pages_before_a_running_one(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(num_pages=3, running=2)
    for name in "abc":
        desk.add(name, 3)
    for _ in range(2):
        assert [name for name, *_ in desk.step()] == ["a", "b"]
    assert [name for name, *_ in desk.step()] == ["a"], "c's page goes to a, b gives up its own for nobody younger"
    assert desk.names["c"].num_preemptions == 0, "it had not begun"
    assert desk.names["b"].num_preemptions == 1


def test_the_oldest_waits_for_pages_held_elsewhere(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(num_pages=2)
    desk.add("a", 3)
    outside = desk.reservations.reserve(
        session_id="", turn_id="x", epoch=1, attempt=1, salt=b"x", token_ids=[1], time_to_live_s=60
    )
    desk.step()
    desk.step()
    for _ in range(3):
        assert desk.step() == []
    assert not desk.names["a"].is_preempted
    desk.reservations.release(outside.id)
    assert desk.step() == [("a", 4, 5, True)]


def test_a_sequence_in_use_is_not_preempted(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(num_pages=2)
    desk.add("a", 3)
    desk.add("b", 3)
    desk.step()
    desk.step()
    desk.reservations.uses.begin(desk.names["b"].request.id)
    assert desk.step() == []
    desk.reservations.uses.end(desk.names["b"].request.id)
    assert desk.step() == [("a", 4, 5, True)]


def test_ended_reservations_are_reported_once(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(running=1)
    desk.add("a", 3)
    desk.add("b", 3)
    desk.add("c", 3)
    desk.step()
    desk.reservations.release(desk.names["a"].request.id)
    desk.reservations.release(desk.names["b"].request.id)
    schedule = desk.scheduler.schedule()
    assert [sequence for sequence, _ in schedule.lost] == [desk.names["a"], desk.names["b"]]
    assert all(isinstance(error, NotFound) for _, error in schedule.lost)
    assert [desk.describe(chunk)[0] for chunk in schedule.chunks] == ["c"]
    assert desk.scheduler.schedule().lost == ()


@pytest.mark.parametrize("running", [1, 3, 8])
def test_every_sequence_ends_whatever_arrives(make_desk: Callable[..., Desk], running: int) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    desk = make_desk(num_pages=9, batch=rng.randrange(8, 20), running=running, chunk=rng.randrange(1, 9))
    wanted: dict[str, int] = {}
    ended: list[str] = []
    for number in range(1500):
        if len(wanted) < 40 and rng.random() < 0.3:
            name, length = f"s{len(wanted)}", rng.randrange(1, 12)
            with suppress(ResourceExhausted):
                desk.add(name, length)
                wanted[name] = rng.randrange(1, 20)
        oldest = next((name for name in wanted if name not in ended), None)
        before = 0 if oldest is None else _reach(desk.names[oldest])
        desk.step()
        if oldest is not None:
            assert desk.names[oldest] is desk.scheduler.running[0]
            assert _reach(desk.names[oldest]) > before, f"the oldest stands still in step {number}"
        for name in wanted:
            if name not in ended and desk.names[name].num_sampled >= wanted[name]:
                ended.append(name)
                desk.end(name)
    assert len(wanted) == 40
    assert set(ended) == set(wanted)


def _reach(sequence: EngineSequence) -> int:
    return sequence.request.reservation.computed_len + sequence.num_sampled


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((4, 5, 1), "max_batch_tokens"),
        ((4, 0, 1), "max_running"),
        ((4, 4, 0), "prefill_chunk_tokens"),
    ],
)
def test_limits_are_checked(values: Sequence[int], name: str) -> None:
    batch, running, chunk = values
    with pytest.raises(InvalidArgument) as caught:
        EngineLimits(max_batch_tokens=batch, max_running=running, prefill_chunk_tokens=chunk)
    assert caught.value.field == name
    EngineLimits(max_batch_tokens=4, max_running=4, prefill_chunk_tokens=1)


def test_background_work_runs_alone_and_is_dropped_by_the_first_step_with_other_work(
    make_desk: Callable[..., Desk],
) -> None:
    desk = make_desk()
    ahead = desk.add("ahead", 30, samples=False, is_background=True)
    assert desk.step() == [("ahead", 0, 8, False)]
    assert (desk.scheduler.num_running, desk.scheduler.num_waiting, desk.scheduler.queued_prefill_tokens) == (0, 0, 0)
    desk.add("a", 5)
    schedule = desk.scheduler.schedule()
    assert schedule.dropped == (ahead,)
    assert not schedule.is_background
    assert desk.step(schedule) == [("a", 0, 5, True)]
    assert ahead not in list(desk.scheduler)
    assert desk.step() == [("a", 5, 6, True)]


def test_background_work_gives_way_to_a_peer_of_the_gang(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    ahead = desk.add("ahead", 30, samples=False, is_background=True)
    schedule = desk.scheduler.schedule()
    assert schedule.is_background
    without = schedule.without_background()
    assert (without.chunks, without.dropped) == ((), (ahead,))
