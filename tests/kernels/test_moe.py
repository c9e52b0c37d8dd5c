from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from seamount.kernels.moe import combine, gate, group_by_expert, permute, permute_quantize
from seamount.kernels.quant import quantize


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
    assert ids.is_contiguous()
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


@pytest.mark.parametrize(("rows", "k", "experts"), [(0, 3, 4), (1, 1, 1), (9, 3, 5)])
def test_rows_go_to_their_experts_and_back(rows: int, k: int, experts: int, generator: torch.Generator) -> None:
    """Ids outside the range are another rank's: they have no row and add nothing."""
    ids = torch.randint(-1, experts + 1, (rows, k), generator=generator)
    x = torch.randn((rows, 128), generator=generator, dtype=torch.float64)
    order = group_by_expert(ids, experts)
    moved = permute(x, order)
    chosen = [(e, t, j) for e in range(experts) for t in range(rows) for j in range(k) if ids[t, j] == e]
    assert order.offsets.tolist() == [sum(e < bound for e, _, _ in chosen) for bound in range(experts + 1)]
    for row, (_, t, j) in enumerate(chosen):
        assert torch.equal(moved[row], x[t])
        assert order.rows[t, j] == row
        assert order.tokens[row] == t
    assert (order.tokens[len(chosen) :] == -1).all()
    assert (order.rows[(ids < 0) | (ids >= experts)] == -1).all()
    values, scales = permute_quantize(x, order)
    expected = quantize(moved)
    assert torch.equal(values[: len(chosen)].view(torch.uint8), expected[0][: len(chosen)].view(torch.uint8))
    assert torch.equal(scales[: len(chosen)], expected[1][: len(chosen)])
    moved[len(chosen) :] = float("nan")
    weights = torch.rand((rows, k), generator=generator, dtype=torch.float64)
    shared = torch.randn((rows, 128), generator=generator, dtype=torch.float64)
    kept = ((ids >= 0) & (ids < experts)) * weights
    assert torch.allclose(combine(moved, order, weights), x * kept.sum(1, keepdim=True))
    assert torch.allclose(combine(moved, order, weights, shared), x * kept.sum(1, keepdim=True) + shared)


def test_bad_routing_arguments() -> None:
    with pytest.raises(ValueError, match="ids"):
        group_by_expert(torch.zeros((2, 2), dtype=torch.int32), 4)
    order = group_by_expert(torch.zeros((2, 2), dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="2 tokens"):
        permute(torch.zeros(3, 128), order)
    with pytest.raises(ValueError, match="multiple of 128"):
        permute_quantize(torch.zeros(2, 100), order)
    with pytest.raises(ValueError, match="weights"):
        combine(torch.zeros(4, 128), order, torch.zeros(2, 3))


def _gate(x: Any, weight: Any, bias: Any, groups: int, keep: int, k: int) -> Any:
    return gate(x, weight, bias, num_groups=groups, num_chosen_groups=keep, num_chosen=k, normalize=True, scale=2.5)
