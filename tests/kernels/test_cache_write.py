from __future__ import annotations

import pytest
import torch

from seamount.kernels.cache_write import page_checksum, write_index_key, write_latent
from seamount.kernels.hadamard import hadamard_transform
from seamount.kernels.layout import CacheLayout, gather_slots, unpack_latent
from seamount.kernels.rope import rope_angles, rope_frequencies

MASK = (1 << 64) - 1


def _layout(name: str, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=dtype)


@pytest.mark.parametrize("name", ["fp8", "bf16", "exact"])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65])
def test_latents_are_normalised_and_rotated(name: str, count: int, generator: torch.Generator) -> None:
    layout = _layout(name, torch.float64)
    plane = layout.allocate(1, 2).latent[0].fill_(0xFF)
    slots = torch.randperm(128, generator=generator)[:count]
    latent = torch.randn((count, 128), generator=generator, dtype=torch.float64)
    rope_key = torch.randn((count, 8), generator=generator, dtype=torch.float64)
    weight = torch.rand(128, generator=generator, dtype=torch.float64) + 0.5
    positions = torch.arange(1000, 1000 + count)
    cos, sin = rope_angles(positions, rope_frequencies(8, 10000.0, torch.float64))
    write_latent(plane, slots, latent, rope_key, weight, 1e-6, cos, sin, layout)
    normed = latent / (latent.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight
    turned = torch.view_as_complex(rope_key.view(count, 4, 2)) * torch.complex(cos, sin)
    expected = torch.cat((normed, torch.view_as_real(turned).flatten(1)), 1)
    actual = unpack_latent(gather_slots(plane, slots, layout, "latent"), layout)
    relative = {"fp8": 1 / 16, "bf16": 2**-8, "exact": 1e-12}[name]
    assert ((actual - expected).abs() <= expected.abs() * relative + (2e-5 if name != "exact" else 1e-12)).all()
    untouched = torch.tensor(sorted(set(range(128)) - set(slots.tolist())), dtype=torch.int64)
    assert (gather_slots(plane, untouched, layout, "latent") == 0xFF).all()


@pytest.mark.parametrize("count", [0, 1, 65])
def test_index_keys_are_normalised_rotated_and_transformed(count: int, generator: torch.Generator) -> None:
    layout = _layout("exact", torch.float64)
    plane = layout.allocate(1, 2).index[0].fill_(0xFF)
    slots = torch.randperm(128, generator=generator)[:count]
    key = torch.randn((count, 32), generator=generator, dtype=torch.float64) + 2
    weight = torch.rand(32, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(32, generator=generator, dtype=torch.float64)
    cos, sin = rope_angles(torch.arange(count) + 7, rope_frequencies(8, 10000.0, torch.float64))
    write_index_key(plane, slots, key, weight, bias, 1e-6, cos, sin, layout)
    centred = key - key.mean(1, keepdim=True)
    normed = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias
    turned = torch.complex(normed[:, :4], normed[:, 4:8]) * torch.complex(cos, sin)
    expected = torch.cat((turned.real, turned.imag, normed[:, 8:]), 1)
    stored = gather_slots(plane, slots, layout, "index").view(torch.float64)
    assert torch.allclose(hadamard_transform(stored), expected, atol=1e-10)


def _checksum(row: bytes) -> int:
    total = 0
    for i in range(len(row) // 4):
        word = int.from_bytes(row[4 * i : 4 * i + 4], "little", signed=True)
        state = (i + 1) * 0x9E3779B97F4A7C15 & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        total += word * ((state ^ state >> 31) | 1)
    return total & MASK


@pytest.mark.parametrize(("pages", "size"), [(0, 64), (1, 4), (3, 132 * 64), (70, 656 * 64)])
def test_checksums_follow_the_formula(pages: int, size: int, generator: torch.Generator) -> None:
    rows = torch.randint(0, 256, (pages, size), generator=generator, dtype=torch.uint8)
    sums = page_checksum(rows)
    assert sums.shape == (pages,)
    for page in {0, pages - 1} if pages else ():
        assert int(sums[page]) & MASK == _checksum(bytes(rows[page].tolist()))


def test_checksums_see_every_flip_swap_and_shift(generator: torch.Generator) -> None:
    row = torch.randint(0, 256, (1, 64), generator=generator, dtype=torch.uint8)
    variants = [row]
    for bit in range(64 * 8):
        flipped = row.clone()
        flipped[0, bit // 8] ^= 1 << (bit % 8)
        variants.append(flipped)
    variants.append(row.view(torch.int32).flip(1).contiguous().view(torch.uint8))
    variants.append(row.roll(4, dims=1))
    distinct = {bytes(variant[0].tolist()) for variant in variants}
    assert len(set(page_checksum(torch.cat(variants)).tolist())) == len(distinct)


def test_checksums_need_whole_words() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        page_checksum(torch.zeros((1, 6), dtype=torch.uint8))
