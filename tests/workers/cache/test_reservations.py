from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from seamount.wire.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from seamount.wire.limits import MAX_RESERVATION_S
from seamount.workers.cache.reservation import ReservationState, common_prefix_len
from seamount.workers.cache.reservations import Reservations

MakeCache = Callable[[int], Any]


# ---- what is found


@pytest.mark.parametrize(
    ("num_tokens", "cached_len"),
    # a tail serves up to its last entry; a full page only if the last prompt token lies beyond it
    [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6), (8, 7), (9, 8), (10, 9)],
)
def test_the_same_session_finds_its_pages_and_tail_but_computes_the_last_token(
    cache: Any, num_tokens: int, cached_len: int
) -> None:
    token_ids = list(range(100, 100 + num_tokens))
    cache.leave(token_ids)
    again = cache.reserve(token_ids, epoch=2)
    full_pages_matched = (num_tokens - 1) // 4 * 4
    expected = cached_len if num_tokens % 4 else full_pages_matched
    assert again.cached_len == again.cached_len_at_first == again.computed_len == expected
    assert again.common_len == num_tokens
    assert len(again.pages) == num_tokens // 4 + 1
    cache.release(again)


def test_a_next_turn_finds_everything(cache: Any) -> None:
    token_ids = list(range(10))
    cache.leave(token_ids)
    longer = cache.reserve([*token_ids, 50, 51, 52], epoch=2)
    assert longer.cached_len == 10
    assert longer.common_len == 10
    cache.release(longer)


def test_another_session_shares_full_pages_and_never_a_tail(cache: Any) -> None:
    token_ids = list(range(11))
    cache.leave(token_ids, session="a")
    other = cache.reserve([*token_ids, 1], session="b")
    same = cache.reserve([*token_ids, 1], session="a", epoch=2)
    assert (other.cached_len, other.common_len) == (8, 0)
    assert (same.cached_len, same.common_len) == (11, 11)
    assert other.pages[:2] == same.pages[:2]
    assert not set(other.pages[2:]) & set(same.pages[2:])
    cache.release(other)
    cache.release(same)


def test_two_live_sequences_share_full_pages_while_both_run(cache: Any) -> None:
    first = cache.reserve(list(range(10)), session="a")
    cache.caches.advance(first.id, 10)
    second = cache.reserve(list(range(9)), session="b")
    assert second.cached_len == 8
    assert second.pages[:2] == first.pages[:2]
    cache.release(first)
    assert cache.caches.state().num_reservations == 1
    cache.release(second)


def test_a_salt_of_its_own_finds_nothing(cache: Any) -> None:
    cache.leave(list(range(11)), session="a")
    other = cache.reserve(list(range(12)), session="a", epoch=2, salt=b"b" * 32)
    assert (other.cached_len, other.common_len) == (0, 0)
    cache.release(other)


def test_a_salt_of_its_own_finds_no_tail_either(cache: Any) -> None:
    cache.leave([1, 2, 3])  # no full page before it: only the root tells the chains apart
    other = cache.reserve([1, 2, 3, 4], epoch=2, salt=b"b" * 32)
    assert (other.cached_len, other.common_len) == (0, 0)
    cache.release(other)


def test_a_tail_is_used_up_to_the_first_id_that_differs(cache: Any) -> None:
    cache.leave([0, 1, 2, 3, 4, 5, 6])
    changed = cache.reserve([0, 1, 2, 3, 4, 9, 6, 7], epoch=2)
    assert (changed.cached_len, changed.common_len) == (5, 5)
    cache.release(changed)


def test_a_tail_that_differs_from_its_first_id_on_is_left_alone(cache: Any) -> None:
    cache.leave([0, 1, 2, 3, 4, 5, 6])
    changed = cache.reserve([0, 1, 2, 3, 9, 9], epoch=2)
    assert changed.cached_len == 4
    cache.release(changed, keep_len=0)  # nothing of the turn is kept: what was left before is there for the next one
    again = cache.reserve([0, 1, 2, 3, 4, 5, 6, 7], epoch=3)
    assert again.cached_len == 7
    cache.release(again)


def test_stateless_use_shares_full_pages_and_leaves_no_tail(cache: Any) -> None:
    cache.leave(list(range(7)), session="", turn="x")
    assert cache.caches.state().num_cached == 1
    again = cache.reserve(list(range(8)), session="", turn="y")
    both = cache.reserve(list(range(8)), session="", turn="z")  # no epoch, no superseding without a session
    assert again.cached_len == both.cached_len == 4
    assert cache.aborted == []
    assert cache.caches.sessions.cached() == []
    cache.release(again)
    cache.release(both)


def test_random_lengths_find_exactly_what_was_left(make_cache: MakeCache, rng: random.Random) -> None:
    cache = make_cache(256)
    for turn in range(60):
        left = [rng.randrange(2) for _ in range(rng.randrange(1, 60))]
        session = f"s{turn}"
        cache.leave(left, session=session, salt=session.encode())
        common = rng.randrange(len(left) + 1)
        prompt = left[:common] + [2] + [rng.randrange(2) for _ in range(rng.randrange(10))]
        reservation = cache.reserve(prompt, session=session, epoch=2, salt=session.encode())
        in_tail = common >= len(left) // 4 * 4
        assert reservation.common_len == common
        assert reservation.cached_len == min(common if in_tail else common // 4 * 4, len(prompt) - 1)
        cache.release(reservation)


# ---- idempotence, epochs, attempts


def test_repeating_renews_and_tells_what_arrived(cache: Any) -> None:
    token_ids = list(range(10))
    first = cache.reserve(token_ids, ttl=10)
    cache.caches.uses.begin_receive(first.id, 0, 9)
    cache.caches.uses.end_receive(first.id, 7)
    cache.clock.now += 9
    again = cache.reserve(token_ids, ttl=10)
    assert again is first
    assert (again.cached_len, again.cached_len_at_first) == (7, 0)
    cache.clock.now += 9
    assert cache.caches.expire() == []
    cache.caches.advance(first.id, 10)
    assert first.cached_len == 9  # never more than all but the last prompt token
    assert cache.caches.state().num_reservations == 1
    cache.release(first)


def test_the_same_key_with_other_tokens_is_refused(cache: Any) -> None:
    first = cache.reserve([1, 2, 3])
    with pytest.raises(AlreadyExists) as refused:
        cache.reserve([1, 2, 4])
    assert refused.value.reason == "RESERVATION_KEY_REUSED"
    assert cache.caches.get(first.id) is first
    cache.caches.append_token(first.id, 9)
    assert cache.reserve([1, 2, 3]) is first  # what was appended since is no part of the prompt
    cache.release(first)


def test_a_higher_epoch_aborts_and_adopts(cache: Any) -> None:
    token_ids = list(range(10))
    old = cache.reserve(token_ids, epoch=5)
    cache.caches.advance(old.id, 10)
    new = cache.reserve([*token_ids, 1], epoch=6, turn="u")
    assert cache.aborted == [old.id]
    assert new.cached_len == 10
    with pytest.raises(NotFound):
        cache.caches.get(old.id)
    with pytest.raises(Aborted) as stale:
        cache.reserve(token_ids, epoch=5)
    assert stale.value.reason == "STALE_EPOCH"
    assert stale.value.metadata == {"epoch": "5", "current_epoch": "6"}
    cache.release(new)
    with pytest.raises(Aborted):  # remembered beyond the reservation's end
        cache.reserve(token_ids, epoch=5)


def test_a_later_attempt_supersedes_and_an_earlier_one_is_stale(cache: Any) -> None:
    old = cache.reserve(list(range(6)), attempt=1)
    cache.caches.advance(old.id, 6)
    new = cache.reserve(list(range(6)), attempt=2)
    assert cache.aborted == [old.id]
    assert new.cached_len == 5
    with pytest.raises(Aborted) as stale:
        cache.reserve(list(range(6)), attempt=1)
    assert stale.value.reason == "STALE_ATTEMPT"
    cache.release(new)


def test_epochs_of_other_sessions_do_not_matter(cache: Any) -> None:
    one = cache.reserve([1, 2], session="a", epoch=9)
    two = cache.reserve([1, 2], session="b", epoch=1)
    assert cache.aborted == []
    cache.release(one)
    cache.release(two)


def test_on_abort_is_called_outside_the_lock(cache: Any) -> None:
    seen: list[bool] = []

    def probe(_: str) -> None:
        import threading

        thread = threading.Thread(target=lambda: seen.append(cache.caches.state().num_reservations == 1))
        thread.start()
        thread.join(2)

    cache.caches.on_abort = probe
    cache.reserve([1, 2], epoch=1)
    new = cache.reserve([1, 2], epoch=2)
    assert seen == [True]
    cache.release(new)


# ---- limits


def test_no_pages_is_refused_and_changes_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(6)
    cache.leave(list(range(5)), session="idle")
    holder = cache.reserve(list(range(100, 113)), session="holder", ttl=1.5)  # 4 pages
    before = cache.caches.state()
    with pytest.raises(ResourceExhausted) as refused:
        cache.reserve([*range(5), *range(50, 58)], session="idle", epoch=2)  # 4, of which both idle ones
    assert refused.value.reason == "NO_PAGES"
    assert refused.value.retry_after_s == pytest.approx(1.5)
    assert cache.caches.state() == before
    cache.release(holder)
    again = cache.reserve([*range(5), *range(50, 58)], session="idle", epoch=2)
    assert again.cached_len == 5
    cache.release(again)


@pytest.mark.parametrize(("num_tokens", "fits"), [(23, True), (24, False), (1000, False)])
def test_a_prompt_longer_than_the_pool_names_both_numbers(make_cache: MakeCache, num_tokens: int, fits: bool) -> None:
    cache = make_cache(6)
    if fits:
        cache.release(cache.reserve([7] * num_tokens))
        return
    with pytest.raises(InvalidArgument) as refused:
        cache.reserve([7] * num_tokens)
    assert refused.value.reason == "EXCEEDS_CACHE"
    assert refused.value.field == "token_ids"
    assert refused.value.metadata == {"num_needed_pages": str(num_tokens // 4 + 1), "num_pages": "6"}
    assert str(num_tokens) in refused.value.message


@pytest.mark.parametrize("token_ids", [[], [-1], [1 << 32], ["a"], [1.5]])
def test_malformed_ids_are_refused(cache: Any, token_ids: list[Any]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        cache.reserve(token_ids)
    assert refused.value.field == "token_ids"


@pytest.mark.parametrize(
    ("ttl", "fits"), [(0.0, False), (-1.0, False), (float("nan"), False), (0.01, True), (60.0, True), (60.01, False)]
)
def test_time_to_live_is_bounded(cache: Any, ttl: float, fits: bool) -> None:
    assert MAX_RESERVATION_S == 60.0
    if fits:
        reservation = cache.reserve([1], ttl=ttl)
        cache.caches.renew(reservation.id, ttl)
        cache.release(reservation)
        return
    with pytest.raises(InvalidArgument):
        cache.reserve([1], ttl=ttl)
    reservation = cache.reserve([1])
    with pytest.raises(InvalidArgument):
        cache.caches.renew(reservation.id, ttl)
    cache.release(reservation)


def test_expiry_ends_and_reports_and_keeps_what_was_computed(cache: Any) -> None:
    short = cache.reserve(list(range(6)), session="a", ttl=1)
    long = cache.reserve([9], session="b", ttl=10)
    cache.caches.advance(short.id, 6)
    cache.clock.now += 1
    cache.caches.renew(long.id)
    assert cache.caches.expire() == cache.aborted == [short.id]
    assert short.state is ReservationState.ENDED
    again = cache.reserve(list(range(6)), session="a", ttl=1)  # the same key: made anew
    assert again.id != short.id
    assert again.cached_len == 5
    cache.clock.now += 1
    retry = cache.reserve(list(range(6)), session="a", attempt=1)  # reserve finds out about expiry by itself
    assert cache.aborted == [short.id, again.id]
    cache.release(retry)
    cache.release(long)


def test_unknown_ids_are_typed_errors_and_release_is_idempotent(cache: Any) -> None:
    caches: Reservations = cache.caches
    calls: list[Callable[[], object]] = [
        lambda: caches.get("x"),
        lambda: caches.renew("x"),
        lambda: caches.ensure_capacity("x", 1),
        lambda: caches.advance("x", 1),
        lambda: caches.append_token("x", 1),
        lambda: caches.preempt("x"),
        lambda: caches.resume("x"),
        lambda: caches.uses.begin("x"),
        lambda: caches.uses.end("x"),
        lambda: caches.uses.begin_receive("x", 0, 1),
        lambda: caches.uses.end_receive("x", 0),
        lambda: caches.slots("x", 0, 1),
        lambda: caches.page_table("x"),
    ]
    for call in calls:
        with pytest.raises(NotFound) as missing:
            call()
        assert missing.value.reason == "RESERVATION_NOT_FOUND"
    caches.release("x")
    reservation = cache.reserve([1])
    cache.release(reservation)
    cache.release(reservation)
    with pytest.raises(InvalidArgument):
        caches.release(reservation.id, -1)


# ---- growing


def test_decoding_grows_page_by_page_and_fills_the_tree(cache: Any, rng: random.Random) -> None:
    reservation = cache.reserve([1, 2, 3])
    cache.caches.advance(reservation.id, 3)
    for count in range(4, 40):
        cache.caches.append_token(reservation.id, rng.randrange(100))
        assert cache.caches.ensure_capacity(reservation.id, count)
        with pytest.raises(OutOfRange):
            cache.caches.advance(reservation.id, count + 1)
        cache.caches.advance(reservation.id, count)
        cache.caches.advance(reservation.id, count - 1)  # never goes back
        assert reservation.computed_len == count
        assert len(reservation.pages) == -(-count // 4)
        cache.caches.check_invariants()
    token_ids = list(reservation.token_ids)
    cache.release(reservation)
    again = cache.reserve([*token_ids, 1], epoch=2)
    assert (again.cached_len, again.common_len) == (39, 39)
    cache.release(again)


def test_growth_is_all_or_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    first = cache.reserve([1, 2, 3], session="a")
    second = cache.reserve([1, 2, 3], session="b")
    assert not cache.caches.ensure_capacity(first.id, 13)
    assert len(first.pages) == 1
    assert cache.caches.ensure_capacity(first.id, 12)
    assert cache.caches.ensure_capacity(first.id, 1)
    assert len(first.pages) == 3
    cache.release(second)
    assert cache.caches.ensure_capacity(first.id, 13)
    cache.release(first)


def test_slots_follow_the_page_table(cache: Any, rng: random.Random) -> None:
    reservation = cache.reserve(list(range(21)))
    table = cache.caches.page_table(reservation.id)
    assert table == reservation.pages
    for _ in range(30):
        first, end = sorted((rng.randrange(25), rng.randrange(25)))
        expected = [table[position // 4] * 4 + position % 4 for position in range(first, end)]
        assert cache.caches.slots(reservation.id, first, end) == expected
    for first, end in ((-1, 2), (3, 2), (0, 25)):
        with pytest.raises(OutOfRange):
            cache.caches.slots(reservation.id, first, end)
    cache.release(reservation)


def test_two_sequences_computing_the_same_page_do_not_leak_it(cache: Any) -> None:
    first = cache.reserve(list(range(10)), session="a")
    second = cache.reserve(list(range(10)), session="b")
    for reservation in (first, second):
        cache.caches.advance(reservation.id, 10)
        cache.caches.check_invariants()
    assert not set(first.pages) & set(second.pages)
    cache.release(first)
    assert cache.caches.state().num_cached == 1  # its tail: the tree's two pages are pinned by the second
    cache.release(second)
    assert cache.caches.state().num_cached == 4  # two full pages once, two tails


# ---- truncation


@pytest.mark.parametrize("keep_len", [0, 1, 3, 4, 5, 7, 8, 9, 10, 11, 99])
def test_release_truncates_and_the_cut_page_becomes_the_tail(cache: Any, keep_len: int) -> None:
    token_ids = list(range(11))
    cache.leave(token_ids, keep_len=keep_len)
    kept = min(keep_len, 11)
    assert cache.caches.state().num_cached == -(-kept // 4)
    again = cache.reserve([*token_ids, 5], epoch=2)
    assert (again.cached_len, again.common_len) == (kept, kept)
    cache.release(again)


def test_truncation_leaves_shared_pages_in_the_tree(cache: Any) -> None:
    cache.leave(list(range(8)), session="a")
    later = cache.reserve([*range(8), 20, 21, 22, 23, 24], session="b")
    cache.caches.advance(later.id, 13)
    reader = cache.reserve([*range(8), 20, 21, 22, 23, 30], session="c")
    assert reader.cached_len == 12
    cache.release(later, keep_len=6)  # cuts a page that it found here: stays whole; the next one is being read by c
    assert cache.caches.get(reader.id).cached_len == 12
    assert cache.caches.state().num_cached == 0
    cache.release(reader)
    assert cache.caches.state().num_cached == 3


def test_truncation_does_not_free_what_others_left(cache: Any) -> None:
    cache.leave(list(range(8)), session="a")
    failed = cache.reserve([*range(8), 9, 9], session="b")
    cache.release(failed, keep_len=0)
    again = cache.reserve([*range(8), 5], session="c")
    assert again.cached_len == 8
    cache.release(again)


# ---- preemption


def test_preemption_gives_pages_back_and_resumes_from_what_is_left(make_cache: MakeCache) -> None:
    cache = make_cache(6)
    victim = cache.reserve(list(range(10)), session="a")
    cache.caches.advance(victim.id, 10)
    cache.caches.append_token(victim.id, 77)
    assert cache.caches.preempt(victim.id)
    assert cache.caches.preempt(victim.id)
    cache.caches.check_invariants()
    assert (victim.pages, victim.computed_len, victim.state) == ([], 0, ReservationState.PREEMPTED)
    with pytest.raises(FailedPrecondition) as refused:
        cache.caches.ensure_capacity(victim.id, 1)
    assert refused.value.reason == "PREEMPTED"
    other = cache.reserve(list(range(50, 65)), session="b")  # 4 of 6 pages: the victim's tail must go
    assert not cache.caches.resume(victim.id)
    assert victim.state is ReservationState.PREEMPTED
    cache.release(other, keep_len=0)
    assert cache.caches.resume(victim.id)
    cache.caches.check_invariants()
    assert victim.computed_len == 8
    assert victim.cached_len_at_first == 0
    assert len(victim.pages) == 3
    assert victim.token_ids == [*range(10), 77]
    cache.release(victim)


def test_a_preempted_reservation_that_ends_leaves_what_it_had(cache: Any) -> None:
    token_ids = list(range(10))
    victim = cache.reserve(token_ids)
    cache.caches.advance(victim.id, 10)
    assert cache.caches.preempt(victim.id)
    cache.release(victim)
    again = cache.reserve([*token_ids, 1], epoch=2)
    assert (again.cached_len, again.common_len) == (10, 10)
    cache.release(again)


def test_pages_in_use_are_not_preempted(cache: Any) -> None:
    reservation = cache.reserve(list(range(10)))
    cache.caches.uses.begin(reservation.id)
    assert not cache.caches.preempt(reservation.id)
    assert len(reservation.pages) == 3
    cache.caches.uses.end(reservation.id)
    assert cache.caches.preempt(reservation.id)
    cache.release(reservation)


# ---- uses


@pytest.mark.parametrize("how", ["epoch", "release", "expire"])
def test_pages_of_a_dead_reservation_come_back_after_the_receive(make_cache: MakeCache, how: str) -> None:
    cache = make_cache(7)
    token_ids = list(range(11))
    dead = cache.reserve(token_ids, ttl=1)
    cache.caches.uses.begin_receive(dead.id, 0, 10)
    pages = list(dead.pages)
    if how == "epoch":
        new = cache.reserve(token_ids, epoch=2)
        assert not set(new.pages) & set(pages)
        assert new.cached_len == 0
        cache.release(new)
    elif how == "release":
        cache.release(dead)
    else:
        cache.clock.now += 2
        assert cache.caches.expire() == [dead.id]
    cache.caches.check_invariants()
    with pytest.raises(NotFound):
        cache.caches.get(dead.id)
    assert cache.caches.state().num_free == 4
    assert cache.caches.state().num_reservations == 1
    other = cache.reserve(list(range(50, 60)), session="other")
    assert not set(other.pages) & set(pages)
    with pytest.raises(ResourceExhausted):
        cache.reserve(list(range(70, 80)), session="third")
    cache.caches.uses.end_receive(dead.id, 9)
    cache.caches.check_invariants()
    assert dead.state is ReservationState.ENDED
    assert cache.caches.state().num_reservations == 1
    cache.release(other)
    again = cache.reserve(token_ids, epoch=3)
    assert again.cached_len == (8 if how == "epoch" else 9)  # what verified is used; a superseded one leaves no tail
    cache.release(again)


def test_a_receive_that_brought_nothing_leaves_nothing(cache: Any) -> None:
    dead = cache.reserve(list(range(11)))
    cache.caches.uses.begin_receive(dead.id, 0, 10)
    cache.release(dead)
    cache.caches.uses.end_receive(dead.id, 0)
    assert cache.caches.state().num_free == 16


def test_receives_are_one_at_a_time_and_within_what_is_missing(cache: Any) -> None:
    caches: Reservations = cache.caches
    cache.leave(list(range(6)))
    reservation = cache.reserve(list(range(13)), epoch=2)
    assert reservation.cached_len == 6
    for first, end in ((7, 10), (3, 10), (6, 6), (6, 14), (8, 6), (-1, 6)):
        with pytest.raises(OutOfRange):
            caches.uses.begin_receive(reservation.id, first, end)
    caches.uses.begin_receive(reservation.id, 5, 12)  # 5 is there, in a page of its own: writing it again is harmless
    with pytest.raises(FailedPrecondition) as refused:
        caches.uses.begin_receive(reservation.id, 6, 12)
    assert refused.value.reason == "RECEIVE_IN_FLIGHT"
    with pytest.raises(FailedPrecondition) as refused:
        caches.uses.end(reservation.id)
    assert refused.value.reason == "NOT_IN_USE"
    caches.uses.end_receive(reservation.id, 3)  # nothing arrived
    assert reservation.computed_len == 6
    with pytest.raises(FailedPrecondition) as refused:
        caches.uses.end_receive(reservation.id, 9)
    assert refused.value.reason == "NO_RECEIVE"
    caches.uses.begin_receive(reservation.id, 6, 10)
    with pytest.raises(OutOfRange):
        caches.uses.end_receive(reservation.id, 11)
    assert (reservation.computed_len, reservation.num_uses) == (6, 0)
    caches.uses.begin_receive(reservation.id, 6, 12)
    caches.uses.end_receive(reservation.id, 12)
    assert reservation.cached_len == 12
    cache.release(reservation)


def test_a_step_that_outlives_its_reservation_keeps_the_pages(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    caches: Reservations = cache.caches
    dead = cache.reserve(list(range(10)))
    assert caches.uses.begin(dead.id) is dead
    caches.uses.begin(dead.id)
    cache.release(dead)
    caches.advance(dead.id, 10)  # the step may finish what it does
    caches.append_token(dead.id, 5)
    assert caches.slots(dead.id, 0, 2)
    caches.uses.end(dead.id)
    with pytest.raises(ResourceExhausted):
        cache.reserve(list(range(20, 28)), session="b")
    with pytest.raises(NotFound):
        caches.uses.begin(dead.id)
    caches.uses.end(dead.id)
    with pytest.raises(NotFound):
        caches.uses.end(dead.id)
    again = cache.reserve(list(range(11)), epoch=2)
    assert (again.cached_len, again.common_len) == (10, 10)
    cache.release(again)


# ---- eviction


def test_the_least_recently_used_sessions_go_first_deepest_page_first(make_cache: MakeCache) -> None:
    cache = make_cache(9)
    for session in ("a", "b", "c"):
        cache.leave([ord(session)] * 10, session=session)  # 3 pages each, one of them a tail
        cache.clock.now += {"a": 1.0, "b": 1e5, "c": 1e3}[session]
    cache.leave([ord("a")] * 10, session="a", epoch=2)
    big = cache.reserve(list(range(8)), session="d")  # 3 pages: all of b's, and none else's
    assert cache.caches.sessions.cached() == ["d", "a", "c"]
    cache.release(big, keep_len=0)
    assert cache.caches.sessions.cached() == ["a", "c"]
    filler = cache.reserve(list(range(12)), session="d", epoch=2)  # 4: c's tail beside the 3 free ones
    c = cache.reserve([ord("c")] * 11, session="c", epoch=2)
    assert (c.cached_len, c.common_len) == (8, 10)
    cache.release(c)
    cache.release(filler)


def test_what_the_next_turn_does_not_reach_goes_first(make_cache: MakeCache) -> None:
    cache = make_cache(6)
    reservation = cache.reserve([1] * 10, session="a")
    cache.caches.advance(reservation.id, 10)
    cache.caches.release(reservation.id, 10, reuse_len=6)  # of 2 full pages and a tail, the first page
    assert cache.caches.state().num_free == 4, "no tail is kept"
    cache.clock.now += 1e6
    cache.leave([2] * 10, session="b")
    cache.clock.now += 1.0
    cache.release(cache.reserve([3] * 7, session="c"), keep_len=0)  # 2 pages: a free one and a's second
    found = cache.reserve([1] * 11, session="a", epoch=2)
    assert (found.cached_len, found.common_len, found.left_len) == (4, 10, 10), "what it left is still known"
    cache.release(found, keep_len=0)
    with pytest.raises(InvalidArgument, match="reuse_len"):
        cache.caches.release("r", reuse_len=-1)


def test_eviction_never_orphans_a_page(make_cache: MakeCache, rng: random.Random) -> None:
    cache = make_cache(12)
    for turn in range(200):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
        cache.leave(prompt, session=f"s{rng.randrange(5)}", turn=str(turn), epoch=turn)
    assert cache.caches.state().num_cached > 0


def test_sessions_are_most_recent_first_and_leave_with_their_pages(make_cache: MakeCache) -> None:
    cache = make_cache(6)
    cache.leave([1] * 6, session="a")
    cache.leave([2] * 6, session="b")
    assert cache.caches.sessions.cached() == ["b", "a"]
    live = cache.reserve([1] * 7, session="a", epoch=2)
    assert cache.caches.sessions.cached() == ["a", "b"]
    cache.release(live)
    cache.leave([3] * 23, session="", turn="x")
    assert cache.caches.sessions.cached() == []


# ---- beside


def test_no_repr_shows_tokens(cache: Any) -> None:
    reservation = cache.reserve([987654, 987655, 987656, 987657, 987658])
    cache.caches.advance(reservation.id, 5)
    shown = repr(reservation) + repr(reservation.nodes)
    assert reservation.id in shown
    assert "98765" not in shown
    assert repr(reservation.digests[0]) not in shown
    cache.release(reservation)


def test_common_prefix_len_agrees_with_a_loop(rng: random.Random) -> None:
    for _ in range(200):
        left = [rng.randrange(2) for _ in range(rng.randrange(12))]
        right = left[: rng.randrange(13)] + [rng.randrange(2) for _ in range(rng.randrange(4))]
        expected = 0
        while expected < min(len(left), len(right)) and left[expected] == right[expected]:
            expected += 1
        assert common_prefix_len(left, right) == expected


def test_the_pool_needs_pages() -> None:
    with pytest.raises(InvalidArgument):
        Reservations(num_pages=0, fingerprint="f", layout="l")
