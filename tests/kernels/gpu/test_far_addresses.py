"""Caches of more than 2^32 bytes, scores more than 2^31 apart, more rows than a grid's second axis holds."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels import cache_write
from seamount.kernels.indexer import mqa_logits, paged_mqa_logits, paged_topk_indices
from seamount.kernels.layout import CacheLayout
from seamount.kernels.sparse_mla import sparse_mla_decode, sparse_mla_prefill
from seamount.kernels.topk import topk_indices

pytestmark = pytest.mark.gpu
SCALE = 0.1352
FAR = 1 << 32


def _layout(name: str, dim: int = 128) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=dim, dtype=torch.bfloat16)


def _vast_plane(page_bytes: int, device: torch.device) -> Tensor:
    """Zeros; its last three pages begin behind the first 2^32 bytes."""
    return torch.zeros((-(-FAR // page_bytes) + 3, page_bytes), dtype=torch.uint8, device=device)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize("heads", [20, 128])
def test_latents_behind_four_gigabytes(name: str, heads: int, formulas: ModuleType, device: torch.device) -> None:
    layout = _layout(name)
    plane = _vast_plane(layout.page_bytes("latent"), device)
    rows = plane.view(-1, layout.latent_bytes_per_token)
    # Half of the chosen in front, half behind.
    at = torch.cat((torch.arange(100, device=device), torch.arange(len(rows) - 100, len(rows), device=device)))
    latents = torch.randn((200, 576), device=device)
    rows[at] = formulas.latent_rows(latents[:, :512], latents[:, 512:], name == "fp8")
    indices = torch.stack([torch.randperm(200, device=device) for _ in range(70)])
    q = (torch.randn((70, heads, 576), device=device) * 0.05).bfloat16()
    expected, expected_lse = formulas.sparse_attention(q, rows, at[indices], 512, SCALE, name == "fp8")
    for out, lse in (
        sparse_mla_decode(q, plane, at[indices], layout, SCALE),
        sparse_mla_prefill(q, plane, at, indices, layout, SCALE),
    ):
        assert float(((out.float() - expected).norm(dim=2) / expected.norm(dim=2)).max()) < 1.2e-2
        assert float((lse - expected_lse).abs().max()) < 2e-3


def test_writes_behind_four_gigabytes(device: torch.device) -> None:
    """The same bytes as at the same places of a small plane, and none elsewhere."""
    layout = _layout("fp8")
    slots = torch.tensor([0, 65, 191], device=device)
    angles = torch.rand((3, 32), device=device) * 100
    latent, key = torch.randn((3, 576), device=device).bfloat16(), torch.randn((3, 128), device=device).bfloat16()
    norm, weight, bias = (torch.rand(size, device=device) for size in (512, 128, 128))
    for which in ("latent", "index"):
        near = layout.allocate(1, 3, device).get(which)[0]  # type: ignore[arg-type]
        far = _vast_plane(near.shape[1], device)
        for plane, first in ((near, 0), (far, (far.shape[0] - 3) * 64)):
            if which == "latent":
                parts = (latent[:, :512], latent[:, 512:], norm.bfloat16(), 1e-6, angles.cos(), angles.sin())
                cache_write.write_latent(plane, slots + first, *parts, layout)
            else:
                rest = (key, weight, bias, 1e-6, angles.cos(), angles.sin())
                cache_write.write_index_key(plane, slots + first, *rest, layout)
        assert bool(near.any())
        assert torch.equal(far[-3:], near)
        assert not bool(far[:-3].any())


def test_index_keys_behind_four_gigabytes(formulas: ModuleType, device: torch.device) -> None:
    layout = _layout("fp8")
    plane = _vast_plane(layout.page_bytes("index"), device)
    small = formulas.index_pages(torch.randn((5 * 64, 128), device=device))
    near = torch.tensor([3, 0, 4, 1, 2], device=device)
    far = torch.arange(plane.shape[0] - 5, plane.shape[0], device=device)[near]
    plane[-5:] = small
    q = torch.randn((9, 64, 128), device=device).to(torch.float8_e4m3fn)
    weights, lengths = torch.randn((9, 64), device=device), torch.tensor([0, 1, 63, 64, 65, 300, 319, 320, 7])
    lengths = lengths.to(device)
    expected = mqa_logits(q, small, weights, lengths, near, layout)
    assert torch.equal(mqa_logits(q, plane, weights, lengths, far, layout), expected)
    assert torch.equal(
        paged_mqa_logits(q, plane, weights, lengths, far.expand(9, -1).contiguous(), layout),
        paged_mqa_logits(q, small, weights, lengths, near.expand(9, -1).contiguous(), layout),
    )
    for row, length in enumerate(lengths.tolist()):
        if length:
            wanted = formulas.paged_logits(q[row].float(), small, weights[row], length, near)[:length]
            summed = formulas.paged_logits(q[row].float(), small, weights[row].abs(), length, near)[:length]
            assert float((expected[row, :length] - wanted).norm() / summed.norm()) < 1e-3


def test_scores_two_thousand_million_apart(formulas: ModuleType, device: torch.device) -> None:
    width, apart = 40_000, 1 << 30
    logits = torch.empty(2 * apart + width, device=device).as_strided((3, width), (apart, 1))
    logits.normal_()
    lengths = torch.tensor([width, 9_000, 5_000], device=device)
    chosen = topk_indices(logits, 2048, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(chosen[row].cpu(), formulas.best(logits[row], 2048, length))


@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (4, 32)])
def test_more_sequences_than_a_grid_has_rows(heads: int, dim: int, formulas: ModuleType, device: torch.device) -> None:
    """Long enough for samples in front of the selection; every eighth sequence is."""
    batch, width, k = 65_541, 130, 100
    layout = _layout("fp8", dim)
    pages = formulas.index_pages(torch.randn((300 * 64, dim), device=device))
    tables = torch.randint(300, (batch, width), device=device, dtype=torch.int32)
    q = torch.randint(-8, 9, (batch, heads, dim), device=device, dtype=torch.int8).bfloat16().to(torch.float8_e4m3fn)
    weights = torch.randn((batch, heads), device=device)
    lengths = torch.randint(20, 300, (batch,), device=device)
    lengths[::8] = torch.randint(8193, width * 64 + 1, (len(lengths[::8]),), device=device)
    arguments = (q, pages, weights, lengths, tables)
    scores = paged_mqa_logits(*arguments, layout)
    chosen = paged_topk_indices(*arguments, layout, k)
    for row in (0, 1, 8, 65_534, 65_535, 65_536, batch - 1):
        length = int(lengths[row])
        wanted = formulas.paged_logits(q[row].float(), pages, weights[row], length, tables[row])[:length]
        summed = formulas.paged_logits(q[row].float(), pages, weights[row].abs(), length, tables[row])[:length]
        assert float((scores[row, :length] - wanted).norm() / summed.norm()) < 1e-3
        assert bool((scores[row, length:] == float("-inf")).all())
        assert torch.equal(chosen[row].cpu(), formulas.best(scores[row], k, length))


def test_more_pages_than_a_grid_has_rows(device: torch.device) -> None:
    pages = torch.randint(0, 256, (600_000, 12), dtype=torch.uint8)
    assert torch.equal(cache_write.page_checksum(pages.to(device)).cpu(), cache_write.page_checksum(pages))
