from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout
from seamount.kernels.sparse_mla import sparse_mla_decode

pytestmark = pytest.mark.gpu
SCALE = 0.1352
Poison = Callable[[], AbstractContextManager[None]]


def _layout(name: str, rank: int, rope: int) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=rank, qk_rope_head_dim=rope, index_head_dim=128, dtype=torch.bfloat16)


def _rows(formulas: ModuleType, num_slots: int, layout: CacheLayout, used: Tensor, device: torch.device) -> Tensor:
    """The rows [slots, bytes] of a plane: random latents where used, NaN in every field elsewhere."""
    shape = (num_slots, layout.latent_dim)
    latents = torch.randn(shape, device=device) * torch.exp2(torch.randint(-6, 7, (num_slots, 1), device=device))
    fp8 = layout.name == "fp8"
    rows: Tensor = formulas.latent_rows(latents[:, : layout.kv_lora_rank], latents[:, layout.kv_lora_rank :] * 0.3, fp8)
    unused = torch.ones(num_slots, dtype=torch.bool, device=device)
    unused[used[used >= 0].long()] = False
    rows[unused] = 0xFF
    return rows


def _slots(batch: int, k: int, num_slots: int, counts: list[int], device: torch.device) -> Tensor:
    slots = torch.full((batch, k), -1, dtype=torch.int64, device=device)
    for row in range(batch):
        count = min(counts[row % len(counts)], k)
        chosen = torch.randperm(num_slots // 2, device=device)[:count]
        # Wherever they stand: not only in front.
        slots[row, torch.randperm(k, device=device)[:count]] = chosen
    return slots


@pytest.mark.parametrize(
    ("batch", "heads", "k", "counts"),
    [
        (1, 128, 2048, [2048]),
        (2, 128, 2048, [2048]),
        (5, 64, 2048, [2048, 1, 0, 63, 700]),
        (3, 16, 2048, [2048, 64, 65]),
        (140, 128, 192, [192, 0, 64, 65, 63, 1]),
        (70, 128, 100, [100, 99]),
        (9, 8, 33, [33, 5]),
        (3, 200, 65, [65]),
        (2, 128, 0, [0]),
    ],
)
@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_agrees_with_the_formula(
    name: str,
    batch: int,
    heads: int,
    k: int,
    counts: list[int],
    formulas: ModuleType,
    poison: Poison,
    device: torch.device,
) -> None:
    _check(name, heads, _slots(batch, k, 6400, counts, device), formulas, poison)


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_two_queries_of_a_sequence(
    name: str, heads: int, formulas: ModuleType, poison: Poison, device: torch.device
) -> None:
    """Each a row of its own; nearly all slots are shared, of the newest token only the second sees anything."""
    slots = _slots(3, 700, 6400, [700, 65, 1], device).repeat_interleave(2, 0)
    slots[0::2].masked_fill_(slots[0::2] == slots[0::2].amax(1, keepdim=True), -1)
    _check(name, heads, slots, formulas, poison)


def _check(name: str, heads: int, slots: Tensor, formulas: ModuleType, poison: Poison) -> None:
    layout, device = _layout(name, 512, 64), slots.device
    rows = _rows(formulas, 6400, layout, slots, device)
    plane = rows.view(-1, layout.page_bytes("latent"))
    q = (torch.randn((len(slots), heads, 576), device=device) * 0.05).bfloat16()
    with poison():
        out, lse = sparse_mla_decode(q, plane, slots, layout, SCALE)
    expected, expected_lse = formulas.sparse_attention(q, rows, slots, 512, SCALE, name == "fp8")
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    empty = (slots < 0).all(1)
    assert bool((out[empty] == 0).all())
    assert bool((lse[empty] == float("inf")).all())
    full = ~empty
    if bool(full.any()):
        errors = (out[full].float() - expected[full]).norm(dim=2) / expected[full].norm(dim=2)
        assert float(errors.max()) < 1.2e-2
        assert float((lse[full] - expected_lse[full]).abs().max()) < 2e-3
    again, again_lse = sparse_mla_decode(q, plane, slots.int(), layout, SCALE)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


@pytest.mark.parametrize(("rank", "rope", "name"), [(128, 16, "fp8"), (256, 32, "fp8"), (64, 8, "bf16")])
def test_other_sizes_and_wide_queries(
    rank: int, rope: int, name: str, formulas: ModuleType, device: torch.device
) -> None:
    layout = _layout(name, rank, rope)
    slots = _slots(3, 77, 640, [77, 20, 0], device)
    rows = _rows(formulas, 640, layout, slots, device)
    plane = rows.view(-1, layout.page_bytes("latent"))
    q = torch.randn((3, 4, rank + rope), device=device) * 0.1
    out, lse = sparse_mla_decode(q, plane, slots, layout, SCALE)
    expected, expected_lse = formulas.sparse_attention(q.bfloat16(), rows, slots, rank, SCALE, name == "fp8")
    assert out.dtype == torch.float32
    assert float((out - expected).norm() / expected.norm()) < 1e-2
    assert float((lse[:2] - expected_lse[:2]).abs().max()) < 2e-3


@pytest.mark.parametrize(("exponent", "query_exponent"), [(-14, 17), (-9, 9), (0, 0), (9, -9)])
def test_latents_and_queries_of_any_size(
    exponent: int, query_exponent: int, formulas: ModuleType, device: torch.device
) -> None:
    """Latents up to 2^15 and down to the scales' floor; queries beyond float16's range."""
    layout = _layout("fp8", 512, 64)
    slots = torch.arange(128, device=device).view(1, 128)
    rows = formulas.latent_rows(*(torch.randn((128, 576), device=device) * 2.0**exponent).split((512, 64), 1), True)
    plane = rows.view(-1, layout.page_bytes("latent"))
    q = (torch.randn((1, 64, 576), device=device) * 2.0**query_exponent).bfloat16()
    out, lse = sparse_mla_decode(q, plane, slots, layout, SCALE)
    expected, expected_lse = formulas.sparse_attention(q, rows, slots, 512, SCALE, True)
    assert float((out.float() - expected).norm() / expected.norm()) < 1e-2
    assert float(((lse - expected_lse) / expected_lse).abs().max()) < 1e-4


def test_a_selected_nan_is_seen(formulas: ModuleType, device: torch.device) -> None:
    layout = _layout("fp8", 512, 64)
    rows = formulas.latent_rows(torch.randn((64, 512), device=device), torch.randn((64, 64), device=device), True)
    rows[7, 512:528] = 0xFF
    q = torch.randn((1, 64, 576), device=device).bfloat16()
    slots = torch.arange(64, device=device).view(1, 64)
    out, _ = sparse_mla_decode(q, rows.view(1, -1), slots, layout, SCALE)
    assert bool(out.isnan().all())


def test_refuses_before_the_launch(device: torch.device) -> None:
    layout = _layout("fp8", 512, 64)
    plane = torch.zeros((4, layout.page_bytes("latent")), dtype=torch.uint8, device=device)
    q = torch.zeros((2, 128, 576), dtype=torch.bfloat16, device=device)
    slots = torch.zeros((2, 64), dtype=torch.int64, device=device)
    for arguments, word in (
        ((q[..., :512], plane, slots), "q has shape"),
        ((q.double(), plane, slots), "q is"),
        ((q, plane[:, 64:], slots), "plane has shape"),
        ((q, plane.int(), slots), "plane is"),
        ((q, plane.cpu(), slots), "plane is on"),
        ((q, plane, slots[:1]), "slots has shape"),
        ((q, plane, slots.float()), "slots is"),
    ):
        with pytest.raises(ValueError, match=word):
            sparse_mla_decode(*arguments, layout, SCALE)
