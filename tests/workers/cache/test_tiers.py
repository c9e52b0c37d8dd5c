"""Pages below the device: when they are copied, what may be dropped, how they come back. Nobody moves bytes here."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from seamount.wire.errors import FailedPrecondition, ResourceExhausted
from seamount.wire.hashes import page_hashes, root_hash
from seamount.workers.cache.first_copies import MAX_COPYING_S
from seamount.workers.cache.retention import Importance, LeaseOutcome, Tier
from seamount.workers.cache.session_door import AHEAD_S
from seamount.workers.cache.tier_door import StoredPage

from .conftest import SALT, MakeTiered, TieredCache

A, B, C = [1] * 10, [2] * 10, [3] * 10
"""Two full pages and a tail of two tokens each."""


def states(cache: TieredCache) -> Mapping[Tier, int]:
    return {tier: cache.caches.tiers.state(tier).num_cached for tier in (Tier.HOST, Tier.DISK)}


def test_full_pages_are_copied_down_one_tier_after_the_other(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8, disk=8)
    cache.leave(A)
    assert cache.caches.tiers.next_copies(Tier.DISK, 9) == [], "the host comes first"
    copies = cache.caches.tiers.next_copies(Tier.HOST, 9)
    assert [copy.node.depth for copy in copies] == [0, 1]
    for copy in copies:
        assert cache.caches.tiers.copied(copy, 5)
    (first, second) = cache.caches.tiers.next_copies(Tier.DISK, 9)
    assert first.source == first.node.copies[Tier.HOST]
    assert first.source is not None
    assert first.source.crc == 5
    cache.caches.tiers.copied(first, 5)
    cache.caches.tiers.copied(second, 5)
    assert states(cache) == {Tier.HOST: 2, Tier.DISK: 2}
    assert not cache.caches.tiers.is_busy


def test_a_session_that_left_the_device_is_restored(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    cache.leave(A)
    cache.settle()
    cache.press()
    back = cache.reserve([*A, 7], epoch=2)
    assert (back.cached_len, back.computed_len, back.is_restoring) == (8, 0, True)
    assert back.num_tokens_from(Tier.HOST) == 8
    with pytest.raises(FailedPrecondition, match="being restored"):
        cache.caches.uses.begin_receive(back.id, 0, 4)
    cache.settle()
    assert back.restored is not None
    assert back.restored.done()
    assert (back.cached_len, back.computed_len, back.is_restoring) == (8, 8, False)
    cache.release(back)


def test_without_a_copy_a_page_is_lost_and_a_copy_of_it_does_not_count(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    cache.leave(A)
    copies = cache.caches.tiers.next_copies(Tier.HOST, 9)
    cache.clock.now += MAX_COPYING_S
    cache.press()
    assert [cache.caches.tiers.copied(copy, 0) for copy in copies] == [False, False]
    assert states(cache)[Tier.HOST] == 0
    assert cache.reserve(A, epoch=2).cached_len == 0


def test_a_copy_that_was_read_while_its_page_was_away_does_not_count(make_tiered: MakeTiered) -> None:
    cache = make_tiered(3, host=8, disk=8)
    cache.leave([1] * 5)
    cache.settle()
    (node,) = cache.nodes(Tier.HOST)
    cache.caches._cache.lose_copy(node, Tier.HOST)
    cache.release(cache.reserve([1] * 5, epoch=2))
    (copy,) = cache.caches.tiers.next_copies(Tier.HOST, 9)
    page = node.page
    cache.press()
    for turn in range(3, 20):  # until it comes back to the very page
        back = cache.reserve([1] * 5, epoch=turn)
        restore = cache.caches.tiers.next_restore(9)
        assert restore is not None
        cache.caches.tiers.restored(restore, 1)
        cache.release(back)
        if node.page == page:
            break
        cache.press()
    assert node.page == page
    assert not cache.caches.tiers.copied(copy, 0)
    cache.caches.check_invariants()


def test_a_copy_whose_source_was_given_up_does_not_count(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8, disk=8)
    cache.leave([1] * 5)
    (copy,) = cache.caches.tiers.next_copies(Tier.HOST, 9)
    cache.caches.tiers.copied(copy, 0)
    (copy,) = cache.caches.tiers.next_copies(Tier.DISK, 9)
    assert copy.source is not None
    cache.caches._cache.lose_copy(copy.node, Tier.HOST)
    assert not cache.caches.tiers.copied(copy, 0)
    cache.settle()
    assert states(cache) == {Tier.HOST: 1, Tier.DISK: 1}


def test_what_two_reservations_wait_for_is_read_once(make_tiered: MakeTiered) -> None:
    cache = make_tiered(12, host=8)
    cache.leave([1] * 12, session="a")
    cache.settle()
    cache.press()
    first, second = cache.reserve([*[1] * 12, 2], session="b"), cache.reserve([*[1] * 12, 3], session="c")
    restore = cache.caches.tiers.next_restore(9)
    assert restore is not None
    assert len(restore.fetches) == 3
    cache.caches.tiers.restored(restore, 3)
    assert cache.caches.tiers.next_restore(9) is None
    assert first.computed_len == second.computed_len == 12
    assert first.pages[:3] == second.pages[:3], "shared, and the second one's own pages given back"
    assert cache.caches.state().num_free == 12 - 3 - 2
    cache.release(first)
    cache.release(second)


@pytest.mark.parametrize("tiers", [{"host": 8}, {"disk": 8}, {"host": 8, "disk": 8}])
def test_a_damaged_page_is_taken_from_another_tier_or_computed(make_tiered: MakeTiered, tiers: dict[str, int]) -> None:
    cache = make_tiered(8, **tiers)
    cache.leave([1] * 18)
    cache.settle()
    cache.press()
    back = cache.reserve([1] * 18, epoch=2)
    restore = cache.caches.tiers.next_restore(9)
    assert restore is not None
    cache.caches.tiers.restored(restore, 1, restore.fetches[1])
    cache.caches.check_invariants()
    assert back.computed_len == 4
    has_other = len(tiers) == 2
    assert states(cache)[restore.fetches[0].tier] == 1, "what lies behind a lost page cannot be reached there"
    cache.settle()
    assert back.computed_len == (16 if has_other else 4)
    assert back.num_tokens_from(restore.fetches[0].tier) == 4
    assert back.num_tokens_from(Tier.DISK) == (12 if has_other else 4 if "disk" in tiers else 0)
    cache.caches.advance(back.id, 18)
    cache.release(back)
    cache.settle()
    assert set(states(cache).values()) <= {0, 4}, "copied again"


def test_bytes_of_a_slot_that_was_given_up_while_it_was_read_are_not_used(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    cache.leave([1] * 10)
    cache.settle()
    cache.press()
    back = cache.reserve([1] * 10, epoch=2)
    restore = cache.caches.tiers.next_restore(9)
    assert restore is not None
    cache.caches._cache.lose_copy(restore.fetches[0].node, Tier.HOST)
    cache.caches.tiers.restored(restore, 2)
    cache.settle()
    assert back.computed_len == 0
    cache.release(back)


def test_an_unreadable_tier_ends_the_restore(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=8)
    cache.leave([1] * 14)
    cache.settle()
    cache.press()
    back = cache.reserve([1] * 14, epoch=2)
    restore = cache.caches.tiers.next_restore(9)
    assert restore is not None
    cache.caches.tiers.restored(restore, 1)
    assert (back.is_restoring, back.computed_len, back.cached_len) == (False, 4, 4)
    assert back.num_tokens_from(Tier.HOST) == 4
    cache.release(back)
    assert cache.reserve([1] * 14, epoch=3).cached_len == 12, "the copies are still there"


def test_a_full_tier_drops_what_is_worth_least(make_tiered: MakeTiered) -> None:
    cache = make_tiered(30, host=4)
    for ids, session in ((A, "a"), (B, "b"), (C, "c")):
        cache.leave(ids, session=session)
        cache.settle()
        cache.clock.now += 1000.0
    assert {node.session_id for node in cache.nodes(Tier.HOST)} == {"b", "c"}
    cache.press()
    assert cache.reserve(A, session="a", epoch=9).cached_len == 0
    assert cache.reserve(B, session="b", epoch=9).cached_len == 8


def test_superseded_pages_get_no_copies(make_tiered: MakeTiered) -> None:
    cache = make_tiered(30, host=8)
    cache.leave([1] * 18, session="a")
    cache.leave([*[1] * 4, *[2] * 6], session="a", epoch=2)
    cache.settle()
    assert len(cache.nodes(Tier.HOST)) == 2, "the first page, and the one that the session went on with"


def test_a_lease_may_be_demoted_and_is_never_dropped(make_tiered: MakeTiered) -> None:
    cache = make_tiered(6, host=4)
    cache.leave(A, session="a")
    lease = cache.caches.sessions.retain("a", duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    assert (lease.outcome, lease.tier) == (LeaseOutcome.ACCEPTED, Tier.DEVICE)
    with pytest.raises(ResourceExhausted):  # nothing has a copy yet
        cache.reserve([9] * 15, session="big")
    cache.settle()
    cache.release(cache.reserve([9] * 23, session="big", epoch=2), keep_len=0)
    assert cache.caches.state().num_cached == 0, "the leased pages have left the device"
    for number in range(5):
        cache.leave([20 + number] * 17, session=f"s{number}")
        cache.settle()
    back = cache.reserve([*A, 1], session="a", epoch=2)
    assert (back.cached_len, back.is_leased) == (8, True)
    cache.release(back)
    cache.clock.now += 1e6
    cache.caches.expire()
    cache.settle()
    cache.leave([50] * 17, session="last")
    cache.settle()
    cache.press()
    assert cache.reserve(A, session="a", epoch=3).cached_len < 8, "it is over"


def test_a_lease_does_not_displace_another(make_tiered: MakeTiered) -> None:
    cache = make_tiered(12, host=2)
    for ids, session in ((A, "a"), (B, "b")):
        cache.leave(ids, session=session)
        cache.caches.sessions.retain(session, duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
        cache.settle()
        cache.clock.now += 30.0
    cache.press()
    assert {node.session_id for node in cache.nodes(Tier.HOST)} == {"a"}
    assert cache.caches.state().num_leased == 3, "the other's stay on the device, its tail too"
    assert cache.reserve([*A, 1], session="a", epoch=2).cached_len == 8
    assert cache.reserve([*B, 1], session="b", epoch=2).cached_len == 10


def test_copies_that_somebody_waits_for_stay(make_tiered: MakeTiered) -> None:
    cache = make_tiered(12, host=2)
    cache.leave(A, session="a")
    cache.settle()
    cache.press()
    cache.clock.now += 1e6
    back = cache.reserve([*A, 1], session="a", epoch=2)
    cache.leave(B, session="b")
    assert cache.caches.tiers.next_copies(Tier.HOST, 9) == []
    cache.settle()
    assert back.computed_len == 8
    cache.release(back)


def test_the_answer_names_the_tier_that_has_room(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=16)
    for number in range(3):
        cache.leave([number + 1] * 8, session=f"s{number}")
    tiers = [
        cache.caches.sessions.retain(
            f"s{number}", duration_s=200.0, importance=Importance.NORMAL, prefill_tokens_per_s=0.0
        )
        for number in range(3)
    ]
    assert [(one.outcome, one.tier) for one in tiers] == [
        (LeaseOutcome.ACCEPTED, Tier.DEVICE),
        (LeaseOutcome.ACCEPTED, Tier.HOST),
        (LeaseOutcome.ACCEPTED, Tier.HOST),
    ]
    cache.caches.check_invariants()


def test_before_a_lease_ends_its_pages_come_up(make_tiered: MakeTiered) -> None:
    cache = make_tiered(16, host=16)
    cache.leave(A, session="a")
    cache.caches.sessions.retain("a", duration_s=60.0, importance=Importance.HIGH, prefill_tokens_per_s=0.0)
    cache.settle()
    cache.press()
    cache.clock.now += 60.0 - AHEAD_S - 0.5
    cache.caches.expire()
    assert not cache.caches.tiers.is_busy
    cache.clock.now += 1.0
    cache.caches.expire()
    assert cache.caches.tiers.is_busy
    cache.settle()
    assert cache.caches.state().num_reservations == 0
    back = cache.reserve([*A, 1], session="a", epoch=2)
    assert (back.computed_len, back.is_restoring) == (8, False)
    cache.release(back)


def test_pages_come_up_ahead_only_where_there_is_room(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, host=16)
    cache.leave([1] * 26, session="a")
    cache.settle()
    assert not cache.caches.sessions.restore_ahead("a"), "it is there"
    cache.press()
    held = cache.reserve([2] * 7, session="b")
    assert not cache.caches.sessions.restore_ahead("a"), "6 pages are available and it needs 6"
    assert not cache.caches.sessions.restore_ahead("nobody")
    cache.release(held, keep_len=0)


def test_a_turn_takes_over_what_is_brought_up_ahead_of_it(make_tiered: MakeTiered) -> None:
    cache = make_tiered(12, host=16)
    cache.leave([1] * 18, session="a")
    cache.settle()
    cache.press()
    assert cache.caches.sessions.restore_ahead("a")
    restore = cache.caches.tiers.next_restore(2)
    assert restore is not None
    cache.caches.tiers.restored(restore, 2)
    under_way = cache.caches.tiers.next_restore(1)
    assert under_way is not None
    back = cache.reserve([1] * 18, session="a", epoch=2)
    assert (back.computed_len, back.cached_len) == (8, 16)
    cache.caches.tiers.restored(under_way, 1)
    cache.settle()
    assert back.computed_len == 16
    assert cache.caches.state().num_reservations == 1
    cache.release(back)


def test_a_slot_that_cannot_be_written_is_not_used_again(make_tiered: MakeTiered) -> None:
    cache = make_tiered(8, disk=2)
    cache.leave(A)
    first, second = cache.caches.tiers.next_copies(Tier.DISK, 9)
    assert not cache.caches.tiers.copied(first, None)
    assert not cache.caches.tiers.copied(second, 0), "the page before it is not there"
    cache.caches.check_invariants()
    assert cache.caches.tiers.state(Tier.DISK).num_pages == 1


def stored(token_ids: list[int], depth: int, slot: int, *, session: str = "", order: int = 0) -> StoredPage:
    root = root_hash(SALT, "f", "l")
    hashes = [root, *page_hashes(root, token_ids, 4)]
    packed = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids[4 * depth : 4 * depth + 4])
    return StoredPage(
        slot=slot,
        crc=0,
        digest=hashes[depth + 1],
        parent=hashes[depth],
        root=root,
        depth=depth,
        token_ids=packed,
        session_id=session,
        order=order,
    )


def test_pages_of_an_earlier_process_are_adopted(make_tiered: MakeTiered, rng: random.Random) -> None:
    cache = make_tiered(16, disk=10)
    ids = [5] * 16
    pages = [stored(ids, depth, 7 - depth, session="s", order=depth) for depth in range(4)]
    pages.append(stored([6] * 8, 1, 9))  # the page before it is missing
    pages.append(stored(ids, 2, 1, session="s", order=2))  # twice
    rng.shuffle(pages)
    orphans = cache.caches.tiers.adopt(Tier.DISK, pages)
    assert len(orphans) == 2
    assert 9 in orphans
    cache.caches.check_invariants()
    assert cache.caches.sessions.cached() == ["s"]
    back = cache.reserve([*ids, 1], session="s")
    assert (back.cached_len, back.common_len, back.left_len) == (16, 16, 16)
    cache.settle()
    assert back.computed_len == 16
    cache.release(back)
    cache.leave([8] * 17, session="t")
    cache.settle()
    assert states(cache)[Tier.DISK] == 8, "slots of orphans are free"
