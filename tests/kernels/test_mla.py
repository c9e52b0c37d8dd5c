from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seamount.kernels import dense_mla as dense_module
from seamount.kernels import sparse_mla as sparse_module
from seamount.kernels.dense_mla import dense_mha, dense_mla
from seamount.kernels.layout import CacheLayout, pack_latent, scatter_slots, unpack_latent
from seamount.kernels.sparse_mla import sparse_mla_decode, sparse_mla_prefill

RANK, ROPE, HEADS, SCALE = 128, 8, 3, 0.11


@pytest.fixture(params=[None, 1], ids=["one tile", "smallest tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(dense_module, "_TILE_ELEMENTS", request.param)
        monkeypatch.setattr(sparse_module, "_TILE_ELEMENTS", request.param)


def _reference(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
    """One head's query over the tokens it sees, by the formula."""
    if keys.shape[0] == 0:
        return torch.zeros(values.shape[-1], dtype=q.dtype), math.inf
    weights = torch.tensor([math.exp(SCALE * float(q @ key)) for key in keys], dtype=q.dtype)
    return (weights[:, None] * values).sum(0) / weights.sum(), math.log(float(weights.sum()))


def _check(out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, rows: list[list[int]], tolerance: float) -> None:
    assert out.shape == (q.shape[0], HEADS, RANK)
    for t, seen in enumerate(rows):
        for h in range(HEADS):
            expected, expected_lse = _reference(q[t, h], kv[seen], kv[seen][:, :RANK])
            assert (out[t, h] - expected).abs().max() < tolerance
            assert lse[t, h].item() == pytest.approx(expected_lse, abs=tolerance)


def _random_rows(count: int, k: int, num_keys: int, generator: torch.Generator) -> list[list[int]]:
    rows = []
    for t in range(count):
        size = (
            (0, min(k, num_keys), min(1, num_keys))[t]
            if t < 3
            else int(torch.randint(0, min(k, num_keys) + 1, (1,), generator=generator))
        )
        rows.append(torch.randperm(num_keys, generator=generator)[:size].tolist())
    return rows


def _padded(rows: list[list[int]], k: int) -> Tensor:
    return torch.tensor([row + [-1] * (k - len(row)) for row in rows], dtype=torch.int64).view(len(rows), k)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 150])
def test_prefill_over_selected_rows(num_keys: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    k = 16
    layout = CacheLayout.create("exact", kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=32, dtype=dtype)
    plane = layout.allocate(1, 3).latent[0].fill_(0xFF)  # NaN wherever nothing is written
    kv = torch.randn((num_keys, RANK + ROPE), generator=generator, dtype=dtype)
    context = torch.randperm(3 * 64, generator=generator)[:num_keys]
    scatter_slots(plane, context, pack_latent(kv[:, :RANK], kv[:, RANK:], layout), layout, "latent")
    rows = _random_rows(9, k, num_keys, generator)
    q = torch.randn((9, HEADS, RANK + ROPE), generator=generator, dtype=dtype)
    indices = _padded(rows, k)
    indices[4] = indices[4][torch.randperm(k, generator=generator)]  # -1 may stand anywhere
    out, lse = sparse_mla_prefill(q, plane, context, indices, layout, SCALE)
    _check(out, lse, q, kv, rows, 1e-5 if dtype == torch.float32 else 1e-12)
    assert not out[0].any()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8", torch.float32), ("bf16", torch.float32), ("exact", torch.float32), ("exact", torch.float64)],
)
def test_decode_reads_only_its_slots(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    layout = CacheLayout.create(name, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=32, dtype=dtype)
    plane = layout.allocate(1, 3).latent[0].fill_(0xFF)  # NaN wherever nothing is written, slot 0 included
    used = (torch.randperm(3 * 64 - 1, generator=generator)[:100] + 1).tolist()
    packed = pack_latent(
        torch.randn((100, RANK), generator=generator, dtype=dtype),
        torch.randn((100, ROPE), generator=generator, dtype=dtype),
        layout,
    )
    scatter_slots(plane, torch.tensor(used), packed, layout, "latent")
    rows = _random_rows(7, 20, 100, generator)
    q = torch.randn((7, HEADS, RANK + ROPE), generator=generator, dtype=dtype)
    slots = _padded([[used[at] for at in row] for row in rows], 20)
    slots[3] = slots[3][torch.randperm(20, generator=generator)]  # -1 may stand anywhere
    out, lse = sparse_mla_decode(q, plane, slots, layout, SCALE)
    _check(out, lse, q, unpack_latent(packed, layout), rows, 1e-5)
    assert torch.equal(out, sparse_mla_decode(q, plane, slots, layout, SCALE)[0])


@pytest.mark.parametrize(("rows", "k"), [(0, 4), (3, 0), (3, 5)])
def test_nothing_to_attend_to(rows: int, k: int) -> None:
    layout = CacheLayout.create("fp8", kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=32, dtype=torch.float32)
    plane = layout.allocate(1, 1).latent[0].fill_(0xFF)
    q, nothing = torch.randn(rows, HEADS, RANK + ROPE), torch.full((rows, k), -1)
    for out, lse in (
        sparse_mla_decode(q, plane, nothing, layout, SCALE),
        sparse_mla_prefill(q, plane, torch.arange(2), nothing, layout, SCALE),
        sparse_mla_prefill(q, plane, torch.arange(0), nothing, layout, SCALE),
        dense_mla(q, plane, torch.arange(k), torch.zeros(rows, dtype=torch.int64), layout, SCALE),
    ):
        assert out.shape == (rows, HEADS, RANK)
        assert not out.any()
        assert (lse == math.inf).all()


def test_operands_of_the_plain_form_have_their_dimensions() -> None:
    q, k, k_rope, lengths = torch.zeros(2, 3, 6), torch.zeros(4, 3, 4), torch.zeros(4, 2), torch.ones(2)
    for arguments, name in (
        ((q[0], k, k_rope, k), "q"),
        ((q, k[0], k_rope, k), "k"),
        ((q, k, k, k), "k_rope"),
        ((q, k, k_rope, k[..., 0]), "v"),
    ):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            dense_mha(*arguments, lengths, SCALE)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (5, 63), (64, 65)])
def test_plain_and_absorbed_forms_are_equal(num_rows: int, num_keys: int, generator: torch.Generator) -> None:
    nope, value = 12, 10
    layout = CacheLayout.create(
        "exact", kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=32, dtype=torch.float64
    )
    plane = layout.allocate(1, 3).latent[0].fill_(0xFF)  # NaN wherever nothing is written
    q = torch.randn((num_rows, HEADS, nope + ROPE), generator=generator, dtype=torch.float64)
    kv = torch.randn((num_keys, RANK + ROPE), generator=generator, dtype=torch.float64)
    slots = torch.randperm(3 * 64, generator=generator)[:num_keys]
    scatter_slots(plane, slots, pack_latent(kv[:, :RANK], kv[:, RANK:], layout), layout, "latent")
    k_up = torch.randn((HEADS, nope, RANK), generator=generator, dtype=torch.float64) * 0.1
    v_up = torch.randn((HEADS, value, RANK), generator=generator, dtype=torch.float64) * 0.1
    lengths = torch.randint(0, num_keys + 1, (num_rows,), generator=generator)
    keys = torch.empty(num_keys, HEADS, nope, dtype=torch.float64)
    values = torch.empty(num_keys, HEADS, value, dtype=torch.float64)
    absorbed = torch.empty(num_rows, HEADS, RANK + ROPE, dtype=torch.float64)
    for h in range(HEADS):
        keys[:, h] = kv[:, :RANK] @ k_up[h].T
        values[:, h] = kv[:, :RANK] @ v_up[h].T
        absorbed[:, h] = torch.cat((q[:, h, :nope] @ k_up[h], q[:, h, nope:]), 1)
    plain, plain_lse = dense_mha(q, keys, kv[:, RANK:], values, lengths, SCALE)
    latent, latent_lse = dense_mla(absorbed, plane, slots, lengths, layout, SCALE)
    projected = torch.stack([latent[:, h] @ v_up[h].T for h in range(HEADS)], 1)
    assert torch.allclose(plain, projected, atol=1e-10)
    assert torch.allclose(plain_lse, latent_lse, atol=1e-10)
    whole = torch.cat((keys[:, 1], kv[:, RANK:]), 1)
    for t, length in enumerate(lengths.tolist()):
        expected, expected_lse = _reference(q[t, 1], whole[:length], values[:length, 1])
        assert torch.allclose(plain[t, 1], expected, atol=1e-10)
        assert plain_lse[t, 1].item() == pytest.approx(expected_lse, abs=1e-10)
