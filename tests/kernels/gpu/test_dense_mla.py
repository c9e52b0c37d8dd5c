from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.dense_mla import dense_mha, dense_mla
from seamount.kernels.layout import CacheLayout

pytestmark = pytest.mark.gpu

SCALE = 0.13523378
Poison = Callable[[], AbstractContextManager[None]]


def _formula(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """float64 inside; a row without keys has out 0 and lse +inf."""
    num_rows, heads, _ = q.shape
    out = torch.zeros((num_rows, heads, v.shape[2]), device=q.device)
    lse = torch.full((num_rows, heads), float("inf"), device=q.device)
    for t in range(num_rows):
        if n := int(lengths[t]):
            rope = k_rope[:n, None].expand(-1, heads, -1)
            scores = torch.einsum("hd,lhd->hl", q[t].double(), torch.cat((k[:n], rope), 2).double()) * SCALE
            lse[t] = scores.logsumexp(1).float()
            out[t] = torch.einsum("hl,lhv->hv", scores.softmax(1), v[:n].double()).float()
    return out, lse


def _inputs(
    num_rows: int, num_keys: int, heads: int, sizes: tuple[int, int, int], device: torch.device
) -> list[Tensor]:
    nope, rope, value = sizes
    q = torch.randn((num_rows, heads, nope + rope), device=device)
    # Keys and values side by side, as one projection of the latents gives them.
    k, v = torch.randn((num_keys, heads, nope + value), device=device).bfloat16().split((nope, value), 2)
    return [q.bfloat16(), k, torch.randn((num_keys, rope), device=device).bfloat16(), v]


def _check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    out, lse = actual
    expected_out, expected_lse = expected
    assert out.dtype == torch.bfloat16
    assert bool((lse.isposinf() == expected_lse.isposinf()).all())
    finite = expected_lse.isfinite()
    assert torch.allclose(lse[finite], expected_lse[finite], atol=1e-3)
    assert float((out.float() - expected_out).norm()) <= 5e-3 * float(expected_out.norm())
    assert not bool(out[~finite].any())


@pytest.mark.parametrize(
    ("sizes", "num_rows", "num_keys"),
    [((128, 64, 128), t, n) for t, n in ((1, 1), (1, 64), (63, 65), (129, 129), (130, 700), (300, 300))]
    + [((32, 0, 64), 70, 130), ((64, 16, 16), 70, 130), ((24, 8, 20), 70, 130)],
)
def test_plain_form(
    sizes: tuple[int, int, int], num_rows: int, num_keys: int, poison: Poison, device: torch.device
) -> None:
    q, k, k_rope, v = _inputs(num_rows, num_keys, 5, sizes, device)
    lengths = torch.arange(num_keys - num_rows + 1, num_keys + 1, device=device)
    with poison():
        out = dense_mha(q, k, k_rope, v, lengths, SCALE)
    _check(out, _formula(q, k, k_rope, v, lengths))
    again = dense_mha(q, k, k_rope, v, lengths.int(), SCALE)
    assert torch.equal(out[0], again[0])
    assert torch.equal(out[1], again[1])


def test_lengths_in_any_order(device: torch.device) -> None:
    q, k, k_rope, v = _inputs(140, 320, 3, (128, 64, 128), device)
    lengths = torch.randint(0, 321, (140,), device=device)
    lengths[:6] = torch.tensor([0, 1, 63, 64, 65, 0], device=device)
    _check(dense_mha(q, k, k_rope, v, lengths, SCALE), _formula(q, k, k_rope, v, lengths))


def test_rows_and_heads_may_be_strided(device: torch.device) -> None:
    """As views of wider tensors; an address that TMA cannot take goes through the general kernel."""
    for heads, start in ((3, 0), (3, 8), (3, 1)):
        q, k, k_rope, v = _inputs(70, 90, heads, (128, 64, 128), device)
        expected = _formula(q, k, k_rope, v, lengths := torch.arange(21, 91, device=device))
        wide = torch.zeros((70, heads, 224), device=device).bfloat16()
        wide[..., start : start + 192] = q
        _check(dense_mha(wide[..., start : start + 192], k, k_rope, v, lengths, SCALE), expected)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (3, 0)])
def test_nothing_to_attend_to(num_rows: int, num_keys: int, device: torch.device) -> None:
    q, k, k_rope, v = _inputs(num_rows, num_keys, 2, (128, 64, 128), device)
    out, lse = dense_mha(q, k, k_rope, v, torch.zeros(num_rows, dtype=torch.int64, device=device), SCALE)
    assert out.shape == (num_rows, 2, 128)
    assert not bool(out.any())
    assert bool(lse.isposinf().all())


def test_refuses_before_the_launch(device: torch.device) -> None:
    q, k, k_rope, v = _inputs(3, 4, 2, (128, 64, 128), device)
    lengths = torch.ones(3, dtype=torch.int64, device=device)
    for arguments, word in (
        ((q[..., :128], k, k_rope, v, lengths), "q has shape"),
        ((q, k.float(), k_rope, v, lengths), "k is"),
        ((q, k, k_rope[:2], v, lengths), "k_rope has shape"),
        ((q, k, k_rope, v[:, :1], lengths), "v has shape"),
        ((q, k, k_rope, v, lengths.float()), "lengths is"),
        ((q, k, k_rope.T.contiguous().T, v, lengths), "k_rope has strided"),
    ):
        with pytest.raises(ValueError, match=word):
            dense_mha(*arguments, SCALE)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (2, 64), (33, 65), (20, 500)])
def test_absorbed_form_over_pages(
    name: str, num_rows: int, num_keys: int, formulas: ModuleType, poison: Poison, device: torch.device
) -> None:
    layout = CacheLayout.create(name, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    latent, rope = torch.randn((640, 512), device=device), torch.randn((640, 64), device=device)
    rows = formulas.latent_rows(latent, rope, name == "fp8")
    slots = torch.randperm(640, device=device)[:num_keys]
    unused = torch.ones(640, dtype=torch.bool, device=device)
    unused[slots] = False
    rows[unused] = 0xFF  # NaN
    q = torch.randn((num_rows, 20, 576), device=device).bfloat16()
    lengths = torch.arange(num_keys - num_rows + 1, num_keys + 1, device=device).clamp_min(0)
    with poison():
        out, lse = dense_mla(q, rows.view(10, -1), slots, lengths, layout, SCALE)
    chosen = torch.where(torch.arange(num_keys, device=device) < lengths[:, None], slots, -1)
    expected, expected_lse = formulas.sparse_attention(q.float(), rows, chosen, 512, SCALE, name == "fp8")
    assert torch.allclose(lse, expected_lse, atol=1e-2)
    assert float((out.float() - expected).norm()) <= 1e-2 * float(expected.norm())


def test_the_absorbed_form_refuses_before_the_launch(device: torch.device) -> None:
    layout = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    plane = layout.allocate(1, 2, device).latent[0]
    q, slots = torch.zeros((3, 16, 576), device=device), torch.arange(9, device=device)
    lengths = torch.ones(3, dtype=torch.int64, device=device)
    for arguments, word in (
        ((q[..., :512], plane, slots, lengths), "q has shape"),
        ((q, plane[:, :-64], slots, lengths), "plane has shape"),
        ((q, plane, slots.float(), lengths), "slots is"),
        ((q, plane, slots.view(3, 3), lengths), "slots has shape"),
        ((q, plane, slots, lengths[:2]), "lengths has shape"),
        ((q, plane, slots, lengths.cpu()), "lengths is on"),
    ):
        with pytest.raises(ValueError, match=word):
            dense_mla(*arguments, layout, SCALE)
