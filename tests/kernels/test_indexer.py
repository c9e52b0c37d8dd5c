from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamount.kernels import indexer
from seamount.kernels.indexer import mqa_logits, mqa_topk_indices, paged_mqa_logits, paged_topk_indices
from seamount.kernels.layout import CacheLayout, pack_index_key, scatter_slots
from seamount.kernels.quant import dequantize, quantize


def _score(q: Tensor, k: Tensor, w: Tensor) -> float:
    return sum(float(w[h]) * max(float(q[h] @ k), 0.0) for h in range(q.shape[0]))


def _paged(key: Tensor, layout: CacheLayout, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A plane that holds the keys [L, D] in shuffled pages, NaN elsewhere; their pages; the keys as stored."""
    num_pages = -(-key.shape[0] // 64)
    pages = torch.randperm(num_pages + 3, generator=generator)[:num_pages]
    plane = layout.allocate(1, num_pages + 3).index[0].fill_(0xFF)
    at = torch.arange(key.shape[0])
    scatter_slots(plane, pages[at // 64] * 64 + at % 64, pack_index_key(key, layout), layout, "index")
    return plane, pages, dequantize(*quantize(key, key.shape[1])) if layout.quantizes_index else key


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (1, 0), (1, 1), (9, 63), (9, 64), (17, 65)])
@pytest.mark.parametrize("name", ["fp8", "exact"])
@pytest.mark.parametrize("tile", [None, 40])
def test_rows_of_one_sequence(
    num_rows: int,
    num_keys: int,
    name: str,
    tile: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile is not None:
        monkeypatch.setattr(indexer, "_TILE_ELEMENTS", tile)
    layout = CacheLayout.create(name, kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=16, dtype=torch.float32)
    plane, pages, k = _paged(torch.randn((num_keys, 16), generator=generator), layout, generator)
    q = torch.randn((num_rows, 3, 16), generator=generator)
    w = torch.randn((num_rows, 3), generator=generator)
    lengths = torch.randint(0, num_keys + 1, (num_rows,), generator=generator)
    actual = mqa_logits(q, plane, w, lengths, pages, layout)
    assert actual.shape == (num_rows, 64 * len(pages))
    for t in range(num_rows):
        assert (actual[t, lengths[t] :] == float("-inf")).all()
        for s in range(int(lengths[t])):
            assert actual[t, s].item() == pytest.approx(_score(q[t], k[s], w[t]), abs=1e-4)


@pytest.mark.parametrize("tile", [None, 1])
@pytest.mark.parametrize("num_rows", [0, 1, 8, 19])
def test_selection_is_that_of_the_scores(
    num_rows: int, tile: int | None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:
        monkeypatch.setattr(indexer, "_CPU_TILE_SCORES", tile)
    layout = CacheLayout.create("fp8", kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=torch.float32)
    plane, pages, _ = _paged(torch.randn((150, 32), generator=generator), layout, generator)
    q, w = torch.randn((num_rows, 3, 32), generator=generator), torch.randn((num_rows, 3), generator=generator)
    lengths = torch.randint(0, 151, (num_rows,), generator=generator)
    selected = mqa_topk_indices(q, plane, w, lengths, pages, layout, 20)
    assert selected.shape == (num_rows, 20)
    logits = mqa_logits(q, plane, w, lengths, pages, layout)
    for t in range(num_rows):
        count = min(20, int(lengths[t]))
        best = logits[t].sort(descending=True, stable=True).indices[:count].sort().values
        assert selected[t].tolist() == best.tolist() + [-1] * (20 - count)


@pytest.mark.parametrize("name", ["fp8", "exact"])
@pytest.mark.parametrize("tile", [None, 1])
def test_paged_keys(name: str, tile: int | None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed lengths, pages in any order, NaN in every slot that holds no token."""
    if tile is not None:
        monkeypatch.setattr(indexer, "_TILE_ELEMENTS", tile)
    layout = CacheLayout.create(name, kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=torch.float32)
    lengths = [1, 63, 0, 64, 65, 300, 129]
    free = torch.randperm(24, generator=generator).tolist()
    plane = layout.allocate(1, 24).index[0].fill_(0xFF)
    tables = torch.zeros((len(lengths), 5), dtype=torch.int64)
    keys = []
    for b, length in enumerate(lengths):
        pages = [free.pop() for _ in range(-(-length // 64))]
        tables[b, : len(pages)] = torch.tensor(pages, dtype=torch.int64)
        key = torch.randn((length, 32), generator=generator)
        slots = torch.tensor([pages[s // 64] * 64 + s % 64 for s in range(length)], dtype=torch.int64)
        scatter_slots(plane, slots, pack_index_key(key, layout), layout, "index")
        keys.append(dequantize(*quantize(key, 32)) if name == "fp8" else key)
    q = torch.randn((len(lengths), 4, 32), generator=generator)
    w = torch.randn((len(lengths), 4), generator=generator)
    actual = paged_mqa_logits(q, plane, w, torch.tensor(lengths), tables, layout)
    assert actual.shape == (len(lengths), 5 * 64)
    for b, length in enumerate(lengths):
        assert (actual[b, length:] == float("-inf")).all()
        expected = torch.tensor([_score(q[b], key, w[b]) for key in keys[b]])
        assert torch.allclose(actual[b, :length], expected, atol=1e-4)
    again = paged_mqa_logits(q, plane, w, torch.tensor(lengths), tables, layout)
    assert torch.equal(actual, again)
    chosen = paged_topk_indices(q, plane, w, torch.tensor(lengths), tables, layout, 20)
    for b, length in enumerate(lengths):
        best = sorted((-score, at) for at, score in enumerate(actual[b, :length].tolist()))[:20]
        assert chosen[b].tolist() == sorted(at for _, at in best) + [-1] * (20 - len(best))
    pairs = (torch.stack((q, q.flip(0)), 1), plane, torch.stack((w, w.flip(0)), 1))
    two = paged_topk_indices(*pairs, torch.tensor(lengths)[:, None].expand(-1, 2), tables, layout, 20)
    assert two.shape == (len(lengths), 2, 20)
    assert torch.equal(two[:, 0], chosen)


def test_no_sequences() -> None:
    layout = CacheLayout.create("fp8", kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64)
    plane = layout.allocate(1, 1).index[0]
    tables = torch.zeros((0, 0), dtype=torch.int64)
    none = (torch.zeros(0, 4, 32), plane, torch.zeros(0, 4), nothing, tables, layout)
    assert paged_mqa_logits(*none).shape == (0, 0)
    assert paged_topk_indices(*none, 3).shape == (0, 3)
    with pytest.raises(ValueError, match="k is 0"):
        paged_topk_indices(*none, 0)
    with pytest.raises(ValueError, match="k is 0"):
        mqa_topk_indices(*none[:4], nothing, layout, 0)
