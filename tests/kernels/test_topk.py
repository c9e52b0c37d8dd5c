from __future__ import annotations

import pytest
import torch

from seamount.kernels.topk import topk_indices


def _expected(row: list[float], k: int, length: int) -> list[int]:
    best = sorted(range(length), key=lambda at: (-row[at], at))[:k]
    return sorted(best) + [-1] * (k - len(best))


@pytest.mark.parametrize("num_keys", [0, 1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["distinct", "few values", "zeros", "negative and minus infinity"])
def test_exact_with_lowest_index_among_equals(num_keys: int, kind: str, generator: torch.Generator) -> None:
    logits = torch.randn((23, num_keys), generator=generator)
    if kind == "few values":
        logits = logits.mul(1.5).round()
    elif kind == "zeros":
        logits = logits.relu() * (torch.rand(logits.shape, generator=generator) > 0.9)
    elif kind == "negative and minus infinity":
        logits = -logits.abs()
        logits[torch.rand(logits.shape, generator=generator) > 0.7] = float("-inf")
    lengths = torch.randint(0, num_keys + 1, (23,), generator=generator)
    lengths[0], lengths[1] = num_keys, 0
    unused = torch.arange(num_keys) >= lengths[:, None]
    poisoned = logits.masked_fill(unused, float("nan"))
    poisoned[:, -1:] = poisoned[:, -1:].masked_fill(unused[:, -1:], float("inf"))
    actual = topk_indices(poisoned, 16, lengths)
    assert actual.dtype == torch.int64
    for row in range(23):
        assert actual[row].tolist() == _expected(logits[row].tolist(), 16, int(lengths[row]))
    assert torch.equal(actual, topk_indices(poisoned, 16, lengths))


def test_all_equal_takes_the_first() -> None:
    assert topk_indices(torch.zeros(1, 100), 4, torch.tensor([100])).tolist() == [[0, 1, 2, 3]]


def test_legal_nan_counts_as_least() -> None:
    logits = torch.tensor([[float("nan"), 1.0, float("-inf"), 2.0]])
    assert topk_indices(logits, 2, torch.tensor([4])).tolist() == [[1, 3]]
    assert topk_indices(logits, 3, torch.tensor([4])).tolist() == [[0, 1, 3]]


def test_no_rows() -> None:
    assert topk_indices(torch.zeros(0, 9), 4, torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
