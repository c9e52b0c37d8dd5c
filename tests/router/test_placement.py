"""Placement: which rank, which path. Tables, no I/O."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seamount.router.placement import (
    PathRules,
    RankLoad,
    choose_decode_rank,
    choose_path,
    local_append_s,
    remote_s,
)
from seamount.wire.ids import RankId

BASE = RankLoad(
    rank_id=RankId("a"),
    address="127.0.0.1:1",
    num_free_pages=100,
    num_cached_pages=0,
    num_running=0,
    num_answers=0,
    num_queued_prefill_tokens=0,
    prefill_tokens_per_s=1000.0,
    pull_bytes_per_s=1e6,
    push_bytes_per_s=1e6,
    kv_bytes_per_token=100,
)


def load(name: str, **changes: object) -> RankLoad:
    return replace(BASE, rank_id=RankId(name), **changes)


@pytest.mark.parametrize(
    ("ranks", "preferred", "excluded", "expected"),
    [
        ([], None, (), None),
        ([load("a"), load("b")], None, (), "a"),
        ([load("a", num_answers=1), load("b")], None, (), "b"),
        ([load("a", num_answers=1), load("b", num_answers=2)], None, (), "a"),
        ([load("a", num_free_pages=1), load("b", num_free_pages=2)], None, (), "b"),
        ([load("a", num_free_pages=1, num_cached_pages=5), load("b", num_free_pages=2)], None, (), "a"),
        ([load("a"), load("b", num_answers=9)], "b", (), "b"),
        ([load("a"), load("b")], "b", ("b",), "a"),
        ([load("a"), load("b")], "gone", (), "a"),
        ([load("a")], "a", ("a",), None),
    ],
)
def test_decode_rank(
    ranks: list[RankLoad], preferred: str | None, excluded: tuple[str, ...], expected: str | None
) -> None:
    chosen = choose_decode_rank(
        ranks,
        preferred=RankId(preferred) if preferred else None,
        excluded=[RankId(name) for name in excluded],
    )
    assert (chosen.rank_id if chosen else None) == expected


def path(
    *,
    num_missing: int = 1000,
    num_cached: int = 0,
    decode: RankLoad = BASE,
    prefills: tuple[RankLoad, ...] = (load("p"),),
    excluded: tuple[str, ...] = (),
    **rules: object,
) -> str | None:
    chosen = choose_path(
        decode,
        prefills,
        num_cached=num_cached,
        num_missing=num_missing,
        rules=PathRules(**rules),  # type: ignore[arg-type]
        excluded=[RankId(name) for name in excluded],
    )
    return chosen.rank_id if chosen else None


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
    assert path(prefills=(remote,), decode=replace(BASE, num_running=2)) == "p", "three streams would wait 1 s each"


def test_unmeasured_speeds_send_long_prompts_away() -> None:
    assert path(decode=replace(BASE, prefill_tokens_per_s=0.0)) == "p"
    assert path(prefills=(load("p", prefill_tokens_per_s=0.0),)) == "p"


def test_the_cheapest_prefill_rank_wins() -> None:
    busy = load("p", num_queued_prefill_tokens=5000)
    free = load("q")
    crowded = replace(BASE, num_running=10)
    assert path(prefills=(busy, free), decode=crowded) == "q"
    assert path(prefills=(busy, free), decode=crowded, excluded=("q",)) == "p"


def test_estimates() -> None:
    assert local_append_s(replace(BASE, num_queued_prefill_tokens=500), 500) == pytest.approx(1.0)
    assert remote_s(BASE, 5000, 1000, tokens_per_s=1000) == pytest.approx(1.0 + 0.5 + 0.1)
    assert local_append_s(replace(BASE, prefill_tokens_per_s=0), 1) is None
    assert remote_s(
        replace(BASE, pull_bytes_per_s=0, push_bytes_per_s=0), 5000, 1000, tokens_per_s=1000
    ) == pytest.approx(1.0)


def test_a_prefill_rank_that_has_computed_nothing_yet_counts_like_its_peers() -> None:
    """A new rank must get work, or it would never be measured."""
    busy = load("p1", num_queued_prefill_tokens=50_000)
    fresh = load("p2", prefill_tokens_per_s=0.0)
    slow_decode = load("d", prefill_tokens_per_s=10.0)
    chosen = choose_path(slow_decode, [busy, fresh], num_cached=0, num_missing=5000, rules=PathRules())
    assert chosen is not None
    assert chosen.rank_id == "p2"
