from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout
from seamount.kernels.sparse_mla import sparse_mla_prefill

pytestmark = pytest.mark.gpu
SCALE = 0.1352
RANK, ROPE = 512, 64
Poison = Callable[[], AbstractContextManager[None]]


def _layout(name: str) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=128, dtype=torch.bfloat16)


def _plane(formulas: ModuleType, num_slots: int, name: str, slots: Tensor) -> Tensor:
    """The rows [slots, bytes] of a plane: random latents of many sizes where chosen, NaN in every field elsewhere."""
    device = slots.device
    latents = torch.randn((num_slots, RANK + ROPE), device=device)
    latents *= torch.exp2(torch.randint(-6, 4, (num_slots, 1), device=device))
    rows: Tensor = formulas.latent_rows(latents[:, :RANK], latents[:, RANK:], name == "fp8")
    unused = torch.ones(num_slots, dtype=torch.bool, device=device)
    unused[slots[slots >= 0].long()] = False
    rows[unused] = 0xFF
    return rows


def _causal(rows: int, first: int, k: int, device: torch.device) -> Tensor:
    """Row t chooses at most k of the first ``first + t + 1`` positions; -1 behind them: [rows, k]."""
    indices = torch.full((rows, k), -1, dtype=torch.int64, device=device)
    for t in range(rows):
        chosen = torch.randperm(first + t + 1, device=device)[:k]
        indices[t, : len(chosen)] = chosen
    return indices


def _slots(context: Tensor, indices: Tensor) -> Tensor:
    return torch.where(indices < 0, -1, context[indices.clamp(min=0)])


def _check(
    formulas: ModuleType, poison: Poison, name: str, q: Tensor, rows: Tensor, context: Tensor, indices: Tensor
) -> None:
    layout = _layout(name)
    plane = rows.view(-1, layout.page_bytes("latent"))
    with poison():
        out, lse = sparse_mla_prefill(q, plane, context, indices, layout, SCALE)
    expected, expected_lse = formulas.sparse_attention(q, rows, _slots(context, indices), RANK, SCALE, name == "fp8")
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    empty = (indices < 0).all(1)
    assert bool((out[empty] == 0).all())
    assert bool((lse[empty] == float("inf")).all())
    if not bool(empty.all()):
        errors = (out[~empty].float() - expected[~empty]).norm(dim=2) / expected[~empty].norm(dim=2)
        assert float(errors.max()) < 1.2e-2
        assert float((lse[~empty] - expected_lse[~empty]).abs().max()) < 2e-3
    again, again_lse = sparse_mla_prefill(q, plane, context.int(), indices.int(), layout, SCALE)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize(("rows", "first", "k"), [(1, 99, 64), (63, 0, 64), (64, 30, 100), (65, 2000, 2048)])
def test_rows_of_a_sequence(
    rows: int,
    first: int,
    k: int,
    heads: int,
    name: str,
    formulas: ModuleType,
    poison: Poison,
    device: torch.device,
) -> None:
    num_slots = -(-(first + rows) // 64) * 64 + 640
    context = torch.randperm(num_slots, device=device)[: first + rows]
    indices = _causal(rows, first, k, device)
    q = (torch.randn((rows, heads, RANK + ROPE), device=device) * 0.05).bfloat16()
    _check(formulas, poison, name, q, _plane(formulas, num_slots, name, _slots(context, indices)), context, indices)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize(
    ("heads", "k", "counts"),
    [
        (128, 2048, [2048, 0, 1, 64, 65]),
        (200, 192, [192, 0, 63, 130]),
        (8, 33, [33, 5, 0]),
        (128, 64, [0]),
        (64, 0, [0]),
    ],
)
def test_no_token_anywhere(
    heads: int, k: int, counts: list[int], name: str, formulas: ModuleType, poison: Poison, device: torch.device
) -> None:
    num_slots, rows = 2560, 150
    indices = torch.full((rows, k), -1, dtype=torch.int64, device=device)
    for row in range(rows):
        count = counts[row % len(counts)]
        indices[row, torch.randperm(k, device=device)[:count]] = torch.randperm(num_slots, device=device)[:count]
    context = torch.randperm(num_slots, device=device)
    q = (torch.randn((rows, heads, RANK + ROPE), device=device) * 0.05).bfloat16()
    _check(formulas, poison, name, q, _plane(formulas, num_slots, name, _slots(context, indices)), context, indices)


def test_nothing_in_the_context(device: torch.device) -> None:
    layout = _layout("fp8")
    plane = torch.full((1, layout.page_bytes("latent")), 0xFF, dtype=torch.uint8, device=device)
    q, indices = torch.randn((3, 64, 576), device=device), torch.full((3, 70), -1, device=device)
    out, lse = sparse_mla_prefill(q, plane, indices[0, :0], indices, layout, SCALE)
    assert bool((out == 0).all())
    assert bool((lse == float("inf")).all())


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_scores_that_keep_growing(name: str, formulas: ModuleType, poison: Poison, device: torch.device) -> None:
    """The maximum moves in every tile, by far more than the exponent of a probability holds."""
    num_slots, heads = 640, 64
    q = torch.randn((2, heads, RANK + ROPE), device=device)
    latents = torch.randn((num_slots, RANK + ROPE), device=device) * 0.1
    latents += q[0, :1] * torch.linspace(0, 1, num_slots, device=device)[:, None]
    rows = formulas.latent_rows(latents[:, :RANK], latents[:, RANK:], name == "fp8")
    context = torch.arange(num_slots, device=device)
    _check(formulas, poison, name, q.bfloat16(), rows, context, torch.stack((context, context.flip(0))))


def test_other_dtypes_are_rounded(formulas: ModuleType, device: torch.device) -> None:
    context = torch.randperm(640, device=device)[:128]
    indices = torch.arange(128, device=device).view(1, 128)
    rows = _plane(formulas, 640, "bf16", context)
    plane, layout = rows.view(-1, _layout("bf16").page_bytes("latent")), _layout("bf16")
    q = torch.randn((1, 64, RANK + ROPE), device=device) * 0.05
    out, _ = sparse_mla_prefill(q, plane, context, indices, layout, SCALE)
    rounded, _ = sparse_mla_prefill(q.bfloat16(), plane, context, indices, layout, SCALE)
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), rounded)


def test_bad_arguments_raise_before_the_launch(device: torch.device) -> None:
    layout = _layout("bf16")
    plane = layout.allocate(1, 2, device).latent[0]
    q, indices = torch.zeros((3, 64, 576), device=device), torch.zeros((3, 8), dtype=torch.int64, device=device)
    context = torch.zeros(9, dtype=torch.int64, device=device)
    for arguments, message in (
        ((q[..., :512], plane, context, indices), "q has shape"),
        ((q.double(), plane, context, indices), "q is torch.float64"),
        ((q, plane[:, :-64], context, indices), "plane has shape"),
        ((q, plane.cpu(), context, indices), "plane is on cpu"),
        ((q, plane, context.float(), indices), "context is torch.float32"),
        ((q, plane, context.view(3, 3), indices), "context has shape"),
        ((q, plane, context, indices[:2]), "indices has shape"),
        ((q, plane, context, indices.float()), "indices is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_mla_prefill(*arguments, layout, SCALE)
