from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.indexer import paged_mqa_logits, paged_topk_indices
from seamount.kernels.layout import CacheLayout
from seamount.kernels.topk import topk_indices

pytestmark = pytest.mark.gpu
Poison = Callable[[], AbstractContextManager[None]]


def _layout(dim: int = 128) -> CacheLayout:
    return CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=dim, dtype=torch.bfloat16)


def _pool(formulas: ModuleType, num_pages: int, dim: int, device: torch.device) -> Tensor:
    keys = torch.randn((num_pages * 64, dim), device=device)
    pages: Tensor = formulas.index_pages(keys * torch.exp2(torch.randint(-4, 5, (num_pages * 64, 1), device=device)))
    return pages


@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "extra_pages"),
    [
        ([1], 64, 128, 0),
        ([20000], 64, 128, 3),
        ([0, 1, 63, 64, 65, 128, 129, 4000], 64, 128, 1),
        ([130 + 61 * i for i in range(130)], 64, 128, 0),
        ([300, 10], 4, 32, 2),
        ([300, 500], 20, 64, 0),
    ],
)
@pytest.mark.parametrize("queries", [1, 2, 3])
def test_agrees_with_the_formula(
    lengths: list[int],
    heads: int,
    dim: int,
    extra_pages: int,
    queries: int,
    formulas: ModuleType,
    poison: Poison,
    device: torch.device,
) -> None:
    batch = len(lengths)
    width = max(-(-length // 64) for length in lengths) + extra_pages
    num_pages = max(batch * 4, width) + 7
    pages = _pool(formulas, num_pages, dim, device)
    # Shuffled pages, shared among sequences.
    tables = torch.stack([torch.randperm(num_pages, device=device)[:width] for _ in range(batch)])
    q8 = (torch.randn((batch, queries, heads, dim), device=device) * 3).to(torch.float8_e4m3fn)
    weights = torch.randn((batch, queries, heads), device=device)
    column = torch.tensor(lengths, device=device).unsqueeze(1)
    seen = (column - torch.arange(queries - 1, -1, -1, device=device)).clamp_min(0)
    with poison():
        out = paged_mqa_logits(q8, pages, weights, seen, tables, _layout(dim))
    assert out.shape == (batch, queries, width * 64)
    for b in range(0, batch, max(1, batch // 16)):
        for n in range(queries):
            length = int(seen[b, n])
            expected = formulas.paged_logits(q8[b, n].float(), pages, weights[b, n], length, tables[b])
            assert bool((out[b, n, length:] == float("-inf")).all())
            if length:
                # Against the size of what was summed: weights of both signs may cancel.
                summed = formulas.paged_logits(q8[b, n].float(), pages, weights[b, n].abs(), length, tables[b])
                error = (out[b, n, :length] - expected[:length]).norm() / summed[:length].norm()
                assert float(error) < 1e-3, (b, n, length)
    assert torch.equal(out, paged_mqa_logits(q8.float(), pages, weights, seen.int(), tables.int(), _layout(dim)))
    if queries == 1:
        flat = paged_mqa_logits(q8[:, 0], pages, weights[:, 0], seen[:, 0], tables, _layout(dim))
        assert torch.equal(flat, out[:, 0])


@pytest.mark.parametrize("queries", [1, 2, 3])
@pytest.mark.parametrize(
    ("lengths", "extra_pages", "k"),
    [
        ([0, 1, 63, 64, 65, 2047, 2048, 2049, 4097, 8193, 12000], 1, 2048),
        ([32768], 0, 2048),
        ([9000, 40000, 65537, 3, 131072, 20000], 0, 2048),
        ([70000, 200000], 2, 512),
        ([300, 500], 0, 64),
    ],
)
def test_selects_what_top_k_of_the_scores_selects(
    lengths: list[int],
    extra_pages: int,
    k: int,
    queries: int,
    formulas: ModuleType,
    poison: Poison,
    device: torch.device,
) -> None:
    batch = len(lengths)
    width = max(-(-length // 64) for length in lengths) + extra_pages
    pages = _pool(formulas, 300, 128, device)
    tables = torch.randint(300, (batch, width), device=device)
    q = torch.randn((batch, queries, 64, 128), device=device).to(torch.float8_e4m3fn)
    weights = torch.randn((batch, queries, 64), device=device)
    # Tokens that score exactly zero, more than k of them in the long rows: positive and negative zeros.
    pages.view(300, -1)[:200, :8192] = 0
    seen = torch.tensor(lengths, device=device)[:, None] - torch.arange(queries - 1, -1, -1, device=device)
    arguments = (q, pages, weights, seen.clamp_min(0), tables)
    with poison():
        chosen = paged_topk_indices(*arguments, _layout(), k)
    assert torch.equal(chosen, paged_topk_indices(*arguments, _layout(), k))
    logits = paged_mqa_logits(*arguments, _layout())
    assert torch.equal(chosen, topk_indices(logits.flatten(0, 1), k, arguments[3].flatten()).view(chosen.shape))
    for b in range(batch):
        assert torch.equal(chosen[b, 0].cpu(), formulas.best(logits[b, 0], k, int(arguments[3][b, 0])))
    if queries == 1:
        flat = (q[:, 0], pages, weights[:, 0], arguments[3][:, 0].int(), tables.int())
        assert torch.equal(paged_topk_indices(*flat, _layout(), k), chosen[:, 0])


def test_unused_slots_may_hold_anything(formulas: ModuleType, device: torch.device) -> None:
    pages = _pool(formulas, 6, 128, device)
    clean = pages.clone()
    table = torch.tensor([[4, 1, 2]], device=device)
    keys, scales = pages[:, :8192].view(6, 64, 128), pages[:, 8192:].view(6, 64, 4)
    for poisoned in (keys, scales):
        poisoned[1, 37:] = 0xFF
        poisoned[2] = 0xFF
        poisoned[0] = 0xFF
    q = torch.randn((1, 64, 128), device=device).to(torch.float8_e4m3fn)
    weights, length = torch.randn((1, 64), device=device), torch.tensor([64 + 37], device=device)
    out = paged_mqa_logits(q, pages, weights, length, table, _layout())
    assert torch.equal(out, paged_mqa_logits(q, clean, weights, length, table, _layout()))
    assert not bool(out.isnan().any())


def test_empty(device: torch.device) -> None:
    plane = torch.zeros((1, 64 * 132), dtype=torch.uint8, device=device)
    none = torch.zeros((0,), dtype=torch.int64, device=device)
    q, weights = torch.zeros((0, 64, 128), device=device), torch.zeros((0, 64), device=device)
    assert paged_mqa_logits(q, plane, weights, none, none.view(0, 0), _layout()).shape == (0, 0)
    assert paged_topk_indices(q, plane, weights, none, none.view(0, 0), _layout(), 3).shape == (0, 3)
    one, row = torch.zeros((1, 64, 128), device=device), torch.zeros((1, 64), device=device)
    no_pages = paged_topk_indices(one, plane, row, none.new_zeros(1), none.view(1, 0), _layout(), 3)
    assert no_pages.tolist() == [[-1] * 3]


def test_refuses_before_the_launch(device: torch.device) -> None:
    plane = torch.zeros((4, 64 * 132), dtype=torch.uint8, device=device)
    q, weights = torch.zeros((2, 64, 128), device=device), torch.zeros((2, 64), device=device)
    lengths, tables = (
        torch.ones(2, dtype=torch.int64, device=device),
        torch.zeros((2, 3), dtype=torch.int64, device=device),
    )
    for arguments, word in (
        ((q[..., :64], plane, weights, lengths, tables), "q has shape"),
        ((q.int(), plane, weights, lengths, tables), "q is"),
        ((q, plane[:, 4:], weights, lengths, tables), "plane has shape"),
        ((q, plane, weights[:1], lengths, tables), "weights has shape"),
        ((q, plane, weights, lengths.float(), tables), "context_lens is"),
        ((q, plane, weights, lengths.cpu(), tables), "context_lens is on"),
        ((q, plane, weights, lengths, tables[:1]), "page_tables has shape"),
        ((q, plane, weights, lengths, tables.T.contiguous().T), "page_tables has strided"),
    ):
        with pytest.raises(ValueError, match=word):
            paged_mqa_logits(*arguments, _layout())
        with pytest.raises(ValueError, match=word):
            paged_topk_indices(*arguments, _layout(), 5)
    with pytest.raises(ValueError, match="k is 0"):
        paged_topk_indices(q, plane, weights, lengths, tables, _layout(), 0)
