"""What a rank pins for a peer, what it gives up once that has it, and what work ahead of time may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from seamount.wire.errors import Aborted, AlreadyExists, FailedPrecondition, ResourceExhausted
from seamount.wire.hashes import root_hash
from seamount.workers.cache.eviction import COLD_AFTER_S
from seamount.workers.cache.retention import Importance

SALT = b"a" * 32
ROOT = root_hash(SALT, "f", "exact")
IDS = list(range(18))  # 4 full pages of 4 tokens, and a tail of 2
MakeCache = Callable[[int], Any]


def hold(cache: Any, token_ids: list[int], *, epoch: int = 2, attempt: int = 1, session: str = "s") -> Any:
    held = cache.caches.handover.hold(
        session_id=session, epoch=epoch, attempt=attempt, root=ROOT, token_ids=token_ids, time_to_live_s=10.0
    )
    cache.caches.check_invariants()
    return held


@pytest.mark.parametrize(
    ("token_ids", "held_len"),
    [
        (IDS, 16),
        ([*IDS, 50, 51], 16),
        (IDS[:16], 16),
        (IDS[:15], 12),
        ([*IDS[:8], 9, 9, 9, 9, 9], 8),
        ([1, 2, 3, 4], 0),
    ],
)
def test_a_hold_pins_full_pages_and_changes_nothing_else(cache: Any, token_ids: list[int], held_len: int) -> None:
    cache.leave(IDS)
    before = cache.caches.state()
    held = hold(cache, token_ids)
    assert (held.computed_len, held.capacity) == (held_len, held_len)
    assert cache.caches.state().num_free == before.num_free, "nothing is allocated"
    cache.release(held)
    assert cache.caches.state() == before
    again = cache.reserve(IDS, epoch=3)
    assert (again.cached_len, again.common_len, again.left_len) == (17, 18, 18), "the tail, too, is as it was"
    cache.release(again)


def test_a_hold_is_idempotent_and_fenced(cache: Any) -> None:
    cache.leave(IDS, epoch=3)
    with pytest.raises(Aborted) as caught:
        hold(cache, IDS, epoch=2)
    assert caught.value.reason == "STALE_EPOCH"
    held = hold(cache, IDS, epoch=4, attempt=2)
    assert hold(cache, IDS, epoch=4, attempt=2) is held
    with pytest.raises(AlreadyExists):
        hold(cache, IDS[:9], epoch=4, attempt=2)
    with pytest.raises(Aborted):
        hold(cache, IDS, epoch=4, attempt=1)
    cache.clock.now += 11
    cache.caches.expire()
    cache.assert_all_back()


def test_a_hold_ends_the_turn_of_a_lower_epoch_alone(cache: Any) -> None:
    turn = cache.reserve(IDS, epoch=2)
    cache.caches.advance(turn.id, 9)
    held = hold(cache, IDS, epoch=2)
    assert not cache.aborted, "a turn of the same epoch goes on"
    assert held.computed_len == 8
    newer = hold(cache, IDS, epoch=3)
    assert cache.aborted == [turn.id]
    assert newer.computed_len == 8
    for one in (held, newer):
        cache.release(one)


def test_what_was_given_up_is_free_but_for_what_others_use(cache: Any) -> None:
    cache.leave(IDS)
    cache.leave([*IDS[:8], 70, 71, 72, 73, 74], session="other")
    cache.caches.handover.give_up("s", 0)
    assert "s" in cache.caches.sessions.cached(), "a later epoch has been seen here"
    held = hold(cache, IDS)
    cache.caches.handover.give_up("s", 2)
    cache.caches.check_invariants()
    cache.release(held)
    found = cache.reserve([*IDS[:8], 70, 71, 72, 73, 74, 75], session="other", epoch=2)
    assert found.cached_len == 13, "the other session has lost nothing"
    cache.release(found)
    cache.caches.handover.give_up("s", 2)
    cache.caches.handover.give_up("other", 2)
    cache.caches.check_invariants()
    assert cache.caches.sessions.cached() == [], "whatever pages of it were pinned then, and are evicted first"


def test_a_session_that_is_given_up_while_it_has_a_turn_stays(cache: Any) -> None:
    turn = cache.reserve(IDS, epoch=2)
    cache.caches.advance(turn.id, 18)
    cache.caches.handover.give_up("s", 5)
    cache.release(turn, 18)
    again = cache.reserve([*IDS, 1], epoch=3)
    assert again.cached_len == 18
    cache.release(again)


def test_what_a_leaving_rank_hands_over(make_cache: MakeCache) -> None:
    cache = make_cache(40)
    for number, session in enumerate(("old", "leased", "new", "running", "short")):
        cache.clock.now += 1
        ids = [100 * number + i for i in range(3 if session == "short" else 18)]
        cache.leave(ids, session=session, epoch=number + 1)
    cache.caches.sessions.retain("leased", duration_s=30.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    cache.clock.now += 10
    turn = cache.reserve([300, 301], session="running", epoch=9)
    assert cache.caches.handover.has_turns()
    left = cache.caches.handover.left_behind()
    assert [(one.session_id, one.epoch) for one in left] == [("leased", 2), ("new", 3), ("old", 1)]
    assert left[0].leased_s == pytest.approx(20.0)
    assert cache.caches.handover.tokens_of("new") == tuple(range(200, 217)), "the full pages, and one token more"
    assert [cache.caches.handover.tokens_of(name) for name in ("running", "short", "unknown")] == [(), (), ()]
    assert left[1].salt == SALT
    cache.release(turn)
    assert not cache.caches.handover.has_turns()


def spare(cache: Any, token_ids: list[int], **named: Any) -> Any:
    fields = {"session_id": "s", "turn_id": "t/ahead", "epoch": 1, "attempt": 1, "salt": SALT, "time_to_live_s": 10.0}
    reservation = cache.caches.reserve(**(fields | named), token_ids=token_ids, is_spare=True)
    cache.caches.check_invariants()
    return reservation


def test_work_ahead_takes_superseded_pages_before_it_asks_for_others(make_cache: MakeCache) -> None:
    cache = make_cache(10)
    cache.leave(IDS, epoch=1)  # 5 pages
    cache.leave([7] * 18, session="hot")  # 5 pages: none is free
    with pytest.raises(ResourceExhausted):
        spare(cache, [*IDS[:4], *[9] * 12])
    with pytest.raises(ResourceExhausted):
        spare(cache, [9] * 8, session_id="new")
    hot = cache.reserve([7] * 19, session="hot", epoch=2)
    assert hot.cached_len == 18, "a hot session keeps all it has"
    cache.release(hot)


def test_work_ahead_takes_the_sessions_own_superseded_pages(make_cache: MakeCache) -> None:
    cache = make_cache(10)
    cache.leave(IDS, epoch=1)
    cache.leave([*IDS[:4], *[9] * 4, 1], epoch=2)  # the session has gone another way: three pages are superseded
    cache.leave([7] * 14, session="hot")
    ahead = spare(cache, [*IDS[:4], *[9] * 4, *[3] * 8], epoch=2)
    cache.caches.advance(ahead.id, 16)
    cache.release(ahead)
    found = cache.reserve([*IDS[:4], *[9] * 4, *[3] * 8, 5], epoch=3)
    assert found.cached_len == 16
    cache.release(found)


def test_work_ahead_takes_cold_pages_and_never_leased_ones(make_cache: MakeCache) -> None:
    cache = make_cache(12)
    cache.leave([7] * 18, session="cold")
    cache.leave([8] * 18, session="leased")
    cache.caches.sessions.retain("leased", duration_s=600.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    with pytest.raises(ResourceExhausted):
        spare(cache, IDS)
    cache.clock.now += COLD_AFTER_S + 1
    cache.caches.sessions.retain("leased", duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    ahead = spare(cache, IDS, attempt=2)
    cache.release(ahead)
    leased = cache.reserve([8] * 19, session="leased", epoch=2)
    assert leased.cached_len == 18
    cache.release(leased)


def test_a_turn_comes_before_work_ahead_of_its_session(cache: Any) -> None:
    turn = cache.reserve(IDS, epoch=2)
    with pytest.raises(FailedPrecondition):
        spare(cache, IDS, epoch=2)
    cache.release(turn, 0)
    ahead = spare(cache, IDS, epoch=2, attempt=2)
    cache.caches.advance(ahead.id, 9)
    turn = cache.reserve([*IDS, 1], epoch=3)
    assert cache.aborted == [ahead.id]
    assert turn.cached_len == 9, "what was computed ahead is the session's"
    cache.release(turn)
