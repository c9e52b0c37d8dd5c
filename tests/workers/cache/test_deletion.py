"""What is left of a deleted session: nothing that no other session needs, in any tier, as soon as nobody uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from seamount.wire.errors import Aborted
from seamount.workers.cache.departures import ADOPTED_S
from seamount.workers.cache.retention import Importance, Tier
from seamount.workers.cache.tier_door import StoredPage

from .conftest import SALT, MakeTiered, SmallCache, TieredCache
from .test_tiers import stored

A, FORK = [1] * 10, [1] * 8 + [2] * 9
"""Two full pages and a tail; the same two pages and two more."""

MakeCache = Callable[[int], SmallCache]


def test_pages_of_a_deleted_session_are_free_at_once(cache: SmallCache) -> None:
    cache.leave(A, session="a")
    cache.caches.sessions.retain("a", duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    for _ in range(2):
        cache.caches.sessions.delete("a", 1)
        cache.caches.check_invariants()
        assert cache.caches.state().num_free == 16
        assert cache.caches.state().num_leased == 0
        assert cache.caches.sessions.cached() == []
    cache.caches.sessions.delete("never was here", 1)
    cache.caches.check_invariants()


def test_pages_that_its_earlier_turns_left_behind_go_too(cache: SmallCache) -> None:
    cache.leave([1] * 4 + [2] * 8, session="a")
    cache.leave([1] * 4 + [3] * 8, session="a", turn="u", epoch=2)
    assert cache.caches.state().num_superseded == 2
    cache.caches.sessions.delete("a", 2)
    assert cache.caches.state().num_free == 16
    assert cache.caches.state().num_superseded == 0


def test_what_a_fork_shares_stays_and_goes_with_it(cache: SmallCache) -> None:
    cache.leave(A, session="a")
    cache.leave(FORK, session="fork")
    cache.caches.sessions.delete("a", 1)
    cache.caches.check_invariants()
    assert (cache.caches.state().num_cached, cache.caches.state().num_superseded) == (5, 0)
    back = cache.reserve(FORK, session="fork", epoch=2)
    assert back.cached_len == 16
    cache.release(back, 17)
    cache.caches.sessions.delete("fork", 2)
    assert cache.caches.state().num_free == 16


def test_work_for_a_turn_elsewhere_goes_with_its_session(cache: SmallCache) -> None:
    """At a prefill rank no session has turns, and what it keeps is not superseded."""
    for turn, ids, session in (("t", A, "a"), ("u", FORK, "fork"), ("v", [7] * 9, "b")):
        made = cache.caches.reserve(
            session_id="",
            turn_id=turn,
            epoch=1,
            attempt=0,
            salt=SALT,
            token_ids=ids,
            time_to_live_s=9.0,
            for_session=session,
        )
        cache.caches.advance(made.id, len(ids))
        cache.release(made)
    assert (cache.caches.state().num_cached, cache.caches.state().num_superseded) == (6, 0)
    assert cache.caches.sessions.cached() == []
    cache.caches.sessions.delete("a", 1)
    assert cache.caches.state().num_cached == 6, "the fork's lie behind them"
    cache.caches.sessions.delete("b", 1)
    assert cache.caches.state().num_cached == 4
    cache.caches.sessions.delete("fork", 1)
    assert cache.caches.state().num_free == 16


def test_what_a_fork_keeps_under_a_lease_stays(make_cache: MakeCache) -> None:
    cache = make_cache(32)
    cache.leave(A, session="a")
    cache.leave(FORK, session="fork")
    cache.caches.sessions.retain("fork", duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    cache.caches.sessions.delete("a", 1)
    assert cache.caches.state().num_leased == 5


def test_a_turn_of_a_deleted_session_ends_and_its_writers_are_fenced_off(cache: SmallCache) -> None:
    live = cache.reserve(A, session="a", epoch=5)
    cache.caches.advance(live.id, 9)
    cache.caches.sessions.delete("a", 5)
    assert cache.aborted == [live.id]
    assert cache.caches.state().num_free == 16
    with pytest.raises(Aborted) as caught:
        cache.reserve(A, session="a", epoch=5, attempt=1)
    assert caught.value.reason == "STALE_EPOCH"
    anew = cache.reserve(A, session="a", turn="anew", epoch=7)
    cache.caches.sessions.delete("a", 5)
    assert cache.caches.get(anew.id) is anew, "a late message about the session before it"
    cache.release(anew)


def test_pages_in_use_go_when_the_use_is_over(cache: SmallCache) -> None:
    live = cache.reserve(A, session="a")
    cache.caches.advance(live.id, 6)
    cache.caches.uses.begin(live.id)
    cache.caches.sessions.delete("a", 1)
    cache.caches.check_invariants()
    assert cache.caches.state().num_free < 16
    cache.caches.advance(live.id, 10)  # the step that was under way
    cache.caches.uses.end(live.id)
    cache.caches.expire()
    cache.caches.check_invariants()
    assert cache.caches.state().num_free == 16


def test_what_a_peer_reads_goes_when_it_has_read_it(cache: SmallCache) -> None:
    cache.leave(A, session="a")
    root = cache.reserve(A, session="a", turn="u", epoch=2).root
    cache.caches.release(cache.caches._live.of_session("a").id)  # type: ignore[union-attr]
    held = cache.caches.handover.hold(session_id="a", epoch=3, attempt=1, root=root, token_ids=A, time_to_live_s=5.0)
    cache.caches.sessions.delete("a", 3)
    cache.caches.expire()
    assert cache.caches.state().num_cached == 0
    assert cache.caches.state().num_free == 14
    cache.release(held)
    assert cache.caches.state().num_superseded == 2, "until the next look, the first to go"
    cache.caches.expire()
    assert cache.caches.state().num_free == 16


def test_it_goes_from_all_tiers_and_its_slots_on_disk_are_erased_before_they_are_used(make_tiered: MakeTiered) -> None:
    cache = make_tiered(16, host=8, disk=8)
    cache.leave(A, session="a")
    cache.leave(FORK, session="fork")
    cache.settle()
    cache.press()
    cache.caches.sessions.delete("fork", 1)
    cache.caches.check_invariants()
    tiers = cache.caches.tiers
    assert [tiers.state(tier).num_cached for tier in (Tier.HOST, Tier.DISK)] == [2, 2], "the first session's"
    slots = tiers.next_erasures(Tier.DISK, 9)
    assert len(slots) == 2
    assert tiers.is_busy
    cache.leave([7] * 40, session="b")
    settled(cache)
    assert tiers.state(Tier.DISK).num_cached == 6, "no room in slots that are not erased yet"
    tiers.erased(Tier.DISK, slots[0], is_done=True)
    tiers.erased(Tier.DISK, slots[1], is_done=False)
    cache.caches.check_invariants()
    assert tiers.state(Tier.DISK).num_pages == 7, "a slot that cannot be erased is not used any more"
    assert tiers.next_erasures(Tier.HOST, 9) == [], "memory ends with the process"


def settled(cache: TieredCache) -> None:
    """All copies that can be made are made; nothing is erased."""
    made = True
    while made:
        made = False
        for tier in (Tier.HOST, Tier.DISK):
            for copy in cache.caches.tiers.next_copies(tier, 3):
                made = cache.caches.tiers.copied(copy, 0) or made


def test_a_copy_in_the_making_of_a_deleted_page_is_erased(make_tiered: MakeTiered) -> None:
    cache = make_tiered(16, disk=8)
    cache.leave(A, session="a")
    copies = cache.caches.tiers.next_copies(Tier.DISK, 9)
    assert len(copies) == 2
    cache.caches.sessions.delete("a", 1)
    for copy in copies:
        cache.caches.tiers.copied(copy, 0)
    cache.caches.expire()
    cache.caches.check_invariants()
    assert sorted(cache.caches.tiers.next_erasures(Tier.DISK, 9)) == sorted(copy.slot for copy in copies)
    assert cache.caches.state().num_free == 16


def two_sessions() -> list[StoredPage]:
    """On disk: two pages of "gone", behind them two of its fork."""
    ids = [5] * 16
    return [stored(ids, depth, depth, session="gone" if depth < 2 else "fork", order=depth) for depth in range(4)]


def test_deleted_sessions_are_not_adopted(make_tiered: MakeTiered) -> None:
    cache = make_tiered(16, disk=10)
    cache.caches.tiers.adopt(Tier.DISK, two_sessions(), deleted=["fork", "another"])
    cache.caches.check_invariants()
    assert cache.caches.sessions.cached() == ["gone"]
    assert cache.caches.tiers.next_erasures(Tier.DISK, 9) == [3, 2]
    assert cache.caches.tiers.state(Tier.DISK).num_superseded == 0


def test_what_a_fork_has_of_a_deleted_session_is_adopted(make_tiered: MakeTiered) -> None:
    cache = make_tiered(16, disk=10)
    cache.caches.tiers.adopt(Tier.DISK, two_sessions(), deleted=["gone"])
    cache.caches.check_invariants()
    assert cache.caches.sessions.cached() == ["fork"]
    assert cache.caches.tiers.next_erasures(Tier.DISK, 9) == []
    back = cache.reserve([*[5] * 16, 1], session="fork")
    assert back.cached_len == 16
    cache.release(back)


def test_adopted_sessions_that_do_not_come_are_superseded_in_the_end(make_tiered: MakeTiered) -> None:
    cache = make_tiered(16, disk=10)
    cache.caches.tiers.adopt(Tier.DISK, [*two_sessions(), stored([6] * 4, 0, 9, session="comes", order=9)])
    back = cache.reserve([6] * 5, session="comes")
    cache.settle()
    cache.release(back)
    assert cache.caches.tiers.state(Tier.DISK).num_superseded == 0
    cache.clock.now += ADOPTED_S
    cache.caches.expire()
    cache.caches.check_invariants()
    state = cache.caches.tiers.state(Tier.DISK)
    assert (state.num_cached, state.num_superseded) == (5, 4)
