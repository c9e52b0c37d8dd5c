from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seamount.kernels.indexer import mqa_logits, mqa_topk_indices
from seamount.kernels.layout import CacheLayout

pytestmark = pytest.mark.gpu
Poison = Callable[[], AbstractContextManager[None]]


def _layout(dim: int = 128) -> CacheLayout:
    return CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=dim, dtype=torch.bfloat16)


def _inputs(
    formulas: ModuleType, num_rows: int, num_pages: int, heads: int, dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e4m3 queries, a pool of more pages than needed, weights of both signs, and shuffled pages of the pool."""
    keys = torch.randn(((num_pages + 9) * 64, dim), device=device)
    keys *= torch.exp2(torch.randint(-4, 5, (len(keys), 1), device=device))
    pool: Tensor = formulas.index_pages(keys)
    q = (torch.randn((num_rows, heads, dim), device=device) * 3).to(torch.float8_e4m3fn)
    weights = torch.randn((num_rows, heads), device=device)
    return q, pool, weights, torch.randperm(num_pages + 9, device=device)[:num_pages]


def _check(
    formulas: ModuleType, out: Tensor, q: Tensor, pool: Tensor, w: Tensor, lengths: Tensor, pages: Tensor
) -> None:
    assert out.shape == (q.shape[0], pages.shape[0] * 64)
    assert out.dtype == torch.float32
    for t in range(0, q.shape[0], max(1, q.shape[0] // 24)):
        length = int(lengths[t])
        assert bool((out[t, length:] == float("-inf")).all())
        if length:
            expected = formulas.paged_logits(q[t].float(), pool, w[t], length, pages)
            # Against the size of what was summed: weights of both signs may cancel.
            summed = formulas.paged_logits(q[t].float(), pool, w[t].abs(), length, pages)
            error = (out[t, :length] - expected[:length]).norm() / summed[:length].norm()
            assert float(error) < 1e-3, (t, length)


@pytest.mark.parametrize(
    ("num_rows", "num_keys"), [(1, 1), (1, 64), (2, 63), (7, 65), (9, 4000), (65, 128), (130, 700), (33, 20000)]
)
def test_causal_rows(num_rows: int, num_keys: int, formulas: ModuleType, poison: Poison, device: torch.device) -> None:
    """The last rows of a sequence of ``num_keys`` tokens; where there are more rows than tokens the first see none."""
    _score_rows(formulas, poison, num_rows, num_keys, 64, 128, device)


@pytest.mark.parametrize(("heads", "dim"), [(16, 128), (32, 128), (128, 128), (4, 32), (20, 64)])
def test_other_sizes(heads: int, dim: int, formulas: ModuleType, poison: Poison, device: torch.device) -> None:
    _score_rows(formulas, poison, 70, 700, heads, dim, device)


def _score_rows(
    formulas: ModuleType, poison: Poison, num_rows: int, num_keys: int, heads: int, dim: int, device: torch.device
) -> None:
    q, pool, weights, pages = _inputs(formulas, num_rows, -(-num_keys // 64), heads, dim, device)
    lengths = torch.arange(num_keys - num_rows + 1, num_keys + 1, device=device).clamp_min(0)
    with poison():
        out = mqa_logits(q, pool, weights, lengths, pages, _layout(dim))
    _check(formulas, out, q, pool, weights, lengths, pages)
    assert torch.equal(out, mqa_logits(q.float(), pool, weights, lengths.int(), pages.int(), _layout(dim)))


def test_lengths_in_any_order(formulas: ModuleType, device: torch.device) -> None:
    lengths = torch.tensor([0, 1, 63, 64, 65, 640, 128, 129, 0, 0, 577, 2], device=device)
    q, pool, weights, pages = _inputs(formulas, len(lengths), 10, 64, 128, device)
    _check(formulas, mqa_logits(q, pool, weights, lengths, pages, _layout()), q, pool, weights, lengths, pages)


def test_pages_may_repeat(formulas: ModuleType, device: torch.device) -> None:
    q, pool, weights, pages = _inputs(formulas, 9, 5, 64, 128, device)
    pages = pages[torch.tensor([0, 1, 0, 2, 2, 1, 4], device=device)]
    lengths = torch.arange(440, 449, device=device)
    _check(formulas, mqa_logits(q, pool, weights, lengths, pages, _layout()), q, pool, weights, lengths, pages)


@pytest.mark.parametrize("poison", ["keys", "scales"])
def test_unused_slots_may_hold_anything(poison: str, formulas: ModuleType, device: torch.device) -> None:
    q, pool, weights, pages = _inputs(formulas, 12, 3, 64, 128, device)
    lengths = torch.arange(90, 102, device=device)
    expected = mqa_logits(q, pool, weights, lengths, pages, _layout())
    dirty = pool.clone()
    part = dirty[:, :8192].view(-1, 64, 128) if poison == "keys" else dirty[:, 8192:].view(-1, 64, 4)
    used = torch.zeros((dirty.shape[0], 64), dtype=torch.bool, device=device)
    used[pages[0]] = True
    used[pages[1], :37] = True
    part[~used] = 0xFF
    assert torch.equal(expected, mqa_logits(q, dirty, weights, lengths, pages, _layout()))


@pytest.mark.parametrize("heads", [64, 20])
def test_selection_is_that_of_the_logits(
    heads: int, formulas: ModuleType, poison: Poison, device: torch.device
) -> None:
    q, pool, weights, pages = _inputs(formulas, 41, 70, heads, 128, device)
    lengths = torch.arange(4400, 4441, device=device)
    lengths[:3] = torch.tensor([0, 1, 300], device=device)
    logits = mqa_logits(q, pool, weights, lengths, pages, _layout())
    with poison():
        chosen = mqa_topk_indices(q, pool, weights, lengths, pages, _layout(), 300)
    assert torch.equal(chosen, mqa_topk_indices(q.float(), pool, weights, lengths.int(), pages.int(), _layout(), 300))
    for t in range(41):
        assert torch.equal(chosen[t].cpu(), formulas.best(logits[t], 300, int(lengths[t])))


def test_nothing_to_score(device: torch.device) -> None:
    pool = torch.zeros((2, 64 * 132), dtype=torch.uint8, device=device)
    none = torch.zeros((0,), dtype=torch.int64, device=device)
    q, weights = torch.zeros((0, 64, 128), device=device), torch.zeros((0, 64), device=device)
    assert mqa_logits(q, pool, weights, none, none, _layout()).shape == (0, 0)
    q, weights = torch.zeros((3, 64, 128), device=device), torch.zeros((3, 64), device=device)
    assert mqa_logits(q, pool, weights, none.new_zeros(3), none, _layout()).shape == (3, 0)
    assert bool((mqa_topk_indices(q, pool, weights, none.new_zeros(3), none, _layout(), 4) == -1).all())


def test_refuses_before_the_launch(device: torch.device) -> None:
    pool = torch.zeros((4, 64 * 132), dtype=torch.uint8, device=device)
    q, weights = torch.zeros((2, 64, 128), device=device), torch.zeros((2, 64), device=device)
    lengths, pages = torch.ones(2, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    for arguments, word in (
        ((q[..., :64], pool, weights, lengths, pages), "q has shape"),
        ((q.int(), pool, weights, lengths, pages), "q is"),
        ((q, pool[:, 4:], weights, lengths, pages), "plane has shape"),
        ((q, pool, weights[:1], lengths, pages), "weights has shape"),
        ((q, pool, weights, lengths.float(), pages), "lengths is"),
        ((q, pool, weights, lengths, pages.cpu()), "pages is on"),
        ((q, pool, weights, lengths, pages.view(1, 3)), "pages has shape"),
    ):
        with pytest.raises(ValueError, match=word):
            mqa_logits(*arguments, _layout())
        with pytest.raises(ValueError, match=word):
            mqa_topk_indices(*arguments, _layout(), 5)
