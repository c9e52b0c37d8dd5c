from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamount.kernels import indexer
from seamount.kernels.indexer import mqa_logits, paged_mqa_logits
from seamount.kernels.layout import CacheLayout, pack_index_key, scatter_slots
from seamount.kernels.quant import dequantize, quantize


def _score(q: Tensor, k: Tensor, w: Tensor) -> float:
    return sum(float(w[h]) * max(float(q[h] @ k), 0.0) for h in range(q.shape[0]))


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (1, 0), (1, 1), (9, 63), (9, 64), (17, 65)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tile", [None, 40])
def test_contiguous_keys(
    num_rows: int,
    num_keys: int,
    scaled: bool,
    tile: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile is not None:
        monkeypatch.setattr(indexer, "_TILE_ELEMENTS", tile)
    q = torch.randn((num_rows, 3, 16), generator=generator)
    k = torch.randn((num_keys, 16), generator=generator)
    w = torch.randn((num_rows, 3), generator=generator)
    scales = torch.rand(num_keys, generator=generator) + 0.1 if scaled else None
    lengths = torch.randint(0, num_keys + 1, (num_rows,), generator=generator)
    actual = mqa_logits(q, k, w, lengths, scales)
    assert actual.shape == (num_rows, num_keys)
    for t in range(num_rows):
        for s in range(num_keys):
            if s >= lengths[t]:
                assert actual[t, s].item() == float("-inf")
            else:
                expected = _score(q[t], k[s], w[t]) * (1.0 if scales is None else float(scales[s]))
                assert actual[t, s].item() == pytest.approx(expected, abs=1e-4)


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


def test_no_sequences() -> None:
    layout = CacheLayout.create("fp8", kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64)
    plane = layout.allocate(1, 1).index[0]
    tables = torch.zeros((0, 0), dtype=torch.int64)
    assert paged_mqa_logits(torch.zeros(0, 4, 32), plane, torch.zeros(0, 4), nothing, tables, layout).shape == (0, 0)
