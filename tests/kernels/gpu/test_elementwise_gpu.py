"""Quantisation, norms, rope, Hadamard rotation, cache writes and checksums, against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: no GPU kernels here")

from seamount.kernels import cache_write as reference
from seamount.kernels.layout import CacheLayout, gather_slots, pack_index_key, scatter_slots, unpack_latent
from seamount.kernels.norms import layer_norm, rms_norm
from seamount.kernels.quant import dequantize, quantize
from seamount.kernels.rope import apply_rope_half, apply_rope_interleaved
from seamount.kernels.triton import cache_write, elementwise

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]


def same_bytes(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "block"), [(0, 128, 128), (1, 128, 128), (63, 7168, 128), (65, 64, 32)])
def test_quantize_is_bit_exact(
    rows: int, channels: int, block: int, dtype: torch.dtype, poisoned: torch.device, generator: torch.Generator
) -> None:
    magnitude = 2.0 ** torch.randint(-40, 60, (rows, 1), generator=generator)
    x = (torch.randn((rows, channels), generator=generator) * magnitude).to(dtype)
    if rows:
        x[0, :block] = 0
        x[-1, 1] = 448.0 * 2.0**59  # a largest value on the edge between two scales
    values, scales = elementwise.quantize(x.to(poisoned), block)
    expected_values, expected_scales = quantize(x, block)
    assert same_bytes(scales, expected_scales)
    if poisoned.type == "cuda":
        assert same_bytes(values, expected_values)


def test_a_nan_stays_in_its_block(target: torch.device) -> None:
    x = torch.ones((2, 256), device=target)
    x[0, 3] = float("nan")
    values, scales = elementwise.quantize(x, 128)
    bad = dequantize(values.cpu(), scales.cpu()).isnan()
    assert bad[0, 3]
    assert not bad[0, 128:].any()
    assert not bad[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 40), (65, 7168), (3, 5, 512)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, poisoned: torch.device, generator: torch.Generator) -> None:
    x = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.rand(shape[-1], generator=generator), torch.randn(shape[-1], generator=generator)
    on = poisoned
    # The sums' order differs, so results do in the last place.
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for actual, expected in (
        (elementwise.rms_norm(x.to(on), weight.to(on), 1e-6), rms_norm(x, weight, 1e-6)),
        (elementwise.layer_norm(x.to(on), weight.to(on), bias.to(on), 1e-6), layer_norm(x, weight, bias, 1e-6)),
    ):
        assert actual.dtype == dtype
        assert ((actual.cpu().float() - expected.float()).abs() <= tolerance * (1 + expected.float().abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (65, 3, 64), (2, 128, 16)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_is_bit_exact(
    shape: tuple[int, ...],
    interleaved: bool,
    dtype: torch.dtype,
    poisoned: torch.device,
    generator: torch.Generator,
) -> None:
    wide = torch.randn((*shape[:-1], shape[-1] + 8), generator=generator).to(dtype)
    x = wide[..., 8:]  # strided, as a slice of a projection is
    angles = torch.rand((shape[0], shape[-1] // 2), generator=generator) * 100
    on = poisoned
    actual = elementwise.apply_rope(
        wide.to(on)[..., 8:], angles.cos().to(on), angles.sin().to(on), interleaved=interleaved
    )
    expected = (apply_rope_interleaved if interleaved else apply_rope_half)(x, angles.cos(), angles.sin())
    if dtype == torch.float32 or on.type == "cuda":
        assert same_bytes(actual, expected)


def layout_of(name: str, rank: int, rope: int, dim: int, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=rank, qk_rope_head_dim=rope, index_head_dim=dim, dtype=dtype)


SIZES = [("fp8", 512, 64, 128), ("bf16", 512, 64, 128), ("fp8", 384, 16, 32), ("bf16", 96, 8, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "rank", "rope", "dim"), SIZES)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65])
def test_latents_are_written_bit_for_bit(
    name: str,
    rank: int,
    rope: int,
    dim: int,
    count: int,
    dtype: torch.dtype,
    target: torch.device,
    generator: torch.Generator,
) -> None:
    """Latents of +-1 have a norm of exactly 1, whatever the order of the sum: every byte is then determined."""
    layout = layout_of(name, rank, rope, dim, dtype)
    expected = layout.allocate(1, 3).latent[0].fill_(0xFF)
    actual = expected.to(target)
    slots = torch.randperm(192, generator=generator)[:count]
    projected = torch.randn((count, rank + rope), generator=generator).to(dtype)
    projected[:, :rank] = projected[:, :rank].sign() + (projected[:, :rank] == 0)
    weight = (torch.randn(rank, generator=generator) * 2.0 ** torch.randint(-12, 8, (rank,), generator=generator)).to(
        dtype
    )
    angles = torch.rand((count, rope // 2), generator=generator) * 100
    _write_both(expected, actual, slots, projected, rank, weight, 0.0, angles, layout)
    if target.type == "cuda":
        assert same_bytes(actual, expected)
    written = set(slots.tolist())
    others = torch.tensor([slot for slot in range(192) if slot not in written], dtype=torch.int64)
    assert (gather_slots(actual.cpu(), others, layout, "latent") == 0xFF).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "rank", "rope", "dim"), SIZES)
def test_latents_of_any_norm(
    name: str,
    rank: int,
    rope: int,
    dim: int,
    dtype: torch.dtype,
    target: torch.device,
    generator: torch.Generator,
) -> None:
    """The norm's last bit depends on the order of its sum, so a rare value may round to its neighbour."""
    layout = layout_of(name, rank, rope, dim, dtype)
    expected = layout.allocate(1, 5).latent[0]
    actual = expected.to(target)
    slots = torch.randperm(320, generator=generator)[:257]
    projected = (torch.randn((257, rank + rope), generator=generator) * 5).to(dtype)
    weight = (torch.rand(rank, generator=generator) + 0.5).to(dtype)
    angles = torch.rand((257, rope // 2), generator=generator) * 100
    _write_both(expected, actual, slots, projected, rank, weight, 1e-6, angles, layout)
    if target.type == "cuda":
        assert (actual.cpu() != expected).float().mean() < 1e-3
    theirs, ours = (unpack_latent(gather_slots(p, slots, layout, "latent"), layout) for p in (expected, actual.cpu()))
    assert ((ours - theirs).abs() <= theirs.abs() / 7 + 0.01).all()


def _write_both(
    expected: Tensor,
    actual: Tensor,
    slots: Tensor,
    projected: Tensor,
    rank: int,
    weight: Tensor,
    eps: float,
    angles: Tensor,
    layout: CacheLayout,
) -> None:
    on, cos, sin = actual.device, angles.cos(), angles.sin()
    reference.write_latent(expected, slots, projected[:, :rank], projected[:, rank:], weight, eps, cos, sin, layout)
    there = projected.to(on)
    cache_write.write_latent(
        actual, slots.to(on), there[:, :rank], there[:, rank:], weight.to(on), eps, cos.to(on), sin.to(on), layout
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rope"), [(128, 64), (64, 64), (32, 8)])
@pytest.mark.parametrize("count", [0, 1, 65])
def test_index_keys(
    dim: int, rope: int, count: int, dtype: torch.dtype, target: torch.device, generator: torch.Generator
) -> None:
    layout = layout_of("fp8", 128, rope, dim, dtype)
    expected = layout.allocate(1, 3).index[0].fill_(0xFF)
    actual = expected.to(target)
    slots = torch.randperm(192, generator=generator)[:count]
    key = (torch.randn((count, dim), generator=generator) * 3 + 2).to(dtype)
    weight, bias = torch.rand(dim, generator=generator) + 0.5, torch.randn(dim, generator=generator)
    angles = torch.rand((count, rope // 2), generator=generator) * 100
    arguments = (slots, key, weight, bias, 1e-6, angles.cos(), angles.sin())
    reference.write_index_key(expected, *arguments, layout)
    moved = [argument.to(target) if isinstance(argument, Tensor) else argument for argument in arguments]
    cache_write.write_index_key(actual, *moved, layout)
    scales = actual.cpu()[:, 64 * dim :]
    assert (scales != expected[:, 64 * dim :]).float().mean() < 1e-2
    # Sums in another order: at most a rare neighbour. The interpreter truncates instead of rounding.
    assert (actual.cpu() != expected).float().mean() < (1e-3 if target.type == "cuda" else 0.5)


def test_index_keys_are_written_bit_for_bit(target: torch.device, generator: torch.Generator) -> None:
    """Keys and weights of +-1, no rotation, 64^-0.5 = 1 / 8: every sum on the way is exact, in any order."""
    layout = layout_of("fp8", 128, 32, 64, torch.bfloat16)
    expected = layout.allocate(1, 3).index[0].fill_(0xFF)
    actual = expected.to(target)
    slots = torch.randperm(192, generator=generator)[:65]
    order = torch.stack([torch.randperm(64, generator=generator) for _ in range(65)])
    key = torch.where(order < 32, 1.0, -1.0).to(torch.bfloat16)
    weight = torch.where(torch.rand(64, generator=generator) < 0.5, 1.0, -1.0)
    bias = torch.randint(-3, 4, (64,), generator=generator).float()
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)])
    # Not the reference: torch's own layer_norm is off by an ulp even here.
    rows = pack_index_key((key * weight + bias) @ hadamard / 8, layout)
    scatter_slots(expected, slots, rows, layout, "index")
    arguments = (slots, key, weight, bias, 0.0, torch.ones(65, 16), torch.zeros(65, 16))
    moved = [argument.to(target) if isinstance(argument, Tensor) else argument for argument in arguments]
    cache_write.write_index_key(actual, *moved, layout)
    if target.type == "cuda":
        assert same_bytes(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64, 128), (1, 64, 128), (65, 3, 128), (7, 32)])
def test_query_rotation(
    shape: tuple[int, ...], dtype: torch.dtype, poisoned: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator).to(dtype)
    angles = torch.rand((shape[0], 8), generator=generator) * 100
    cos, sin = angles.cos(), angles.sin()
    expected = reference.rotate_index_vectors(x, cos, sin)
    actual = cache_write.rotate_index_vectors(x.to(poisoned), cos.to(poisoned), sin.to(poisoned)).cpu()
    tolerance = 5e-6 if dtype == torch.float32 else 0.05
    assert actual.dtype == dtype
    assert ((actual.float() - expected.float()).abs() <= tolerance).all()
    if poisoned.type == "cuda":
        values, scales = cache_write.rotate_quantize_index_vectors(x.to(poisoned), cos.to(poisoned), sin.to(poisoned))
        # Float32 up to the quantiser, whatever x's dtype is.
        wide = cache_write.rotate_index_vectors(x.float().to(poisoned), cos.to(poisoned), sin.to(poisoned))
        then = quantize(wide.cpu(), shape[-1])
        assert same_bytes(values, then[0])
        assert same_bytes(scales, then[1])


def test_slots_outside_the_plane_write_nothing(target: torch.device) -> None:
    layout = layout_of("fp8", 128, 8, 32, torch.float32)
    planes = layout.allocate(1, 1, target)
    slots = torch.tensor([-1, 64, 1 << 40], device=target)
    cos = torch.ones((3, 4), device=target)
    x, key = torch.ones((3, 136), device=target), torch.ones((3, 32), device=target)
    ones = torch.ones(128, device=target)
    cache_write.write_latent(planes.latent[0], slots, x[:, :128], x[:, 128:], ones, 1e-6, cos, cos, layout)
    cache_write.write_index_key(planes.index[0], slots, key, ones[:32], ones[:32], 1e-6, cos, cos, layout)
    assert not planes.latent[0].any()
    assert not planes.index[0].any()


@pytest.mark.parametrize(("pages", "size"), [(0, 64), (1, 4), (3, 132 * 64), (9, 656 * 64), (70, 1028)])
def test_checksums_are_those_of_the_cpu(
    pages: int, size: int, target: torch.device, generator: torch.Generator
) -> None:
    rows = torch.randint(0, 256, (pages, size), generator=generator, dtype=torch.uint8)
    assert torch.equal(cache_write.page_checksum(rows.to(target)).cpu(), reference.page_checksum(rows))


def test_bad_arguments_are_refused_before_a_launch(target: torch.device) -> None:
    layout = layout_of("fp8", 128, 8, 32, torch.float32)
    plane = layout.allocate(1, 1, target).latent[0]
    slots, weight = torch.zeros(2, dtype=torch.int64, device=target), torch.ones(128, device=target)
    latent, key, cos = (torch.ones((2, width), device=target) for width in (128, 8, 4))

    def write(**other: Tensor) -> None:
        x = {
            "plane": plane,
            "slots": slots,
            "latent": latent,
            "rope_key": key,
            "norm_weight": weight,
            "cos": cos,
        } | other
        cache_write.write_latent(
            x["plane"], x["slots"], x["latent"], x["rope_key"], x["norm_weight"], 1e-6, x["cos"], cos, layout
        )

    for name, bad in {
        "latent": latent[:, :64],
        "rope_key": key.double(),
        "slots": slots.int(),
        "plane": plane[:, :-4],
        "cos": torch.ones((4, 2), device=target).T,
        "norm_weight": torch.ones((2, 128), device=target),
    }.items():
        with pytest.raises(ValueError, match=name):
            write(**{name: bad})
    with pytest.raises(ValueError, match="multiple of 4"):
        cache_write.page_checksum(torch.zeros((1, 6), dtype=torch.uint8, device=target))
    with pytest.raises(ValueError, match="block_size"):
        elementwise.quantize(latent, 24)


def test_cuda_tensors_take_the_kernels(target: torch.device, generator: torch.Generator) -> None:
    if target.type != "cuda":
        pytest.skip("the public functions run the references on a CPU")
    x = torch.randn((5, 256), generator=generator).to(torch.bfloat16)
    for actual, expected in zip(quantize(x.to(target)), quantize(x), strict=True):
        assert actual.is_cuda
        assert same_bytes(actual, expected)
    rows = torch.randint(0, 256, (3, 8448), generator=generator, dtype=torch.uint8)
    assert torch.equal(reference.page_checksum(rows.to(target)).cpu(), reference.page_checksum(rows))
