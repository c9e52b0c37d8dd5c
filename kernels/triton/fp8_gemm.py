"""The block-scaled FP8 product, built for few rows: the weight's bytes are what it waits for.

    out[m, n] = sum over K blocks b of  xs[m, b] ws[n // 128, b]  (sum over k in b of  x[m, k] w[n, k])

Tiles: up to 32 tokens the weight is the left operand (64 or 128 of its rows), so that wgmma's 64 rows are filled at any
M; from 64 on the tokens are, and a thread then holds the scales of 2 tokens instead of 32. One dot a K block of 128,
into a fresh float32 accumulator, then one multiply-add by both scales in registers. The weight goes through shared
memory by asynchronous copies, several blocks ahead. Where the tiles leave multiprocessors idle, K is split: partial
tiles go to memory and the last program to arrive sums them in the order of the splits, so the result does not depend on
who was last.
Bytes: N K + M K + 2 M N, scales 1 / 32 of that; splits add 8 M N each (they stay in the L2).
Hopper GPUs have more ways: fp8_gemm_stream.py for one row or two, of any weight; then, up to 256 rows,
fp8_gemm_chains.py where a tile a program is one wave, or, up to 64 rows, several long ones, and fp8_gemm_persistent.py
for several waves of short tiles and for most of the rest from 65 rows on. For more rows, and for several waves of long
tiles from 65 on, it is ``torch._scaled_mm`` (cuBLASLt's 1x128 by 128x128 product).
These ways read the weight before the kernel ahead in the stream has ended, if that one lets them start so early. Only
kernels of this package do, and none of them writes a weight.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton import fp8_gemm_chains, fp8_gemm_persistent, fp8_gemm_stream
from seamount.kernels.triton.fp8_gemm_ring import is_supported

_BLOCK_K = tl.constexpr(128)
_MAX_TILES = 1 << 16
_SMALL_SIDE = 8192
_LONG = 32  # K blocks
_SMALL_BYTES = 16 << 20


@triton.jit
def accumulate(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, rows, columns, first_block, last_block, num_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The float32 tile of token rows ``rows`` and weight rows ``columns``, transposed if BLOCK_M < 64.

    The pointers are at the tile's first rows; rows and columns count from there, int32, all of them readable.
    """
    inner = tl.arange(0, _BLOCK_K)
    size = num_blocks * _BLOCK_K
    x_ptrs = x_ptr + (rows[:, None] * size + inner[None, :])
    weight_ptrs = weight_ptr + (columns[:, None] * size + inner[None, :])
    x_scale_ptrs = x_scale_ptr + rows * num_blocks
    TOKENS_LEFT: tl.constexpr = BLOCK_M >= 64
    total = tl.zeros((BLOCK_M, BLOCK_N) if TOKENS_LEFT else (BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        weight = tl.load(weight_ptrs + block * _BLOCK_K)
        x = tl.load(x_ptrs + block * _BLOCK_K)
        scale = tl.load(x_scale_ptrs + block) * tl.load(weight_scale_ptr + block)
        if TOKENS_LEFT:
            total += tl.dot(x, tl.trans(weight)) * scale[:, None]
        else:
            total += tl.dot(weight, tl.trans(x)) * scale[None, :]
    return total


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "splits"])
def _gemm_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, out_ptr, partial_ptr, arrived_ptr,
    num_rows, num_columns, num_blocks, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:  # launched before the kernel ahead in the stream has ended, and ready for the next one to do the same
        gdc_launch_dependents()
        gdc_wait()
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    per_split = tl.cdiv(num_blocks, splits)
    first = split * per_split
    first_row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    # Rows past the end repeat the last one and are not stored: no masks on the way in. BLOCK_N divides 128: a tile lies
    # within one block of the weight's scales.
    total = accumulate(
        x_ptr + first_row * num_blocks * _BLOCK_K, x_scale_ptr + first_row * num_blocks,
        weight_ptr + first_column * num_blocks * _BLOCK_K, weight_scale_ptr + first_column // 128 * num_blocks,
        tl.minimum(rows, num_rows - 1) - tile_m * BLOCK_M, tl.minimum(columns, num_columns - 1) - tile_n * BLOCK_N,
        first, tl.minimum(first + per_split, num_blocks), num_blocks, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    # Both as broadcast along the tile, whichever way it lies.
    rows = tl.expand_dims(rows, 1 if BLOCK_M >= 64 else 0)
    columns = tl.expand_dims(columns, 0 if BLOCK_M >= 64 else 1)
    out_ptrs = out_ptr + rows.to(tl.int64) * num_columns + columns
    inside = (rows < num_rows) & (columns < num_columns)
    if not SPLIT:
        tl.store(out_ptrs, total.to(tl.bfloat16), mask=inside)
    else:
        tile = tile_n * tl.num_programs(0) + tile_m
        num_tiles = tl.num_programs(0) * tl.num_programs(1)
        HEIGHT: tl.constexpr = total.shape[0]
        WIDTH: tl.constexpr = total.shape[1]
        inner = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        partial_ptrs = partial_ptr + tile.to(tl.int64) * (BLOCK_M * BLOCK_N) + inner
        stride = num_tiles.to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(partial_ptrs + split * stride, total)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        arrived = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
            for i in range(splits):
                total += tl.load(partial_ptrs + i * stride, cache_modifier=".cg")
            tl.store(out_ptrs, total.to(tl.bfloat16), mask=inside)
            tl.store(arrived_ptr + tile, 0)  # for the next launch


def launch_gemm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
    *, block_m: int, block_n: int, splits: int, stages: int, warps: int = 4,
) -> Tensor:  # fmt: skip
    """One configuration; the choice is ``fp8_gemm``'s. M and N must not be 0."""
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    tiles_m, tiles_n = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    blocks = channels // 128
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    partial, arrived = out, out
    if splits > 1:
        if tiles_m * tiles_n > _MAX_TILES:
            raise ValueError(f"{tiles_m * tiles_n} tiles; a split product has at most {_MAX_TILES}")
        shape = (splits, tiles_m * tiles_n, block_m * block_n)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        arrived = arrivals(x.device)
    early = is_supported(x)
    _gemm_kernel[(tiles_m, tiles_n, splits)](
        x, x_scale, weight, weight_scale, out, partial, arrived, rows, columns, blocks, splits,
        BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=splits > 1, STAGES=stages, EARLY=early, num_warps=warps,
        launch_pdl=early,
    )  # fmt: skip
    return out


_counters: dict[tuple[torch.device, int | None], Tensor] = {}


def arrivals(device: torch.device) -> Tensor:
    """Counters of arrived splits, all 0 between launches: [_MAX_TILES] int32.

    Launches that share them must not overlap in time. So each stream has its own. Captured launches share one set more,
    made by the first call outside a capture: graphs that have such launches, and captures of several streams, must run
    one after the other.
    """
    if device.type != "cuda":
        return _kept_counters(device, 0)
    if not torch.cuda.is_current_stream_capturing():
        _kept_counters(device, None)
        return _kept_counters(device, torch.cuda.current_stream(device).cuda_stream)
    # Made within a capture they would be zeros only from its replay on: then they are the graph's, and set by it.
    found = _counters.get((device, None))
    return found if found is not None else torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def _kept_counters(device: torch.device, stream: int | None) -> Tensor:
    if (device, stream) not in _counters:
        with torch.inference_mode(False):
            _counters[device, stream] = torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
    return _counters[device, stream]


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def fp8_gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``seamount.kernels.gemm.fp8_gemm`` for checked CUDA tensors."""
    rows, columns, blocks = x.shape[0], weight.shape[0], x_scale.shape[1]
    if not rows or not columns or not blocks:
        return torch.zeros((rows, columns), dtype=torch.bfloat16, device=x.device)
    processors = multiprocessors(x.device)
    operands = (x, x_scale, weight, weight_scale)
    if is_supported(x):
        if rows <= fp8_gemm_stream.MAX_TOKENS:
            return fp8_gemm_stream.launch_stream(*operands)
        if tile := choose_chains(rows, columns, blocks, processors):
            return fp8_gemm_chains.launch_chains(*operands, tile=tile)
        if size := choose_persistent(rows, columns, blocks, processors):
            block_m, block_n = size
            return fp8_gemm_persistent.launch_persistent(
                *operands, block_m=block_m, block_n=block_n, programs=processors
            )
    # For a small weight cuBLASLt leaves multiprocessors idle, and its scales have to be transposed.
    if rows > (128 if is_small(columns, blocks) else 64) and library_takes(x, weight):
        return library_gemm(*operands)
    tiles = choose_tiles(rows, columns, blocks, processors)
    return launch_gemm(
        *operands, block_m=tiles.block_m, block_n=tiles.block_n, splits=tiles.splits, stages=tiles.stages
    )


def choose_chains(rows: int, columns: int, blocks: int, processors: int) -> fp8_gemm_chains.Tile | None:
    """The tile for fp8_gemm_chains.py, None where another way is faster.

    Short tiles (K) are for one chain and two programs a multiprocessor, as many at once as that allows; so are several
    waves of long ones, up to 64 rows. One wave of long tiles has them as narrow as still is one wave, and two chains.
    """
    if rows > 256:
        return None
    tiles = {width: triton.cdiv(rows, 64) * triton.cdiv(columns, width) for width in (16, 32, 64)}
    if blocks < _LONG:
        return fp8_gemm_chains.Tile(64, 1, 2) if processors < 2 * tiles[64] <= 4 * processors else None
    for width, count in tiles.items():
        if count <= processors:
            # Of a small weight the next product's share fits beside this one's; a large one wants the deeper ring.
            resident = 2 if width < 64 and columns * blocks * 128 <= _SMALL_BYTES else 1
            return fp8_gemm_chains.Tile(width, 2, resident) if 2 * count > processors else None
    return fp8_gemm_chains.Tile(64, 1, 2) if rows <= 64 else None


def choose_persistent(rows: int, columns: int, blocks: int, processors: int) -> tuple[int, int] | None:
    """Tokens and weight rows of a tile for fp8_gemm_persistent.py, None where another way is faster.

    It is for up to 256 rows: of short tiles (K) any number, of long ones one wave of small tiles from 65 rows on.
    """
    if rows > 256 or (rows <= 64 and blocks >= _LONG):
        return None
    costs = {}
    for (block_m, block_n), measured in fp8_gemm_persistent.TILES.items():
        if block_m == 64 or rows > 64:
            tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
            costs[block_m, block_n] = triton.cdiv(tiles, processors) * measured.cost, tiles
    tile, (cost, tiles) = min(costs.items(), key=lambda item: item[1])
    return None if 3 * tiles < processors or (blocks >= _LONG and cost > 1.1) else tile


def is_small(columns: int, blocks: int) -> bool:
    return max(columns, blocks * 128) <= _SMALL_SIDE


class Tiles(NamedTuple):
    """What ``launch_gemm`` is launched with."""

    block_m: int
    block_n: int
    splits: int
    stages: int


def choose_tiles(rows: int, columns: int, blocks: int, processors: int) -> Tiles:
    """The fastest of those measured on an H100 over the weights of DeepSeek-V3.2. blocks: K / 128; none is 0."""
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, 64)
    if rows <= 32 and tiles > 4 * processors and blocks >= 32:
        return Tiles(32, 128, 1, 6)  # waves of long tiles: fewer, wider ones read the weight in longer runs
    if 32 < rows <= 64 and tiles > 3 * processors and blocks <= 8:
        return Tiles(64, 128, 1, min(blocks, 4))  # short tiles: half as many prologues
    if rows <= 16 and processors // 2 < tiles <= processors and blocks >= 64:
        return Tiles(block_m, 64, 2, 4)  # long tiles, fewer than multiprocessors: their halves spread more evenly
    splits = max(1, min(blocks // 4, (processors + tiles // 2) // tiles))
    # One tile a multiprocessor needs many bytes in flight; several share it otherwise.
    stages = 6 if tiles <= 2 * processors else 4
    if rows > 32 and blocks >= 32 and tiles * splits <= processors:
        stages = 8
    return Tiles(block_m, 64, splits, min(blocks, stages))


def library_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether cuBLASLt has the block-scaled product: Hopper, 16-byte rows of the weight's scales and of the result."""
    aligned = weight.shape[0] % 16 == 0 and x.shape[1] % 512 == 0
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0) and aligned


def library_gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The same product by ``torch._scaled_mm``, which wants the token scales transposed and a multiple of 16 rows."""
    rows = x.shape[0]
    padded = triton.cdiv(rows, 16) * 16
    scales = x_scale.new_empty((x_scale.shape[1], padded))
    scales[:, :rows] = x_scale.T
    if padded > rows:
        x = torch.nn.functional.pad(x.view(torch.uint8), (0, 0, 0, padded - rows)).view(x.dtype)
        scales[:, rows:] = 0
    out = torch._scaled_mm(x, weight.T, scale_a=scales.T, scale_b=weight_scale.T, out_dtype=torch.bfloat16)
    return out[:rows]
