from __future__ import annotations

import random
import struct

import pytest
import torch

from seamount.kernels.layout import (
    CacheLayout,
    gather_slots,
    pack_index_key,
    pack_latent,
    scatter_slots,
    unpack_index_pages,
    unpack_latent,
)

LAYOUTS = [
    ("fp8", torch.float32),
    ("fp8", torch.bfloat16),
    ("bf16", torch.float32),
    ("exact", torch.float32),
    ("exact", torch.float64),
    ("exact", torch.bfloat16),
]


def _layout(name: str, dtype: torch.dtype, rank: int = 256, rope: int = 16, index: int = 64) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=rank, qk_rope_head_dim=rope, index_head_dim=index, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "latent_bytes", "index_bytes", "signature"),
    [
        ("fp8", torch.bfloat16, 656, 132, "fp8/512/64/128"),
        ("bf16", torch.bfloat16, 1152, 132, "bf16/512/64/128"),
        ("exact", torch.float32, 2304, 512, "exact/512/64/128/float32"),
        ("exact", torch.float64, 4608, 1024, "exact/512/64/128/float64"),
    ],
)
def test_bytes_at_the_published_sizes(
    name: str, dtype: torch.dtype, latent_bytes: int, index_bytes: int, signature: str
) -> None:
    layout = _layout(name, dtype, 512, 64, 128)
    assert layout.latent_bytes_per_token == latent_bytes
    assert layout.index_bytes_per_token == index_bytes
    assert layout.signature == signature
    planes = layout.allocate(2, 3)
    assert [plane.shape for plane in planes.latent] == [(3, 64 * latent_bytes)] * 2
    assert [plane.shape for plane in planes.get("index")] == [(3, 64 * index_bytes)] * 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "int4"}, "layout"),
        ({"kv_lora_rank": 192}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"index_head_dim": 96}, "index_head_dim"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_what_cannot_be_stored_is_refused(change: dict[str, object], field: str) -> None:
    sizes = {
        "name": "fp8", "kv_lora_rank": 128, "qk_rope_head_dim": 8, "index_head_dim": 64, "dtype": torch.float32
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=field):
        CacheLayout.create(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 63, 65])
def test_scattered_rows_come_back(name: str, dtype: torch.dtype, count: int, generator: torch.Generator) -> None:
    layout = _layout(name, dtype)
    planes = layout.allocate(1, 3)
    slots = torch.randperm(3 * 64, generator=generator)[:count]
    for which, width in (("latent", layout.latent_bytes_per_token), ("index", layout.index_bytes_per_token)):
        plane = planes.get(which)[0]  # type: ignore[arg-type]
        rows = torch.randint(0, 256, (count, width), generator=generator, dtype=torch.uint8)
        scatter_slots(plane, slots, rows, layout, which)  # type: ignore[arg-type]
        assert torch.equal(gather_slots(plane, slots, layout, which), rows)  # type: ignore[arg-type]
        others = torch.tensor(sorted(set(range(3 * 64)) - set(slots.tolist())), dtype=torch.int64)
        assert not gather_slots(plane, others, layout, which).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp8", "bf16", "exact"])
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
def test_rows_may_start_at_any_byte(name: str, start: int, generator: torch.Generator) -> None:
    """As views of a received frame do: wide integers are used only where they fit."""
    layout = _layout(name, torch.float32)
    planes = layout.allocate(1, 3)
    slots = torch.randperm(3 * 64, generator=generator)[:65]
    for which, width in (("latent", layout.latent_bytes_per_token), ("index", layout.index_bytes_per_token)):
        plane = planes.get(which)[0]  # type: ignore[arg-type]
        frame = torch.randint(0, 256, (start + 65 * width,), generator=generator, dtype=torch.uint8)
        rows = frame[start:].view(65, width)
        scatter_slots(plane, slots, rows, layout, which)  # type: ignore[arg-type]
        assert torch.equal(gather_slots(plane, slots, layout, which), rows)  # type: ignore[arg-type]


def test_index_page_holds_all_keys_then_all_scales(generator: torch.Generator) -> None:
    layout = _layout("fp8", torch.float32, index=128)
    plane = layout.allocate(1, 2).index[0]
    keys = torch.randn((64, 128), generator=generator)
    rows = pack_index_key(keys, layout)
    scatter_slots(plane, torch.arange(64, 128), rows, layout, "index")
    assert torch.equal(plane[1, : 64 * 128].view(64, 128), rows[:, :128])
    assert torch.equal(plane[1, 64 * 128 :].view(64, 4), rows[:, 128:])
    values, scales = unpack_index_pages(plane[1:], layout)
    assert scales is not None
    assert ((values * scales[:, None]) - keys).abs().max() < keys.abs().max() / 14


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    return sign * ((8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9)


def _block(rng: random.Random) -> tuple[bytes, float, list[float]]:
    """128 e4m3 of one scale, the scale, and the numbers that they are; the largest, 448 scales, says which scale."""
    raw = bytearray(rng.choices([byte for byte in range(256) if byte & 0x7F != 0x7F], k=128))
    raw[rng.randrange(128)] = rng.choice((0x7E, 0xFE))
    scale = 2.0 ** rng.randint(-12, 8)
    return bytes(raw), scale, [_e4m3(byte) * scale for byte in raw]


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_every_byte_of_a_token_lies_where_the_published_formats_say(name: str, generator: torch.Generator) -> None:
    """512 e4m3, 4 scales, 64 bfloat16, or 576 bfloat16; an index page 64 keys of 128 e4m3, then 64 scales."""
    rng = random.Random(int(torch.randint(1 << 31, (1,), generator=generator)))
    layout = _layout(name, torch.float32, 512, 64, 128)
    planes, size = layout.allocate(1, 2), {"fp8": 656, "bf16": 1152}[name]
    latent_plane, index_plane = bytearray(2 * 64 * size), bytearray(2 * 64 * 132)
    for slot in (0, 1, 63, 64, 127):
        raw, scales, numbers = zip(*(_block(rng) for _ in range(4)), strict=True)
        latent = [number for block in numbers for number in block]
        # The upper halves of float32, none infinite or NaN.
        rope = [rng.randrange(1 << 16) & 0xBFFF for _ in range(64)]
        rope_key = [struct.unpack("<f", struct.pack("<HH", 0, half))[0] for half in rope]
        halves = [struct.unpack("<HH", struct.pack("<f", number))[1] for number in latent]
        front = b"".join(raw) + struct.pack("<4f", *scales) if name == "fp8" else struct.pack("<512H", *halves)
        latent_plane[slot * size : (slot + 1) * size] = front + struct.pack("<64H", *rope)
        key_raw, key_scale, key = _block(rng)
        page, offset = divmod(slot, 64)
        at, scale_at = page * 8448 + offset * 128, page * 8448 + 8192 + offset * 4
        index_plane[at : at + 128], index_plane[scale_at : scale_at + 4] = key_raw, struct.pack("<f", key_scale)
        rows = pack_latent(torch.tensor([latent]), torch.tensor([rope_key]), layout)
        scatter_slots(planes.latent[0], torch.tensor([slot]), rows, layout, "latent")
        scatter_slots(
            planes.index[0], torch.tensor([slot]), pack_index_key(torch.tensor([key]), layout), layout, "index"
        )
    assert bytes(planes.latent[0].flatten().tolist()) == bytes(latent_plane)
    assert bytes(planes.index[0].flatten().tolist()) == bytes(index_plane)


@pytest.mark.parametrize(("name", "dtype"), LAYOUTS)
def test_latents_survive_packing(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    layout = _layout(name, dtype)
    latent = torch.randn((65, 256), generator=generator, dtype=torch.float64).to(dtype)
    rope_key = torch.randn((65, 16), generator=generator, dtype=torch.float64).to(dtype)
    rows = pack_latent(latent, rope_key, layout)
    assert rows.shape == (65, layout.latent_bytes_per_token)
    restored = unpack_latent(rows, layout)
    assert restored.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    both = torch.cat((latent, rope_key), 1).to(restored.dtype)
    if name == "exact":
        assert torch.equal(restored, both)
    else:
        relative = 1 / 16 if name == "fp8" else 2**-8
        assert ((restored - both).abs() <= both.abs() * relative + 2e-5).all()
    assert torch.equal(restored[:, 256:].to(torch.bfloat16), both[:, 256:].to(torch.bfloat16))
    assert unpack_latent(rows[:0], layout).shape == (0, 272)


def test_exact_index_keys_have_no_scales(generator: torch.Generator) -> None:
    layout = _layout("exact", torch.float64)
    keys = torch.randn((64, 64), generator=generator, dtype=torch.float64)
    values, scales = unpack_index_pages(pack_index_key(keys, layout).view(1, -1), layout)
    assert scales is None
    assert torch.equal(values, keys)


def test_slots_outside_the_plane_are_refused() -> None:
    layout = _layout("exact", torch.float32)
    planes = layout.allocate(1, 1)
    with pytest.raises(IndexError):
        gather_slots(planes.latent[0], torch.tensor([64]), layout, "latent")
