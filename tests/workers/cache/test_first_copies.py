"""Pages that wait for their first copy below the device, and leased ones while the turn that they waited for runs."""

from __future__ import annotations

import pytest

from seamount.wire.errors import ResourceExhausted
from seamount.workers.cache.admission import MIN_RETRY_S
from seamount.workers.cache.first_copies import MAX_COPYING_S
from seamount.workers.cache.retention import Importance, LeaseOutcome, Tier

from .conftest import MakeTiered, TieredCache

A, B = [1] * 8, [2] * 8
"""Two full pages each."""
ALL = [9] * 31
"""Needs all eight pages."""


def leave_a(cache: TieredCache, **named: object) -> None:
    cache.leave(A, session="a", turn="t1", **named)


def cached_len(cache: TieredCache) -> int:
    back = cache.reserve([*A, 5], session="a", turn="t2", epoch=2)
    found = back.cached_len
    cache.release(back)
    return found


def test_a_prompt_waits_for_the_copies_of_what_it_would_evict(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    leave_a(cache)
    with pytest.raises(ResourceExhausted) as refused:
        cache.reserve(ALL, session="b")
    assert refused.value.retry_after_s == MIN_RETRY_S
    cache.settle()
    cache.release(cache.reserve(ALL, session="b"), keep_len=0)
    assert cached_len(cache) == 8


def test_pages_wait_for_a_second_at_most(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    leave_a(cache)
    cache.clock.now += MAX_COPYING_S
    cache.release(cache.reserve(ALL, session="b"), keep_len=0)
    assert cached_len(cache) == 0


def test_pages_that_get_no_copy_do_not_wait(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=2)
    cache.leave(B, session="b")
    cache.settle()
    lease = cache.caches.sessions.retain("b", duration_s=5.0, importance=Importance.HIGH, prefill_tokens_per_s=1.0)
    assert lease.outcome is LeaseOutcome.ACCEPTED
    leave_a(cache)
    assert cache.caches.tiers.next_copies(Tier.HOST, 9) == [], "what is there is leased"
    cache.release(cache.reserve(ALL, session="c"), keep_len=0)
    assert cached_len(cache) == 0


def test_without_a_tier_below_nothing_waits(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8)
    leave_a(cache)
    cache.release(cache.reserve(ALL, session="b"), keep_len=0)


def test_what_nobody_will_come_for_does_not_wait(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    turn = cache.reserve(A, session="a", turn="t1")
    cache.caches.advance(turn.id, len(A))
    cache.caches.release(turn.id, len(A), reuse_len=0)
    cache.release(cache.reserve(ALL, session="b"), keep_len=0)


@pytest.mark.parametrize("way", ["deleted", "given up"])
def test_a_session_that_is_gone_does_not_wait(make_tiered: MakeTiered, way: str) -> None:
    cache = make_tiered(8, host=8)
    leave_a(cache)
    if way == "deleted":
        cache.caches.sessions.delete("a", 2)
    else:
        cache.caches._cache.departures.give_up("a")
    cache.caches.check_invariants()
    cache.release(cache.reserve(ALL, session="b"), keep_len=0)


def test_a_sequence_that_runs_does_not_wait(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    running = cache.reserve([3] * 4, session="b")
    cache.caches.advance(running.id, 4)
    leave_a(cache)
    running_len = 32
    assert cache.caches.ensure_capacity(running.id, running_len), "the pages that wait are given to it"
    cache.caches.check_invariants()
    cache.release(running)


def test_while_a_turn_runs_its_leased_pages_need_no_copies(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=2)
    leave_a(cache)
    cache.settle()
    lease = cache.caches.sessions.retain("a", duration_s=5.0, importance=Importance.HIGH, prefill_tokens_per_s=1.0)
    assert lease.outcome is LeaseOutcome.ACCEPTED
    turn = cache.reserve([*A, 5], session="a", turn="t2", epoch=2)
    cache.leave(B, session="b")
    cache.settle()
    assert [node.session_id for node in cache.nodes(Tier.HOST)] == ["b", "b"]
    cache.release(turn)  # without a commit: the lease is still in force
    assert cache.caches.state().num_leased == 2
    with pytest.raises(ResourceExhausted):
        cache.reserve(ALL, session="c")
    cache.clock.now += 5.0
    cache.caches.expire()
    cache.caches.check_invariants()


def test_a_turn_on_another_branch_leaves_the_lease_alone(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=2)
    leave_a(cache)
    cache.settle()
    cache.caches.sessions.retain("a", duration_s=5.0, importance=Importance.HIGH, prefill_tokens_per_s=1.0)
    turn = cache.reserve([1, 1, 1, 1, 7, 7], session="a", turn="t2", epoch=2)
    cache.leave(B, session="b")
    cache.settle()
    assert [node.session_id for node in cache.nodes(Tier.HOST)] == ["a", "a"]
    cache.release(turn)


def test_pages_of_a_turn_that_was_refused_outlive_those_of_a_tool_that_is_due(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8)
    for session, ids in (("a", A), ("b", B)):
        cache.leave(ids, session=session, turn="t1")
        cache.caches._cache.sessions.touch(session).wait_for_tools(20.0)
    cache.clock.now += 60.0
    held = cache.reserve([7] * 15, session="c")
    with pytest.raises(ResourceExhausted):
        cache.reserve([*A, *[5] * 20], session="a", turn="t2", epoch=2)
    cache.release(held, keep_len=0)
    cache.release(cache.reserve([9] * 20, session="d"), keep_len=0)
    assert cached_len(cache) == 8
    assert cache.reserve([*B, 5], session="b", turn="t2", epoch=2).cached_len < 8
