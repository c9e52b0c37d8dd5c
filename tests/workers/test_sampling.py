"""Sampling: right distribution, the same draw wherever it happens, every edge of the truncations."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import pytest
import torch

from seamount.wire.errors import InvalidArgument
from seamount.workers.requests import SamplingParams
from seamount.workers.sampling import Draw, Sampled, sample, uniform


def draw(index: int = 0, forced: int | None = None, **params: Any) -> Draw:
    return Draw(params=SamplingParams(**params), output_index=index, forced_token_id=forced)


def one(logits: list[float] | torch.Tensor, wish: Draw, vocab_limit: int | None = None) -> Sampled:
    row = torch.as_tensor(logits, dtype=torch.float64)[None]
    (result,) = sample(row, [wish], vocab_limit=vocab_limit or row.shape[1])
    assert result is not None
    return result


def tokens(logits: torch.Tensor, count: int, **params: Any) -> np.ndarray[Any, Any]:
    draws = [draw(index, **params) for index in range(count)]
    rows = logits.expand(count, -1)
    return np.array([s.token_id for s in sample(rows, draws, vocab_limit=rows.shape[1]) if s is not None])


def reference_shares(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Straight from the definition, by full sorts."""
    shares = torch.softmax(logits.double() / temperature, 0)
    order = sorted(range(len(shares)), key=lambda i: (-float(shares[i]), i))
    kept = order[:top_k] if top_k else order
    total = sum(float(shares[i]) for i in kept)
    result, mass = torch.zeros_like(shares), 0.0
    for i in kept:
        result[i] = shares[i]
        mass += float(shares[i])
        if mass >= top_p * total:
            break
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 7, 1.0), (1.0, 0, 0.8), (0.9, 12, 0.7), (2.0, 100, 0.999)],
)
def test_distribution(rng: random.Random, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(23, generator=torch.Generator().manual_seed(rng.randrange(1 << 31))) * 2
    shares = reference_shares(logits, temperature, top_k, top_p).numpy()
    count = 10_000
    seen = np.bincount(
        tokens(logits, count, temperature=temperature, top_k=top_k, top_p=top_p, seed=rng.randrange(1 << 64)),
        minlength=23,
    )
    assert not seen[shares == 0].any(), "a token that truncation removes was drawn"
    often = shares * count >= 5
    expected = np.append(shares[often], shares[~often].sum()) * count
    observed = np.append(seen[often], seen[~often].sum())
    filled = expected > 0
    chi_square = float((((observed - expected) ** 2)[filled] / expected[filled]).sum())
    freedom = int(filled.sum()) - 1
    print(f"chi-square {chi_square:.1f} at {freedom} degrees of freedom")
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom) + 6


def test_uniform_is_even_and_depends_on_every_part() -> None:
    numbers = np.array([uniform(7, index) for index in range(20_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    seen = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((seen - 400) ** 2 / 400).sum() < 49 + 6 * math.sqrt(98)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert len({uniform(1, 0), uniform(0, 1), uniform(0, 0, 1), uniform(0, 0), uniform(1 << 63, 0)}) == 5
    assert uniform((1 << 64) - 1, (1 << 32) - 1) == uniform((1 << 64) - 1, (1 << 32) - 1)
    assert uniform(20, 261123) == pytest.approx(UNIFORM_20_261123, abs=0), (
        "sessions resume across versions: never change"
    )


UNIFORM_20_261123 = 0.9795988160858954


def test_a_draw_does_not_depend_on_the_batch(rng: random.Random) -> None:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 31))
    vocab = rng.choice([50, 3001, 100_003])
    rows = torch.randn(9, vocab, generator=generator) * 3
    wishes = [
        draw(rng.randrange(1000), seed=rng.randrange(1 << 64), num_logprobs=rng.choice([-1, 0, 4]), **params)
        for params in [
            {},
            {"temperature": 0},
            {"top_k": 3},
            {"top_p": 0.5},
            {"top_k": 40, "top_p": 0.9},
            {},
            {},
            {},
            {},
        ]
    ]
    together = sample(rows, wishes, vocab_limit=vocab)
    assert together == sample(rows, wishes, vocab_limit=vocab)
    alone = [sample(rows[i : i + 1], [wish], vocab_limit=vocab)[0] for i, wish in enumerate(wishes)]
    assert together == alone
    order = rng.sample(range(9), 9)
    shuffled = sample(rows[order], [wishes[i] for i in order], vocab_limit=vocab)
    assert shuffled == [together[i] for i in order]


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert one([1.0, 3.0, 2.0, 3.0, 3.0], draw(temperature=0)).token_id == 1
    assert one(torch.zeros(100_000), draw(temperature=0)).token_id == 0
    row = torch.full((1, 100_000), -1.0)
    row[0, [70_001, 90_000]] = 5.0
    assert sample(row, [draw(temperature=0)], vocab_limit=100_000)[0] == Sampled(token_id=70_001)


def test_ties_at_the_edge_of_top_k_and_top_p_go_to_the_lower_id() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 1.0])
    assert set(tokens(logits, 300, top_k=3)) == {1, 2, 4}
    assert set(tokens(logits, 300, top_k=1)) == {4}
    assert set(tokens(torch.zeros(10), 300, top_k=4)) == {0, 1, 2, 3}
    assert set(tokens(torch.zeros(10), 300, top_p=0.3)) <= {0, 1, 2, 3}
    assert set(tokens(torch.zeros(8), 300, top_p=0.5)) == {0, 1, 2, 3}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-12}, {"temperature": 1e-12}])
def test_the_narrowest_truncation_is_greedy(params: dict[str, Any], rng: random.Random) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(rng.randrange(1 << 31)))
    assert set(tokens(logits, 20, **params)) == {int(logits.argmax())}


@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_k": 9}, {"top_k": 1 << 20}, {"top_p": 1.0}])
def test_the_widest_truncation_changes_nothing(params: dict[str, Any]) -> None:
    logits = torch.linspace(-1, 1, 5)
    assert (tokens(logits, 200, **params) == tokens(logits, 200)).all()


def test_excluded_and_padding_ids_are_never_chosen() -> None:
    logits = [0.0, -math.inf, 0.0, 9.0, math.nan]
    assert {one(logits, draw(i), vocab_limit=3).token_id for i in range(100)} == {0, 2}
    assert one(logits, draw(temperature=0), vocab_limit=4).token_id == 3
    assert {one(logits, draw(i, top_k=2, top_p=0.9), vocab_limit=3).token_id for i in range(100)} == {0, 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_have_no_token(bad: float) -> None:
    rows = torch.zeros(3, 4)
    rows[1, 2] = bad
    for params in ({"temperature": 0}, {}, {"top_k": 2}, {"num_logprobs": 2}):
        results = sample(rows, [draw(**params)] * 3, vocab_limit=4)
        assert results[1] is None
        assert results[0] is not None
        assert results[2] is not None
    all_excluded = torch.full((1, 4), -math.inf)
    assert sample(all_excluded, [draw()], vocab_limit=4) == [None]


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 10), [], vocab_limit=10) == []


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_logprobs_are_after_temperature_and_before_truncation(rng: random.Random, temperature: float) -> None:
    logits = torch.randn(700, generator=torch.Generator().manual_seed(rng.randrange(1 << 31))).double()
    expected = torch.log_softmax(logits / (temperature or 1.0), 0)
    result = one(logits, draw(temperature=temperature, top_k=3, top_p=0.9, num_logprobs=20))
    assert result.logprobs is not None
    assert result.logprobs.sampled == pytest.approx(float(expected[result.token_id]), abs=1e-12)
    best = sorted(range(700), key=lambda i: (-float(logits[i]), i))[:20]
    assert [token for token, _ in result.logprobs.top] == best
    assert [value for _, value in result.logprobs.top] == pytest.approx([float(expected[i]) for i in best], abs=1e-12)
    bare = one(logits, draw(num_logprobs=0, forced=5))
    assert bare.token_id == 5
    assert bare.logprobs is not None
    assert bare.logprobs.top == ()
    assert one(logits, draw()).logprobs is None
    few = one(logits[:3], draw(num_logprobs=20))
    assert few.logprobs is not None
    assert len(few.logprobs.top) == 3


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 1 << 64),
        ("max_output_tokens", 0),
        ("num_logprobs", -2),
        ("num_logprobs", 21),
        ("stop_token_ids", frozenset(range(65))),
        ("first_output_index", -1),
    ],
)
def test_parameters_are_checked(field: str, bad: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**{field: bad})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_cost_at_the_real_vocabulary() -> None:
    """Peaked like a trained model's: a few tokens hold most of the mass."""
    rows = torch.randn(16, 129_280, generator=torch.Generator().manual_seed(1))
    rows[:, ::4001] += 12
    for name, params in {
        "greedy": {"temperature": 0},
        "plain": {},
        "top_p": {"top_p": 0.95},
        "top_k": {"top_k": 50},
    }.items():
        wishes = [draw(3, seed=seed, **params) for seed in range(16)]
        times = []
        for _ in range(4):
            start = time.perf_counter()
            sample(rows, wishes, vocab_limit=128_815)
            times.append(time.perf_counter() - start)
        print(f"{name}: {min(times) * 1e3:.2f} ms for 16 rows")
        assert min(times) < 0.1
