"""Block-scaled FP8 products, against float64 products of the dequantised operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: no GPU kernels here")

from seamount.kernels import gemm
from seamount.kernels.quant import dequantize, dequantize_blocks, quantize
from seamount.kernels.triton import (
    fp8_gemm,
    fp8_gemm_chains,
    fp8_gemm_persistent,
    fp8_gemm_ring,
    fp8_gemm_stream,
    grouped_gemm,
    grouped_wide,
    moe,
)

pytestmark = pytest.mark.gpu


def operands(rows: int, columns: int, channels: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x, x_scale = quantize(torch.randn((rows, channels), generator=generator) * 3)
    weight = torch.randn((columns, channels), generator=generator).to(torch.float8_e4m3fn)
    return x, x_scale, weight, torch.rand((-(-columns // 128), channels // 128), generator=generator) * 0.1


def product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return dequantize(x, x_scale, torch.float64) @ dequantize_blocks(weight, weight_scale, torch.float64).T


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm; NaN never passes a comparison."""
    return ((actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# bfloat16's rounding alone is 0.0017; the interpreter truncates.
LIMIT = 0.003 if torch.cuda.is_available() else 0.006


@pytest.mark.parametrize(
    ("rows", "columns", "channels"),
    # The last five have enough rows for cuBLASLt; two of them have shapes that it does not take.
    [
        (1, 64, 128),
        (5, 200, 384),
        (33, 130, 640),
        (64, 2112, 512),
        (65, 576, 256),
        (130, 256, 256),
        (129, 130, 512),
        (129, 576, 512),
        (144, 256, 1024),
        (70, 4224, 512),
    ],
)
def test_fp8_gemm(rows: int, columns: int, channels: int, poisoned: torch.device, generator: torch.Generator) -> None:
    arguments = operands(rows, columns, channels, generator)
    moved = [argument.to(poisoned) for argument in arguments]
    actual = fp8_gemm.fp8_gemm(*moved)
    assert actual.dtype == torch.bfloat16
    assert error(actual, product(*arguments)) < LIMIT
    assert error(gemm.fp8_gemm(*arguments), product(*arguments)) < LIMIT
    assert torch.equal(actual, fp8_gemm.fp8_gemm(*moved))


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (32, 64), (64, 64), (128, 128)])
def test_every_tile_shape(
    block_m: int, block_n: int, splits: int, poisoned: torch.device, generator: torch.Generator
) -> None:
    arguments = operands(block_m + 1, 3 * block_n - 1, 1280, generator)
    moved = [argument.to(poisoned) for argument in arguments]

    def run() -> Tensor:
        return fp8_gemm.launch_gemm(*moved, block_m=block_m, block_n=block_n, splits=splits, stages=3)

    first = run()
    assert error(first, product(*arguments)) < LIMIT
    assert all(torch.equal(first, run()) for _ in range(3))
    assert not fp8_gemm.arrivals(first.device).any()


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64, 65, 128])
def test_chosen_tiles_are_legal_and_fill_the_gpu(rows: int) -> None:
    for columns in (1, 64, 576, 2112, 7168, 36864):
        for blocks in (1, 3, 4, 56, 144):
            tiles = fp8_gemm.choose_tiles(rows, columns, blocks, 132)
            assert 128 % tiles.block_n == 0
            assert tiles.block_m in (16, 32, 64)
            assert 1 <= tiles.splits <= blocks
            assert 1 <= tiles.stages <= blocks
            programs = -(-rows // tiles.block_m) * -(-columns // tiles.block_n) * tiles.splits
            assert tiles.splits == 1 or programs <= 1.5 * 132 or (programs <= 2 * 132 and rows <= 16)
            assert (tiles.block_m + tiles.block_n) * 128 * tiles.stages <= 160 << 10


NAN = 0x7F  # of float8_e4m3fn


def repeats_on_hopper(launch: Callable[..., Tensor], arguments: tuple[Tensor, ...], device: torch.device) -> None:
    """The product is right and comes out the same, whatever an earlier launch left in shared memory."""
    moved = [argument.to(device) for argument in arguments]
    if not fp8_gemm_ring.is_supported(moved[0]):
        pytest.skip("no Hopper GPU here")
    x, x_scale, weight, weight_scale = moved
    nans = torch.full((256, x.shape[1]), NAN, dtype=torch.uint8, device=device).view(x.dtype)
    launch(nans, x_scale.new_ones((256, x_scale.shape[1])), weight, weight_scale)
    actual = launch(*moved)
    expected = dequantize(x, x_scale).double() @ dequantize_blocks(weight, weight_scale, torch.float32).double().T
    assert error(actual, expected.cpu()) < LIMIT
    assert all(torch.equal(actual, launch(*moved)) for _ in range(5))


# Rows around those of a copy (8 to 64) and of a tile: the last of them overlap the ones before.
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 20, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 250])
@pytest.mark.parametrize("tile", fp8_gemm_chains.TILES, ids=lambda tile: "x".join(map(str, tile)))
def test_chains_of_blocks(
    rows: int, tile: fp8_gemm_chains.Tile, poisoned: torch.device, generator: torch.Generator
) -> None:
    columns, channels = {16: (2112, 7168), 32: (1100, 2048), 64: (4096, 1536)}[tile.block_n]
    arguments = operands(rows, columns, channels, generator)
    repeats_on_hopper(partial(fp8_gemm_chains.launch_chains, tile=tile), arguments, poisoned)


@pytest.mark.parametrize("tile", fp8_gemm_chains.TILES, ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.parametrize(
    ("rows", "columns", "channels"), [(1, 130, 128), (3, 70, 256), (70, 576, 384), (20, 1100, 7168), (64, 9000, 640)]
)
def test_few_blocks_and_columns_of_no_whole_tile(
    rows: int,
    columns: int,
    channels: int,
    tile: fp8_gemm_chains.Tile,
    poisoned: torch.device,
    generator: torch.Generator,
) -> None:
    arguments = operands(rows, columns, channels, generator)
    repeats_on_hopper(partial(fp8_gemm_chains.launch_chains, tile=tile), arguments, poisoned)


@pytest.mark.parametrize(("block_m", "block_n"), list(fp8_gemm_persistent.TILES))
@pytest.mark.parametrize(
    ("rows", "columns", "channels"),
    [
        (1, 130, 128),
        (5, 17100, 256),
        (37, 4224, 1536),
        (64, 36864, 512),
        (65, 17000, 640),
        (100, 4096, 384),
        (128, 4096, 384),
        (129, 576, 640),
        (200, 7168, 2048),
        (255, 17536, 1536),
    ],
)
def test_persistent_tiles(
    rows: int,
    columns: int,
    channels: int,
    block_m: int,
    block_n: int,
    poisoned: torch.device,
    generator: torch.Generator,
) -> None:
    arguments = operands(rows, columns, channels, generator)
    launch = partial(fp8_gemm_persistent.launch_persistent, block_m=block_m, block_n=block_n, programs=132)
    repeats_on_hopper(launch, arguments, poisoned)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("columns", "channels"),
    [
        (130, 128),
        (1, 640),
        (8192, 1536),
        (17, 1920),
        (7168, 2048),
        (2110, 7168),
        (4099, 2176),
        (1031, 18432),
    ],
)
def test_a_stream_of_the_weight(
    rows: int, columns: int, channels: int, poisoned: torch.device, generator: torch.Generator
) -> None:
    arguments = operands(rows, columns, channels, generator)
    moved = [argument.to(poisoned) for argument in arguments]
    if not fp8_gemm_ring.is_supported(moved[0]):
        pytest.skip("no Hopper GPU here")
    actual = fp8_gemm_stream.launch_stream(*moved)
    assert error(actual, product(*arguments)) < (LIMIT if columns > 16 else 2**-8)  # of one number: its own rounding
    assert all(torch.equal(actual, fp8_gemm_stream.launch_stream(*moved)) for _ in range(5))
    assert torch.equal(actual, fp8_gemm.fp8_gemm(*moved))


def test_ways_for_the_weights_of_deepseek_v32() -> None:
    """As measured: three numbers are a tile of chains, two one of persistent programs, None is neither."""

    def chosen(columns: int, channels: int) -> list[tuple[int, ...] | None]:
        shapes = [(rows, columns, channels // 128, 132) for rows in (3, 32, 64, 128, 256)]
        return [fp8_gemm.choose_chains(*shape) or fp8_gemm.choose_persistent(*shape) for shape in shapes]

    assert chosen(2112, 7168) == [(16, 2, 2)] * 3 + [(32, 2, 2), (64, 2, 1)]
    assert chosen(4096, 7168) == [(32, 2, 1)] * 3 + [(64, 2, 1), (128, 64)]
    assert chosen(7168, 16384) == [(64, 2, 1)] * 3 + [(128, 64), None]
    assert chosen(36864, 7168) == [(64, 1, 2)] * 3 + [None, None]
    assert chosen(24576, 1536) == [(64, 128)] * 3 + [(128, 64), (128, 128)]
    assert chosen(32768, 512) == [(64, 128)] * 3 + [(128, 128), (128, 128)]
    assert chosen(8192, 1536) == [(64, 1, 2)] * 4 + [(128, 128)]
    assert chosen(576, 7168)[:3] == [None] * 3


def test_every_chosen_tile_is_one_that_is_tested() -> None:
    for rows in (3, 32, 33, 64, 65, 128, 256):
        for columns in (64, 576, 1100, 2112, 4096, 7168, 16384, 36864):
            for blocks in (1, 4, 12, 31, 32, 56, 144):
                tile = fp8_gemm.choose_chains(rows, columns, blocks, 132)
                assert tile is None or tile in fp8_gemm_chains.TILES


def test_a_ring_fits_and_is_shared_evenly() -> None:
    for (block_m, block_n), size in fp8_gemm_persistent.TILES.items():
        assert (size.buffers * (block_m + block_n) + 128) * 128 < 227 << 10
    for tile in fp8_gemm_chains.TILES:
        buffers = fp8_gemm_chains.num_buffers(tile)
        assert buffers >= 6
        assert buffers % tile.chains == 0
        sums = (tile.chains - 1) * 64 * tile.block_n * 4
        assert (buffers * (64 + tile.block_n) * 128 + sums + 1024) * tile.resident < 227 << 10


def test_copies_bring_tokens_that_exist() -> None:
    for rows in range(1, 257):
        for block_m in (64, 128):
            box = fp8_gemm_ring.token_box(rows, block_m)
            assert 8 <= box <= block_m
            assert box <= max(rows, 8)
            assert 2 * box > min(rows, block_m)


@pytest.mark.parametrize(
    ("rows", "columns", "channels"),
    [
        (1, 2112, 7168),
        (5, 256, 512),
        (20, 8192, 1536),
        (40, 4096, 7168),
        (50, 24576, 1536),
        (64, 2112, 7168),
        (100, 7168, 2048),
        (200, 2112, 7168),
    ],
)
def test_products_in_a_row_wait_for_each_other(
    rows: int, columns: int, channels: int, device: torch.device, generator: torch.Generator
) -> None:
    """Operands that the launch before writes, results that lie where an earlier one's lay."""
    x, x_scale, weight, weight_scale = (each.to(device) for each in operands(rows, columns, channels, generator))
    if not fp8_gemm_ring.is_supported(x):
        pytest.skip("no Hopper GPU here")
    others = [operands(rows, columns, channels, generator)[0].to(device) for _ in range(3)]
    expected = [fp8_gemm.fp8_gemm(other, x_scale, weight, weight_scale) for other in others]
    torch.cuda.synchronize()
    for _ in range(20):
        for other, result in zip(others, expected, strict=True):
            x.view(torch.uint8).copy_(other.view(torch.uint8))
            assert torch.equal(fp8_gemm.fp8_gemm(x, x_scale, weight, weight_scale), result)


@pytest.mark.parametrize("rows", [3, 20, 40, 64, 100, 128, 256])
def test_a_chain_of_products_in_a_graph(rows: int, device: torch.device, generator: torch.Generator) -> None:
    """Each product's tokens are the last one's result; replayed, the bits are those of launches one at a time."""
    weights = [operands(1, 7168, 7168, generator)[2].to(device) for _ in range(2)]
    if not fp8_gemm_ring.is_supported(weights[0]):
        pytest.skip("no Hopper GPU here")
    scale = torch.full((56, 56), 0.01, device=device)
    first = torch.randn((rows, 7168), generator=generator).to(device, torch.bfloat16)

    def chain(*, pause: bool) -> Tensor:
        x = first
        for i in range(6):
            x = (fp8_gemm.fp8_gemm(*quantize(x), weights[i % 2], scale) * 0.02).clamp(-4, 4)
            if pause:
                torch.cuda.synchronize()
        return x

    expected = chain(pause=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = chain(pause=False)
    for _ in range(10):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(actual, expected)


def test_empty_products(target: torch.device, generator: torch.Generator) -> None:
    for rows, columns in ((0, 128), (3, 0)):
        moved = [argument.to(target) for argument in operands(rows, columns, 128, generator)]
        assert fp8_gemm.fp8_gemm(*moved).shape == (rows, columns)


COUNTS = [[3, 0, 40, 1, 17], [0, 0, 0, 0, 0], [64, 63, 65, 0, 0], [0, 0, 0, 0, 7]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("columns", [256, 320])
def test_contiguous_groups(counts: list[int], columns: int, poisoned: torch.device, generator: torch.Generator) -> None:
    x, x_scale, weight, weight_scale = grouped_operands(sum(counts) + 3, len(counts), columns, generator)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    moved = [argument.to(poisoned) for argument in (x, x_scale, weight, weight_scale, offsets)]
    actual = grouped_gemm.grouped_gemm(*moved)
    for e in range(len(counts)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        if counts[e]:
            expected = product(x[rows], x_scale[rows], weight[e], weight_scale[e])
            assert error(actual[rows], expected) < LIMIT
    filled = int(offsets[-1])
    assert torch.equal(actual[:filled], grouped_gemm.grouped_gemm(*moved)[:filled])
    reference = gemm.grouped_fp8_gemm(x, x_scale, weight, weight_scale, offsets)
    assert error(actual[:filled], reference[:filled].double()) < 2 * LIMIT


@pytest.mark.parametrize(("block_m", "warps"), [(16, 4), (32, 4), (64, 4), (128, 8)])
def test_every_grouped_tile_gives_the_same_bits(
    block_m: int, warps: int, poisoned: torch.device, generator: torch.Generator
) -> None:
    counts = [129, 0, 40, 1, 300]
    x, x_scale, weight, weight_scale = grouped_operands(sum(counts), len(counts), 512, generator)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    moved = [argument.to(poisoned) for argument in (x, x_scale, weight, weight_scale, offsets)]
    actual = torch.full((sum(counts), 512), float("nan"), dtype=torch.bfloat16, device=poisoned)
    grouped_gemm.launch_grouped(*moved, actual, None, block_m=block_m, stages=3, warps=warps)
    assert torch.equal(actual, grouped_gemm.grouped_gemm(*moved))
    for e in range(len(counts)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        if counts[e]:
            assert error(actual[rows], product(x[rows], x_scale[rows], weight[e], weight_scale[e])) < LIMIT


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counts", [*COUNTS, [129, 0, 40, 1, 300], [128, 256, 64]])
def test_many_rows_give_the_bits_of_few(
    counts: list[int], masked: bool, swiglu: bool, device: torch.device, generator: torch.Generator
) -> None:
    experts, slab = len(counts), 303
    x, x_scale, weight, weight_scale = grouped_operands(experts * slab, experts, 512, generator)
    groups = torch.tensor(counts if masked else [0, *counts]).int()
    groups = groups if masked else groups.cumsum(0).int()
    if masked:
        x, x_scale = x.view(experts, slab, -1), x_scale.view(experts, slab, -1)
    moved = [argument.to(device) for argument in (x, x_scale, weight, weight_scale, groups)]
    assert grouped_wide.is_supported(moved[0], moved[2]) == (torch.cuda.get_device_capability(device)[0] == 9)
    if not grouped_wide.is_supported(moved[0], moved[2]):
        pytest.skip("no Hopper GPU here")
    results = []
    for launch in (grouped_wide.launch_wide, lambda *of: grouped_gemm.launch_grouped(*of, block_m=64, stages=3)):
        shape = (*x.shape[:-1], 256 if swiglu else 512)
        out = torch.zeros(shape, dtype=torch.float8_e4m3fn if swiglu else torch.bfloat16, device=device)
        scales = torch.zeros((*x.shape[:-1], 2), device=device) if swiglu else None
        launch(*moved, out, scales)
        results.append([part.cpu() for part in (out, scales) if part is not None])
    # Both leave rows of no expert as they were.
    for wide, narrow in zip(*results, strict=True):
        assert torch.equal(wide.view(torch.uint8), narrow.view(torch.uint8))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("slab", [70, 200])
def test_slabs(counts: list[int], slab: int, poisoned: torch.device, generator: torch.Generator) -> None:
    experts = len(counts)
    x, x_scale, weight, weight_scale = grouped_operands(experts * slab, experts, 256, generator)
    x, x_scale = x.view(experts, slab, -1), x_scale.view(experts, slab, -1)
    filled = torch.tensor(counts, dtype=torch.int32)
    moved = [argument.to(poisoned) for argument in (x, x_scale, weight, weight_scale, filled)]
    actual, again = grouped_gemm.grouped_gemm(*moved), grouped_gemm.grouped_gemm(*moved)
    reference = gemm.grouped_fp8_gemm_masked(x, x_scale, weight, weight_scale, filled)
    for e, count in enumerate(counts):
        if count:
            assert torch.equal(actual[e, :count], again[e, :count])
            expected = product(x[e, :count], x_scale[e, :count], weight[e], weight_scale[e])
            assert error(actual[e, :count], expected) < LIMIT
            assert error(reference[e, :count], expected) < LIMIT


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("masked", [False, True])
def test_swiglu_form_is_the_product_then_swiglu(
    counts: list[int], masked: bool, poisoned: torch.device, generator: torch.Generator
) -> None:
    experts = len(counts)
    x, x_scale, weight, weight_scale = grouped_operands(experts * 70, experts, 512, generator)
    groups = torch.tensor(counts if masked else [0, *counts]).int()
    groups = groups if masked else groups.cumsum(0).int()
    if masked:
        x, x_scale = x.view(experts, 70, -1), x_scale.view(experts, 70, -1)
    moved = [argument.to(poisoned) for argument in (x, x_scale, weight, weight_scale, groups)]
    values, scales = grouped_gemm.grouped_gemm_swiglu(*moved)
    again = grouped_gemm.grouped_gemm_swiglu(*moved)
    then_values, then_scales = moe.swiglu_quantize(grouped_gemm.grouped_gemm(*moved))
    reference = gemm.grouped_fp8_gemm_swiglu(x, x_scale, weight, weight_scale, groups)
    for e, count in enumerate(counts):
        rows = (e, slice(count)) if masked else (slice(int(groups[e]), int(groups[e + 1])),)
        if count:
            assert torch.equal(scales[rows], again[1][rows])
            assert torch.equal(values[rows].view(torch.uint8), again[0][rows].view(torch.uint8))
            assert torch.equal(scales[rows], then_scales[rows])
            assert torch.equal(values[rows].view(torch.uint8), then_values[rows].view(torch.uint8))
            ours = dequantize(values[rows].cpu(), scales[rows].cpu())
            # A scale or value near an edge may fall to the other side of it.
            assert error(ours, dequantize(reference[0][rows], reference[1][rows]).double()) < (
                0.03 if torch.cuda.is_available() else 0.15
            )


def grouped_operands(rows: int, experts: int, columns: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x, x_scale, _, weight_scale = operands(rows, columns, 384, generator)
    weights = torch.randn((experts, columns, 384), generator=generator).to(torch.float8_e4m3fn)
    return x, x_scale, weights, torch.rand((experts, *weight_scale.shape), generator=generator) * 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 65])
def test_swiglu_quantize(rows: int, dtype: torch.dtype, poisoned: torch.device, generator: torch.Generator) -> None:
    x = (torch.randn((rows, 768), generator=generator) * 3).to(dtype)
    values, scales = moe.swiglu_quantize(x.to(poisoned))
    expected = gemm.swiglu_quantize(x)
    assert values.shape == (rows, 384)
    if rows:
        # A maximum that is one bfloat16 step off takes the other power of two in one of 128 cases.
        assert int((scales.cpu() != expected[1]).sum()) <= 1 + scales.numel() // 32
        ours, theirs = dequantize(values.cpu(), scales.cpu()), dequantize(*expected)
        assert error(ours, theirs.double()) < (0.005 if torch.cuda.is_available() else 0.15)


def test_bad_arguments(generator: torch.Generator) -> None:
    x, x_scale, weight, weight_scale = operands(4, 256, 256, generator)
    for bad, message in (
        ((x, x_scale[:, :1], weight, weight_scale), "x_scale"),
        ((x, x_scale, weight, weight_scale.double()), "weight_scale"),
        ((x, x_scale, weight[:, :128], weight_scale), "channels"),
        ((x.float(), x_scale, weight, weight_scale), "float8"),
        ((x, x_scale, weight.T.contiguous().T, weight_scale), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            gemm.fp8_gemm(*bad)
    weights, scales = weight.expand(3, -1, -1).contiguous(), weight_scale.expand(3, -1, -1).contiguous()
    with pytest.raises(ValueError, match="groups"):
        gemm.grouped_fp8_gemm(x, x_scale, weights, scales, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="slabs"):
        gemm.grouped_fp8_gemm_masked(x[None], x_scale[None], weights, scales, torch.zeros(3, dtype=torch.int32))
