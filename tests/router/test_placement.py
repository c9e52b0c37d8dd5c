"""Placement: which rank, which path. Tables, no I/O."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seamount.router.placement import (
    Need,
    PathRules,
    Placed,
    RankLoad,
    choose_decode_rank,
    choose_path,
    is_far_worse,
    local_append_s,
    remote_s,
    tenant_weight,
)
from seamount.wire.ids import RankId

BASE = RankLoad(
    rank_id=RankId("a"),
    address="127.0.0.1:1",
    num_free_pages=1000,
    num_cached_pages=0,
    num_running=0,
    num_answers=0,
    num_queued_prefill_tokens=0,
    prefill_tokens_per_s=1000.0,
    pull_bytes_per_s=1e6,
    push_bytes_per_s=1e6,
    kv_bytes_per_token=100,
)
NEW = Need(num_tokens=1000)
LOCAL = PathRules(policy="local")


def load(name: str, **changes: object) -> RankLoad:
    return replace(BASE, rank_id=RankId(name), **changes)


def chosen(ranks: list[RankLoad], need: Need, **more: object) -> Placed:
    source = next((rank for rank in ranks if rank.rank_id == need.home), None)
    placed = choose_decode_rank(ranks, need, **({"source": source, "rules": LOCAL} | more))  # type: ignore[arg-type]
    assert placed is not None
    return placed


UNMEASURED = {"prefill_tokens_per_s": 0.0}


@pytest.mark.parametrize(
    ("ranks", "home", "excluded", "expected"),
    [
        ([load("a"), load("b")], None, (), "a"),
        ([load("a", num_answers=1, num_gang_answers=1), load("b")], None, (), "b"),
        ([load("a", num_answers=1), load("b", num_answers=2)], None, (), "a"),
        ([load("a", num_free_pages=100), load("b", num_free_pages=200)], None, (), "b"),
        ([load("a", num_free_pages=100, num_cached_pages=500), load("b", num_free_pages=200)], None, (), "a"),
        ([load("a"), load("b")], "b", (), "b"),
        ([load("a"), load("b")], "b", ("b",), "a"),
        ([load("a"), load("b")], "gone", (), "a"),
        # Nobody has measured anything: the home, else the least busy.
        ([load("a", **UNMEASURED), load("b", num_answers=9, **UNMEASURED)], "b", (), "b"),
        ([load("a", num_answers=1, **UNMEASURED), load("b", **UNMEASURED)], None, (), "b"),
        # A rank that has measured nothing yet counts like its peers.
        ([load("a", num_gang_answers=3), load("b", **UNMEASURED)], None, (), "b"),
    ],
)
def test_decode_rank(ranks: list[RankLoad], home: str | None, excluded: tuple[str, ...], expected: str) -> None:
    need = Need(num_tokens=1000, home=RankId(home) if home else None, num_home=900 if home else 0)
    assert chosen(ranks, need, excluded=excluded).rank.rank_id == expected


def test_no_rank_is_left() -> None:
    assert choose_decode_rank([], NEW) is None
    assert choose_decode_rank([load("a")], NEW, excluded=[RankId("a")]) is None


@pytest.mark.parametrize(
    ("case", "home", "other", "need", "expected", "moves"),
    [
        # 100 tokens missing at home cost 0.1 s; elsewhere the pages of 896 tokens take 0.09 s besides.
        ("an idle home", {}, {}, {}, "home", False),
        ("one stream delayed", {"num_gang_answers": 1}, {}, {}, "home", False),
        ("streams of a peer of the gang count", {"num_answers": 0, "num_gang_answers": 4}, {}, {}, "other", True),
        ("a long queue", {"num_queued_prefill_tokens": 2000}, {}, {}, "other", True),
        (
            "a long queue in both",
            {"num_queued_prefill_tokens": 2000},
            {"num_queued_prefill_tokens": 2000},
            {},
            "home",
            0,
        ),
        ("answers wait for places", {"num_blocked": 2, "answer_s": 4.0, "num_running": 8}, {}, {}, "other", True),
        (
            "a slow link: to compute it anew is sooner",
            {"num_gang_answers": 40},
            {"pull_bytes_per_s": 1e3},
            {},
            "other",
            0,
        ),
        ("no pages at home", {"num_free_pages": 1}, {}, {}, "other", True),
        ("no pages anywhere", {"num_free_pages": 1}, {"num_free_pages": 1}, {}, "home", False),
        ("a slow restore", {"restore_bytes_per_s": 1e4}, {}, {"num_below": 900}, "other", False),
        ("a fast restore", {"restore_bytes_per_s": 1e7}, {}, {"num_below": 900}, "home", False),
        ("less than a page to move", {"num_gang_answers": 40}, {}, {"num_home": 63}, "other", False),
    ],
)
def test_a_session_leaves_its_home_where_that_is_sooner(
    case: str, home: dict[str, object], other: dict[str, object], need: dict[str, int], expected: str, moves: bool
) -> None:
    ranks = [load("home", **home), load("other", **other)]
    wanted = Need(**({"num_tokens": 1000, "num_home": 900} | need), home=RankId("home"))  # type: ignore[arg-type]
    placed = chosen(ranks, wanted)
    assert (placed.rank.rank_id, placed.moves) == (expected, bool(moves)), case


def test_estimates_add_up() -> None:
    home = load("home", num_gang_answers=20)
    placed = chosen(
        [home, load("other", num_queued_prefill_tokens=300)], Need(num_tokens=1000, home=home.rank_id, num_home=900)
    )
    found = placed.estimate
    assert found is not None
    assert found.num_moved == 896, "full pages alone"
    assert found.move_s == pytest.approx(896 * 100 / 1e6)
    assert found.compute_s == pytest.approx((300 + 104) / 1000)
    assert found.first_token_s == pytest.approx(found.move_s + found.compute_s)


def test_a_leaving_home_is_a_source_and_no_candidate() -> None:
    need = Need(num_tokens=1000, home=RankId("home"), num_home=900)
    placed = choose_decode_rank([load("other")], need, source=load("home"), rules=LOCAL)
    assert placed is not None
    assert (placed.rank.rank_id, placed.moves) == ("other", True)
    gone = choose_decode_rank([load("other")], need, source=None, rules=LOCAL)
    assert gone is not None
    assert not gone.moves


def test_turns_that_start_together_spread() -> None:
    """Ranks of different measured speed, too: each turn that was placed a moment ago is charged."""
    ranks = {"a": load("a", prefill_tokens_per_s=1500.0), "b": load("b")}
    for _ in range(10):
        name = chosen(list(ranks.values()), NEW).rank.rank_id
        before = ranks[name]
        ranks[name] = replace(before, num_answers=before.num_answers + 1, num_gang_answers=before.num_gang_answers + 1)
    assert min(rank.num_answers for rank in ranks.values()) >= 3


def test_a_prefill_pool_shortens_the_estimate_where_streams_would_wait() -> None:
    busy = load("a", num_gang_answers=50)
    alone = chosen([busy], NEW, rules=PathRules())
    helped = chosen([busy], NEW, rules=PathRules(), prefills=[load("p")])
    assert alone.estimate is not None
    assert helped.estimate is not None
    assert alone.estimate.compute_s == pytest.approx(51.0)
    assert helped.estimate.compute_s == pytest.approx(1.0 + 0.1)


def test_tenants_with_more_than_their_share_weigh_the_delay_of_others() -> None:
    assert tenant_weight({}, "a") == 1.0
    assert tenant_weight({"a": 5}, "a") == 1.0, "alone"
    assert tenant_weight({"a": 5, "b": 5}, "a") == 1.0
    assert tenant_weight({"a": 9, "b": 1}, "a") == pytest.approx(1.8)
    assert tenant_weight({"a": 9, "b": 1}, "b") == 1.0
    # One stream of another waits at the faster rank: a tenant with its equal share goes there all the same.
    ranks = [load("fast", prefill_tokens_per_s=2000.0, num_gang_answers=1), load("slow", prefill_tokens_per_s=700.0)]
    assert chosen(ranks, Need(num_tokens=1000)).rank.rank_id == "fast"
    assert chosen(ranks, Need(num_tokens=1000, tenant_weight=4.0)).rank.rank_id == "slow"


def test_a_choice_is_repeated_where_the_home_lost_most_of_it() -> None:
    need = Need(num_tokens=5000, home=RankId("a"), num_home=4000)
    rules = PathRules(local_append_max_tokens=512)
    assert is_far_worse(need, 0, rules)
    assert not is_far_worse(need, 2000, rules)
    assert not is_far_worse(replace(need, num_home=512), 0, rules)


def path(
    *,
    num_missing: int = 1000,
    num_cached: int = 0,
    decode: RankLoad = BASE,
    prefills: tuple[RankLoad, ...] = (load("p"),),
    excluded: tuple[str, ...] = (),
    tenant_weight: float = 1.0,
    **rules: object,
) -> str | None:
    found = choose_path(
        decode,
        prefills,
        num_cached=num_cached,
        num_missing=num_missing,
        rules=PathRules(**rules),  # type: ignore[arg-type]
        excluded=[RankId(name) for name in excluded],
        tenant_weight=tenant_weight,
    )
    return found.rank_id if found else None


def test_policies_that_never_compare() -> None:
    assert path(policy="local") is None
    assert path(policy="remote", num_missing=2) == "p"
    assert path(policy="remote", num_missing=1) is None, "the decode rank computes the last token anyway"
    assert path(policy="remote", prefills=()) is None
    assert path(policy="remote", excluded=("p",)) is None


def test_short_appends_stay_local_at_the_threshold() -> None:
    slow = replace(BASE, prefill_tokens_per_s=1.0)
    assert path(decode=slow, num_missing=512, local_append_max_tokens=512) is None
    assert path(decode=slow, num_missing=513, local_append_max_tokens=512) == "p"


def test_remote_pays_when_streams_wait_behind_an_append() -> None:
    remote = load("p", prefill_tokens_per_s=1000.0, push_bytes_per_s=1e5)  # 1 s to compute, 1 s to push
    assert path(prefills=(remote,)) is None, "1 s here against 2 s there"
    in_gang = replace(BASE, num_answers=1, num_gang_answers=3)
    assert path(prefills=(remote,), decode=in_gang) == "p", "it and two others of its gang would wait 1 s each"
    itself = replace(BASE, num_answers=1, num_gang_answers=1)
    assert path(prefills=(remote,), decode=itself) is None, "its own answer waits for nobody but itself"
    assert path(prefills=(remote,), decode=replace(BASE, num_gang_answers=2), tenant_weight=3.0) == "p"


def test_unmeasured_speeds_send_long_prompts_away() -> None:
    assert path(decode=replace(BASE, prefill_tokens_per_s=0.0)) == "p"
    assert path(prefills=(load("p", prefill_tokens_per_s=0.0),)) == "p"


def test_the_cheapest_prefill_rank_wins() -> None:
    busy = load("p", num_queued_prefill_tokens=5000)
    free = load("q")
    crowded = replace(BASE, num_gang_answers=10)
    assert path(prefills=(busy, free), decode=crowded) == "q"
    assert path(prefills=(busy, free), decode=crowded, excluded=("q",)) == "p"


def test_ways_to_compute() -> None:
    queued = replace(BASE, num_queued_prefill_tokens=500)
    assert local_append_s(queued, 500, tokens_per_s=1000.0, num_delayed=0) == pytest.approx(1.0)
    assert local_append_s(queued, 500, tokens_per_s=1000.0, num_delayed=2) == pytest.approx(3.0)
    assert local_append_s(queued, 500, tokens_per_s=1000.0, num_delayed=2, tenant_weight=1.5) == pytest.approx(4.0)
    assert remote_s(BASE, 5000, 1000, tokens_per_s=1000) == pytest.approx(1.0 + 0.5 + 0.1)
    slow_link = replace(BASE, pull_bytes_per_s=1e3)
    assert remote_s(slow_link, 5000, 1000, tokens_per_s=1000) == pytest.approx(1.0 + 5.0 + 0.1), "it computes them"
    unmeasured = replace(BASE, pull_bytes_per_s=0, push_bytes_per_s=0)
    assert remote_s(unmeasured, 5000, 1000, tokens_per_s=1000) == pytest.approx(1.0)


def test_a_prefill_rank_that_has_computed_nothing_yet_counts_like_its_peers() -> None:
    """A new rank must get work, or it would never be measured."""
    busy = load("p1", num_queued_prefill_tokens=50_000)
    fresh = load("p2", prefill_tokens_per_s=0.0)
    slow_decode = load("d", prefill_tokens_per_s=10.0)
    found = choose_path(slow_decode, [busy, fresh], num_cached=0, num_missing=5000, rules=PathRules())
    assert found is not None
    assert found.rank_id == "p2"
