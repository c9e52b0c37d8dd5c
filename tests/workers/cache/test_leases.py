"""Leases over real pages: what pressure takes, what it may not take, and when a lease ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from seamount.wire.errors import InvalidArgument, ResourceExhausted
from seamount.wire.limits import MAX_TOOL_WAIT_S
from seamount.workers.cache.retention import MAX_EVICTION_AGES, Importance, LeaseDecision, LeaseOutcome

from .conftest import SmallCache

MakeCache = Callable[[int], SmallCache]
A, B, C = [1] * 10, [2] * 10, [3] * 10
"""Three pages each, the last one a tail of two tokens."""


def retain(
    cache: SmallCache, session: str, duration_s: float = 60.0, importance: Importance = Importance.HIGH
) -> LeaseDecision:
    decision = cache.caches.sessions.retain(
        session, duration_s=duration_s, importance=importance, prefill_tokens_per_s=100.0
    )
    cache.caches.check_invariants()
    return decision


def cached_len(cache: SmallCache, prompt: list[int], session: str) -> int:
    reservation = cache.reserve([*prompt, 0], session=session, epoch=99)
    found_len = reservation.cached_len
    cache.release(reservation)
    return found_len


def press(cache: SmallCache, num_tokens: int) -> None:
    cache.release(cache.reserve([9] * num_tokens, session="big"), keep_len=0)


@pytest.mark.parametrize(("leased", "survivor"), [(False, "new"), (True, "old")])
def test_the_same_trace_evicts_others_with_a_lease(make_cache: MakeCache, leased: bool, survivor: str) -> None:
    cache = make_cache(6)
    cache.leave(A, session="old")
    given = retain(cache, "old", 180.0, Importance.HIGH if leased else Importance.LOW)
    assert given.outcome is (LeaseOutcome.ACCEPTED if leased else LeaseOutcome.DENIED)
    cache.clock.now += 150.0
    cache.leave(B, session="new")
    assert retain(cache, "new", 2.0, Importance.LOW).outcome is LeaseOutcome.DENIED
    cache.clock.now += 1.0
    press(cache, 11)
    found = {"old": cached_len(cache, A, "old"), "new": cached_len(cache, B, "new")}
    assert found == {survivor: 10, ({"old", "new"} - {survivor}).pop(): 0}


def test_the_answer_names_what_rebuilding_takes(cache: SmallCache) -> None:
    cache.leave(A, session="a")
    decision = retain(cache, "a")
    assert (decision.rebuild_tokens, decision.rebuild_s) == (10, pytest.approx(0.1, rel=1e-3))
    assert retain(cache, "unknown").outcome is LeaseOutcome.DENIED


def test_a_lease_is_not_dropped_for_anybody_and_ends_with_its_time(make_cache: MakeCache) -> None:
    cache = make_cache(5)
    cache.leave(A, session="a")
    retain(cache, "a", 60.0)
    with pytest.raises(ResourceExhausted, match="3 are leased") as refused:
        cache.reserve([9] * 9, session="big", turn="1")
    assert refused.value.reason == "NO_PAGES"
    assert cache.caches.state().num_leased == 3
    cache.clock.now += 59.0
    with pytest.raises(ResourceExhausted) as refused:
        cache.reserve([9] * 9, session="big", turn="2")
    assert refused.value.retry_after_s == pytest.approx(1.0)
    cache.clock.now += 1.0
    big = cache.reserve([9] * 19, session="big", turn="3")
    assert len(big.pages) == 5
    cache.release(big)


def test_housekeeping_ends_leases(cache: SmallCache) -> None:
    cache.leave(A, session="a")
    retain(cache, "a", 60.0)
    cache.clock.now += 60.0
    cache.caches.expire()
    assert cache.caches.state().num_leased == 0
    assert cached_len(cache, A, "a") == 10, "still cached"


def test_a_lease_that_was_asked_for_before_the_session_went_on_is_denied(cache: SmallCache) -> None:
    """The turn that it waited for has come: none would end it."""
    cache.leave(A, session="a", epoch=4)
    live = cache.reserve([*A, 5], session="a", turn="u", epoch=5)

    def retained(epoch: int) -> LeaseOutcome:
        return cache.caches.sessions.retain(
            "a", epoch=epoch, duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0
        ).outcome

    assert retained(4) is LeaseOutcome.DENIED
    cache.release(live, 11)
    assert retained(4) is LeaseOutcome.DENIED
    assert cache.caches.state().num_leased == 0
    assert retained(5) is LeaseOutcome.ACCEPTED
    assert retained(6) is LeaseOutcome.ACCEPTED, "a turn that began and left nothing here"


def test_running_sequences_do_not_grow_into_leased_pages(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    cache.leave([1] * 8, session="a")
    retain(cache, "a")
    runner = cache.reserve([5] * 7, session="b")
    assert not cache.caches.ensure_capacity(runner.id, 9)
    cache.clock.now += 9.0
    cache.caches.renew(runner.id)
    assert retain(cache, "a", 60.0).duration_s == pytest.approx(51.0), "nothing is left: no longer than it is"
    cache.clock.now += 60.0
    cache.caches._leases.end_expired(cache.clock.now)
    assert cache.caches.ensure_capacity(runner.id, 9)
    cache.release(runner)


def test_the_commit_that_a_lease_waited_for_ends_it(cache: SmallCache) -> None:
    cache.leave(A, session="a", epoch=1)
    retain(cache, "a")
    again = cache.reserve([*A, 7], session="a", epoch=2)
    assert again.is_leased
    cache.caches.advance(again.id, 11)
    cache.release(again)  # not committed: what the session left is still leased, as many pages as before
    assert cache.caches.state().num_leased == 3
    third = cache.reserve([*A, 7], session="a", epoch=3)
    assert third.is_leased
    assert third.cached_len == 10
    cache.caches.advance(third.id, 11)
    cache.release(third, keep_len=11)
    assert cache.caches.state().num_leased == 0
    last = cache.reserve([*A, 7], session="a", epoch=4)
    assert not last.is_leased
    cache.release(last)


def test_a_lease_given_while_the_turn_still_runs_holds_what_it_leaves(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    running = cache.reserve(A, session="a")
    cache.caches.advance(running.id, 10)
    assert retain(cache, "a").outcome is LeaseOutcome.ACCEPTED
    assert cache.caches.state().num_leased == 0, "in use"
    cache.release(running, keep_len=9)
    assert cache.caches.state().num_leased == 3
    press(cache, 19)
    assert cached_len(cache, A, "a") == 9


def test_pages_that_two_sessions_lease_stay_until_both_ended(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    cache.leave([1] * 8, session="a")
    cache.leave([*[1] * 8, 2, 2], session="b")
    retain(cache, "a", 10.0)
    retain(cache, "b", 100.0)
    assert cache.caches.state().num_leased == 3
    cache.clock.now += 10.0
    cache.caches.expire()
    assert cache.caches.state().num_leased == 3
    press(cache, 19)
    assert cached_len(cache, [*[1] * 8, 2, 2], "b") == 10


def test_another_session_does_not_forget_a_leased_page_that_it_computed(cache: SmallCache) -> None:
    first = cache.reserve([1] * 8, session="b")
    cache.caches.advance(first.id, 8)
    cache.leave([1] * 8, session="a")
    retain(cache, "a")
    cache.release(first, keep_len=0)
    assert cached_len(cache, [1] * 8, "a") == 8


def test_asking_again_renews_and_a_denial_leaves_the_lease_alone(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    cache.leave([1] * 8, session="a")
    assert retain(cache, "a", 100.0).outcome is LeaseOutcome.ACCEPTED
    cache.clock.now += 60.0
    assert retain(cache, "a", 100.0).duration_s == 100.0, "the same again, from now on"
    denied = retain(cache, "a", 500.0, Importance.LOW)  # the whole pool's half is more than that allows
    assert (denied.outcome, denied.duration_s) == (LeaseOutcome.CLIPPED, 100.0)
    assert retain(cache, "a", 5.0).duration_s == 5.0, "the session's own to shorten"


def test_superseded_pages_go_before_older_ones(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    cache.leave([2] * 8, session="other")
    cache.clock.now += 1000.0
    cache.leave([1] * 16, session="a", epoch=1)
    cache.leave([*[1] * 4, *[5] * 4], session="a", epoch=2)  # a user's message cut the rest
    press(cache, 15)  # four pages: one is free, three are superseded
    assert cached_len(cache, [2] * 8, "other") == 8
    assert cached_len(cache, [*[1] * 4, *[5] * 4], "a") == 8


@pytest.mark.parametrize("duration_s", [0.0, -1.0, MAX_TOOL_WAIT_S + 1, float("nan")])
def test_a_bad_duration_is_named(cache: SmallCache, duration_s: float) -> None:
    with pytest.raises(InvalidArgument) as refused:
        retain(cache, "a", duration_s)
    assert refused.value.field == "duration"


def test_where_pages_live_short_leases_are_short(make_cache: MakeCache) -> None:
    cache = make_cache(6)
    for turn in range(40):  # 3 pages each: whoever comes takes those of the one before the last
        cache.leave([turn + 1] * 10, session=f"s{turn}")
        assert retain(cache, f"s{turn}", 0.5, Importance.LOW).outcome is LeaseOutcome.DENIED  # but noted
        cache.clock.now += 5.0
    clipped = retain(cache, "s39", 300.0)
    assert clipped.outcome is LeaseOutcome.CLIPPED
    assert clipped.duration_s == pytest.approx(MAX_EVICTION_AGES * 10.0, rel=0.01)
    cache.clock.now += 60.0  # nothing was evicted since
    assert retain(cache, "s38", 30.0, Importance.HIGH).outcome is LeaseOutcome.ACCEPTED
