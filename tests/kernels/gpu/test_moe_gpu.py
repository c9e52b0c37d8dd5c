"""The gate, grouping by expert and the weighted sum, against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: no GPU kernels here")

from seamount.kernels import moe as reference
from seamount.kernels.triton import fp8_gemm, grouped_gemm, moe

pytestmark = pytest.mark.gpu

GATES = [(256, 8, 4, 8), (64, 4, 2, 6), (16, 16, 5, 5), (32, 1, 1, 4)]


@pytest.mark.parametrize(("experts", "groups", "keep", "k"), GATES)
@pytest.mark.parametrize("rows", [0, 1, 16, 33])
@pytest.mark.parametrize("offset", [0.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(
    experts: int,
    groups: int,
    keep: int,
    k: int,
    rows: int,
    offset: float,
    dtype: torch.dtype,
    poisoned: torch.device,
    generator: torch.Generator,
) -> None:
    if dtype == torch.bfloat16 and poisoned.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    x = torch.randn((rows, 1000), generator=generator).to(dtype)
    weight = (torch.randn((experts, 1000), generator=generator) * 0.03).to(dtype)
    bias = torch.randn(experts, generator=generator) * 0.2 + offset
    options = {"num_groups": groups, "num_chosen_groups": keep, "num_chosen": k, "normalize": True, "scale": 2.5}
    weights, ids = moe.gate(x.to(poisoned), weight.to(poisoned), bias.to(poisoned), **options)
    expected_weights, expected_ids = reference.gate(x, weight, bias, **options)
    # Sums in another order may swap two choices that are equal but for rounding.
    agree = (ids.cpu() == expected_ids).all(dim=1)
    assert rows == 0 or agree.float().mean() > 0.9
    assert torch.allclose(weights.cpu()[agree], expected_weights[agree], atol=1e-5)
    for splits in (1, 3):
        again = moe.gate(x.to(poisoned), weight.to(poisoned), bias.to(poisoned), **options, splits=splits)
        twice = moe.gate(x.to(poisoned), weight.to(poisoned), bias.to(poisoned), **options, splits=splits)
        assert torch.equal(again[0], twice[0])
        assert torch.equal(again[1], twice[1])
    assert not fp8_gemm.arrivals(ids.device).any()


def test_streams_at_the_same_time_and_graphs(device: torch.device) -> None:
    """Each counts its own arrivals; a graph's are counted whether it is the first to be launched or not."""
    x = torch.randn((33, 7168), device=device).bfloat16()
    weight = (torch.randn((256, 7168), device=device) * 0.03).bfloat16()
    bias = torch.randn(256, device=device)
    options = {"num_groups": 8, "num_chosen_groups": 4, "num_chosen": 8, "normalize": True, "scale": 2.5}
    expected = moe.gate(x, weight, bias, **options)
    torch.cuda.synchronize()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(moe.gate(x, weight, bias, **options))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(moe.gate(x, weight, bias, **options))
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for weights, ids in results:
        assert torch.equal(weights, expected[0])
        assert torch.equal(ids, expected[1])


def test_ties_take_the_lowest_ids(target: torch.device) -> None:
    x, weight, bias = (torch.zeros(shape, device=target) for shape in ((2, 128), (16, 128), (16,)))
    _, ids = moe.gate(x, weight, bias, num_groups=4, num_chosen_groups=2, num_chosen=4, normalize=True, scale=1.0)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2


def test_nan_rows_choose_experts_that_exist(target: torch.device) -> None:
    x, weight, bias = (torch.ones(shape, device=target) for shape in ((3, 128), (16, 128), (16,)))
    x[1] = float("nan")
    _, ids = moe.gate(x, weight, bias, num_groups=4, num_chosen_groups=2, num_chosen=4, normalize=True, scale=1.0)
    assert ((ids >= 0) & (ids < 16)).all()


@pytest.mark.parametrize(("rows", "k", "experts"), [(0, 8, 4), (1, 8, 256), (33, 8, 32), (700, 8, 16), (65, 1, 1)])
def test_there_and_back(rows: int, k: int, experts: int, poisoned: torch.device, generator: torch.Generator) -> None:
    ids = torch.randint(-1, experts + 1, (rows, k), generator=generator)
    order = reference.group_by_expert(ids, experts)
    offsets, row_of, tokens = moe.group_by_expert(ids.to(poisoned), experts)
    assert torch.equal(offsets.cpu(), order.offsets)
    assert torch.equal(row_of.cpu(), order.rows)
    assert torch.equal(tokens.cpu(), order.tokens)
    filled = int(order.offsets[-1])
    flat = ids.flatten()
    assert filled == int(((flat >= 0) & (flat < experts)).sum())
    x = torch.randn((rows, 256), generator=generator)
    moved = moe.permute(x.to(poisoned), tokens).cpu()[:filled]
    assert torch.equal(moved, reference.permute(x, order)[:filled])
    for expert in range(experts):
        chosen = (ids == expert).nonzero()[:, 0]
        assert torch.equal(moved[int(order.offsets[expert]) : int(order.offsets[expert + 1])], x[chosen])
    values, scales = moe.permute_quantize(x.to(poisoned), tokens)
    expected = reference.permute_quantize(x, order)
    assert torch.equal(scales.cpu()[:filled], expected[1][:filled])
    if poisoned.type == "cuda":
        ours, theirs = values.cpu()[:filled], expected[0][:filled]
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    _check_combine(moved, order, rows, k, filled, row_of, generator)


def _check_combine(
    moved: Tensor,
    order: reference.ExpertOrder,
    rows: int,
    k: int,
    filled: int,
    row_of: Tensor,
    generator: torch.Generator,
) -> None:
    y = torch.full((rows * k, 256), float("nan"))
    y[:filled] = moved
    weights = torch.rand((rows, k), generator=generator)
    shared = torch.randn((rows, 256), generator=generator)
    on = row_of.device
    actual = moe.combine(y.to(on), row_of, weights.to(on), shared.to(on))
    assert torch.equal(actual.cpu(), reference.combine(y, order, weights, shared))
    assert torch.equal(moe.combine(y.to(on), row_of, weights.to(on), None).cpu(), reference.combine(y, order, weights))


def test_no_experts_means_no_rows(target: torch.device) -> None:
    x, weight = torch.zeros((3, 128), device=target), torch.zeros((0, 256, 128), device=target)
    operands = (x.to(torch.float8_e4m3fn), torch.ones((3, 1), device=target), weight.to(torch.float8_e4m3fn))
    groups = (torch.ones((0, 2, 1), device=target), torch.zeros(1, dtype=torch.int32, device=target))
    assert grouped_gemm.grouped_gemm(*operands, *groups).shape == (3, 256)
    values, scales = grouped_gemm.grouped_gemm_swiglu(*operands, *groups)
    assert (values.shape, scales.shape) == ((3, 128), (3, 1))


def test_bad_arguments_are_refused_before_a_launch(target: torch.device) -> None:
    x, weight, bias = (torch.zeros(shape, device=target) for shape in ((2, 128), (16, 128), (16,)))
    options = {"num_groups": 4, "num_chosen_groups": 2, "num_chosen": 4, "normalize": True, "scale": 1.0}
    for arguments, message in (
        ((x, weight[:12], bias[:12]), "powers of two"),
        ((x, weight, bias[:8]), "bias"),
        ((x[:, :64], weight, bias), "weight"),
        ((x.double(), weight, bias), "x is"),
    ):
        with pytest.raises(ValueError, match=message):
            moe.gate(*arguments, **options)
    with pytest.raises(ValueError, match="cannot be chosen"):
        moe.gate(x, weight, bias, **options | {"num_chosen": 9})
    with pytest.raises(ValueError, match="ids"):
        moe.group_by_expert(torch.zeros((2, 2), dtype=torch.int32, device=target), 4)
