"""How fast a rank says it computes prompts, and what routers make of it."""

from __future__ import annotations

import random

import pytest

from seamount.router.placement import Need, Placed, RankLoad, choose_decode_rank
from seamount.wire.ids import RankId
from seamount.workers.engine_counts import RECENT_PIECES, PieceRate

HOME, OTHER = RankId("home"), RankId("other")
TOKENS_PER_S = 2000.0
AFTER = RECENT_PIECES // 2 + 1
"""Slow pieces that are believed."""


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return random.Random(seed)


def note(rate: PieceRate, rng: random.Random, num_pieces: int, slower: float = 1.0) -> None:
    for _ in range(num_pieces):
        num_tokens = rng.randrange(16, 257)
        rate.note(num_tokens, num_tokens / TOKENS_PER_S * slower * rng.uniform(0.8, 1.25))


def placed(home: PieceRate, other: PieceRate) -> Placed:
    """Where a turn goes whose caches, all but 40 tokens, are at home."""
    loads = [
        RankLoad(
            rank_id=rank_id,
            address="127.0.0.1:1",
            num_free_pages=1000,
            num_cached_pages=0,
            num_running=0,
            num_answers=0,
            num_queued_prefill_tokens=0,
            prefill_tokens_per_s=rate.per_s,
            pull_bytes_per_s=1e9,
            push_bytes_per_s=1e9,
            kv_bytes_per_token=1000,
        )
        for rank_id, rate in ((HOME, home), (OTHER, other))
    ]
    chosen = choose_decode_rank(loads, Need(num_tokens=700, home=HOME, num_home=660), source=loads[0])
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("slower", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("peer_has_measured", [False, True])
def test_one_piece_that_took_far_too_long_sends_no_turn_past_its_cache(
    slower: float, peer_has_measured: bool, rng: random.Random
) -> None:
    for num_before in range(2 * RECENT_PIECES):
        home, other = PieceRate(), PieceRate()
        note(other, rng, RECENT_PIECES if peer_has_measured else 0)
        note(home, rng, num_before)
        note(home, rng, 1, slower)
        assert placed(home, other).rank.rank_id == HOME
        for _ in range(RECENT_PIECES):
            note(home, rng, 1)
            assert home.per_s > 0.75 * TOKENS_PER_S
            assert placed(home, other).rank.rank_id == HOME


@pytest.mark.parametrize("slower", [10.0, 100.0])
def test_a_rank_that_is_slow_from_now_on_is_found_out_after_more_than_half_of_the_pieces(
    slower: float, rng: random.Random
) -> None:
    home, other = PieceRate(), PieceRate()
    note(home, rng, 3 * RECENT_PIECES)
    note(other, rng, RECENT_PIECES)
    note(home, rng, AFTER - 1, slower)
    assert home.per_s > 0.75 * TOKENS_PER_S
    note(home, rng, 1, slower)
    assert home.per_s < 1.3 * TOKENS_PER_S / slower
    assert placed(home, other).rank.rank_id == OTHER


def test_a_rank_that_was_slow_from_the_start_says_so_after_two_pieces(rng: random.Random) -> None:
    rate = PieceRate()
    note(rate, rng, 1, 10.0)
    assert rate.per_s == 0
    note(rate, rng, 1, 10.0)
    assert 0 < rate.per_s < TOKENS_PER_S / 7
