from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from seamount.kernels.moe import gate


def _expected(logits: list[float], bias: list[float], groups: int, keep: int, k: int) -> tuple[list[int], list[float]]:
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    choice = [score + offset for score, offset in zip(scores, bias, strict=True)]
    size = len(choice) // groups
    of_group = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-of_group[g], g))[:keep]
    legal = [e for e in range(len(choice)) if e // size in kept]
    ids = sorted(legal, key=lambda e: (-choice[e], e))[:k]
    total = sum(scores[e] for e in ids)
    return ids, [scores[e] / total * 2.5 for e in ids]


@pytest.mark.parametrize(("groups", "keep", "k"), [(4, 2, 4), (1, 1, 3), (8, 3, 6), (16, 5, 5)])
@pytest.mark.parametrize("rows", [0, 1, 65])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_group_limited_choice(
    groups: int, keep: int, k: int, rows: int, offset: float, generator: torch.Generator
) -> None:
    """With a bias of -3 all corrected scores are negative: dropped groups must count as -inf, not as 0."""
    x = torch.randn((rows, 24), generator=generator, dtype=torch.float64)
    weight = torch.randn((16, 24), generator=generator, dtype=torch.float64) * 0.3
    bias = torch.randn(16, generator=generator, dtype=torch.float64) * 0.2 + offset
    weights, ids = _gate(x, weight, bias, groups, keep, k)
    assert weights.shape == ids.shape == (rows, k)
    assert weights.dtype == torch.float64
    for t in range(rows):
        expected_ids, expected_weights = _expected((weight @ x[t]).tolist(), bias.tolist(), groups, keep, k)
        assert ids[t].tolist() == expected_ids
        assert weights[t].tolist() == pytest.approx(expected_weights, rel=1e-9)


def test_equal_scores_take_the_lowest_ids() -> None:
    _, ids = _gate(torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(16), 4, 2, 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2


def test_narrow_inputs_are_scored_in_float32(generator: torch.Generator) -> None:
    x = torch.randn((5, 8), generator=generator).to(torch.bfloat16)
    weight, bias = torch.randn((16, 8), generator=generator), torch.zeros(16)
    narrow, wide = _gate(x, weight, bias, 4, 2, 4), _gate(x.float(), weight, bias, 4, 2, 4)
    assert narrow[0].dtype == torch.float32
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


def _gate(x: Any, weight: Any, bias: Any, groups: int, keep: int, k: int) -> Any:
    return gate(x, weight, bias, num_groups=groups, num_chosen_groups=keep, num_chosen=k, normalize=True, scale=2.5)
