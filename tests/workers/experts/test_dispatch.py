"""Two or three threads, each with its own gloo group object, stand for the ranks of a gang."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, ProcessGroupGloo

from seamount.workers.experts.dispatch import Dispatched, ExpertParallel, GangExperts, LocalExperts

Result = TypeVar("Result")
TIMEOUT = timedelta(seconds=10)


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def on_each_rank(size: int, body: Callable[[int, ProcessGroupGloo], Result]) -> list[Result]:
    store = HashStore()

    def rank_main(rank: int) -> Result:
        return body(rank, ProcessGroupGloo(store, rank, size, TIMEOUT))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank_main, range(size)))


def experts_of(scale: Tensor, parallel: ExpertParallel, dispatched: Dispatched) -> Tensor:
    """Expert e computes tanh(x * scale[e]) + e: element-wise, so that bits do not depend on how rows are batched."""
    expert = dispatched.local_expert + parallel.map.owned(parallel.rank).start
    return torch.tanh(dispatched.x * scale[expert].to(dispatched.x.dtype)) + expert[:, None].to(dispatched.x.dtype)


def mixture(parallel: ExpertParallel, scale: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dispatched = parallel.dispatch(x, ids)
    assert dispatched.local_expert.tolist() == sorted(dispatched.local_expert.tolist())
    counts = torch.bincount(dispatched.local_expert, minlength=parallel.map.num_local).tolist()
    assert list(dispatched.rows_per_expert) == counts
    return parallel.combine(experts_of(scale, parallel, dispatched), dispatched, weights)


def random_routing(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k].contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(5, 3), (0, 7), (1, 0), (0, 0), (67, 130, 1)])
def test_a_gang_equals_one_rank_bit_for_bit(seed: int, dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    num_experts, top_k, hidden = 6 * len(tokens), 4, 19
    scale = torch.randn(num_experts, hidden, dtype=torch.float64)
    inputs = [
        (torch.randn(count, hidden).to(dtype), random_routing(count, num_experts, top_k), torch.rand(count, top_k))
        for count in tokens
    ]
    got = on_each_rank(len(tokens), lambda rank, group: mixture(GangExperts(group, num_experts), scale, *inputs[rank]))
    for (x, ids, weights), out in zip(inputs, got, strict=True):
        expected = mixture(LocalExperts(num_experts), scale, x, ids, weights)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(out, expected)


def test_local_experts_equal_the_formula(seed: int) -> None:
    num_tokens, num_experts, top_k, hidden = 9, 5, 3, 7
    scale = torch.randn(num_experts, hidden, dtype=torch.float64)
    x, ids = torch.randn(num_tokens, hidden, dtype=torch.float64), random_routing(num_tokens, num_experts, top_k)
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64)
    expected = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for token in range(num_tokens):
        for k in range(top_k):
            expert = int(ids[token, k])
            expected[token] += weights[token, k] * (torch.tanh(x[token] * scale[expert]) + expert)
    assert torch.equal(mixture(LocalExperts(num_experts), scale, x, ids, weights), expected)


def test_sums_follow_gate_order_not_expert_order(seed: int) -> None:
    """1e8 + 1 - 1e8 in float32 tells the orders apart: 0 one way, 1 the other."""
    x, weights = torch.ones(1, 1), torch.ones(1, 3)
    values = torch.tensor([[1e8], [1.0], [-1e8]])
    results = {}
    for ids in ([0, 1, 2], [0, 2, 1]):
        local = LocalExperts(3)
        dispatched = local.dispatch(x, torch.tensor([ids]))
        results[tuple(ids)] = local.combine(values[dispatched.local_expert], dispatched, weights).item()
    assert results == {(0, 1, 2): 0.0, (0, 2, 1): 1.0}


@pytest.mark.parametrize("target", [0, 1])
def test_all_tokens_to_one_rank(seed: int, target: int) -> None:
    num_experts, hidden = 8, 5
    scale = torch.randn(num_experts, hidden, dtype=torch.float64)
    inputs = [
        (torch.randn(n, hidden, dtype=torch.float64), target * 4 + random_routing(n, 4, 3), torch.rand(n, 3))
        for n in (11, 2)
    ]

    def body(rank: int, group: ProcessGroupGloo) -> tuple[Tensor, int]:
        parallel = GangExperts(group, num_experts)
        return mixture(parallel, scale, *inputs[rank]), parallel.dispatch(*inputs[rank][:2]).x.shape[0]

    results = on_each_rank(2, body)
    assert [rows for _, rows in results] == [39 if rank == target else 0 for rank in range(2)]
    for (out, _), (x, ids, weights) in zip(results, inputs, strict=True):
        assert torch.equal(out, mixture(LocalExperts(num_experts), scale, x, ids, weights))


def test_rows_come_by_source_within_an_expert(seed: int) -> None:
    """The rows of one expert stand in (source rank, token) order: the same batch twice is the same bits twice."""

    def body(rank: int, group: ProcessGroupGloo) -> list[float]:
        x = torch.tensor([[rank * 10.0], [rank * 10.0 + 1]])
        return GangExperts(group, 2).dispatch(x, torch.tensor([[0], [0]])).x.flatten().tolist()

    assert on_each_rank(2, body) == [[0.0, 1.0, 10.0, 11.0], []]
