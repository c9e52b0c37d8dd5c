"""The block-scaled FP8 product for up to 256 rows where tiles are short or wide: programs that walk over them.

    out[m, n] as in fp8_gemm.py

Gluon, Hopper. One program a multiprocessor takes tiles of 64 by 128, 128 by 64 or 128 by 128 tokens and weight rows, in
strides. One warp fetches by TMA into a ring (``fp8_gemm_ring``), ahead of the two warpgroups that multiply, so that
memory does not wait for a tile's end. Of 128 tokens each warpgroup takes half, of 64 tokens each takes half of the
weight rows. Row tiles of one weight tile are neighbours: a weight is read from memory once.
Tiles that fill no whole wave may be split along K over all programs: their sums go to memory in parts, and who comes
last adds the parts up in their order, so that the result does not depend on who that is.
Bytes: N K + M K + 2 M N; 24 KB a tile of 64 x 128 and K block come through the L2, and 8 a sum and part of split tiles.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton.fp8_gemm_ring import ROWS, fetch_blocks, make_ring, store_sums, sum_blocks, sums_layout


class Tile(NamedTuple):
    """buffers: of the ring, as many as fit beside a tile on its way out. cost: a wave's time, relative, as measured."""

    buffers: int
    cost: float


TILES = {(128, 64): Tile(8, 1.0), (64, 128): Tile(8, 1.05), (128, 128): Tile(6, 1.7)}
"""By tokens and weight rows."""


@gluon.jit
def _place(unit, work, SPLIT: gl.constexpr):
    """Of a unit of work: its tile, which part of the tile's K blocks it is, the first of these, and how many."""
    _, num_blocks, _, _, num_whole, splits = work
    if not SPLIT:
        return unit, 0, 0, num_blocks
    number = gl.maximum(unit - num_whole, 0)
    part = number % splits
    size = gl.where(unit < num_whole, num_blocks, (num_blocks + splits - 1) // splits)
    tile = gl.where(unit < num_whole, unit, num_whole + number // splits)
    return tile, part, part * size, gl.minimum(size, num_blocks - part * size)


@gluon.jit
def _fetch(x, weight, work, num_units, ring, SPLIT: gl.constexpr):
    tiles_m = work[0]
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    gdc_wait()
    step = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        tile, _, first, size = _place(unit, work, SPLIT)
        fetch_blocks(x, weight, tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N, size, step, ring, first)
        step += size


@gluon.jit
def _sum_parts(total, partial, counter, part, splits, num_rows):
    """Store a part of a tile's sums; 1 and the sums of all parts, in their order, for who stores last, else 0.

    partial: room for all parts, [splits, 64, WIDTH]. Rows from ``num_rows`` on do not exist.
    """
    WIDTH: gl.constexpr = total.shape[1]
    LAYOUT: gl.constexpr = sums_layout(WIDTH)
    row = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    at = row * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT)), 0)
    exists = (row < num_rows) & (at >= 0)
    gl.store(partial + part * (64 * WIDTH) + at, total, mask=exists)
    # Every thread's part is written before one thread says so.
    gl.thread_barrier()
    last = (gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1).to(gl.int32)
    if last != 0:
        total = gl.zeros([64, WIDTH], gl.float32, LAYOUT)
        for i in range(splits):
            total += gl.load(partial + i * (64 * WIDTH) + at, mask=exists, other=0.0, cache_modifier=".cg")
        gl.store(counter, 0)  # for the next launch
    return last, total


@gluon.jit
def _multiply(tensors, work, num_units, ring, PART: gl.constexpr, SPLIT: gl.constexpr):
    """One warpgroup: half of every tile's rows if there are 128, else half of its columns."""
    x_scale, weight_scale, out, partial, arrived = tensors
    tiles_m, num_blocks, num_rows, num_columns, num_whole, splits = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    BY_ROWS: gl.constexpr = BLOCK_M == 128
    WIDTH: gl.constexpr = BLOCK_N if BY_ROWS else BLOCK_N // 2
    FIRST_ROW: gl.constexpr = PART * 64 if BY_ROWS else 0
    FIRST_COLUMN: gl.constexpr = 0 if BY_ROWS else PART * WIDTH
    ROW: gl.constexpr = gl.SliceLayout(1, sums_layout(WIDTH))
    gdc_wait()
    step = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        tile, part, first, size = _place(unit, work, SPLIT)
        first_row = tile % tiles_m * BLOCK_M + FIRST_ROW
        first_column = tile // tiles_m * BLOCK_N + FIRST_COLUMN
        # Past the end copies bring zeros; scales are the last row's and column's, and nothing is stored.
        row = gl.minimum(first_row + gl.arange(0, 64, layout=ROW), num_rows - 1)
        row_scales = x_scale + row * num_blocks + first
        column_scales = weight_scale + gl.minimum(first_column, num_columns - 1) // 128 * num_blocks + first
        total = sum_blocks(row_scales, column_scales, size, step, ring, FIRST_ROW, FIRST_COLUMN, WIDTH)
        step += size
        to = out + first_row.to(gl.int64) * num_columns + first_column
        is_whole = 1
        if SPLIT:  # noqa: SIM102 (this one is the compiler's)
            if unit >= num_whole:
                half = (tile - num_whole) * 2 + PART
                is_whole, total = _sum_parts(
                    total, partial + half * splits * (64 * WIDTH), arrived + half, part, splits, num_rows - first_row
                )
        if is_whole != 0:
            store_sums(total, to, num_rows - first_row, num_columns - first_column, num_columns)


@gluon.jit(do_not_specialize=["num_rows", "num_blocks", "num_units", "tiles_m", "num_whole", "splits"])
def _gemm_kernel(
    x, weight, x_scale, weight_scale, out, partial, arrived, num_rows, num_columns, num_blocks, num_units, tiles_m,
    num_whole, splits,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    # Launched before the kernel ahead in the stream has ended; whatever reads or writes memory waits for that end.
    gdc_launch_dependents()
    ring = make_ring(BLOCK_M, BLOCK_N, STAGES, 2, LAYOUT)
    tensors = (x_scale, weight_scale, out, partial, arrived)
    work = (tiles_m, num_blocks, num_rows, num_columns, num_whole, splits)
    gl.warp_specialize(
        [
            (_multiply, (tensors, work, num_units, ring, 0, SPLIT)),
            (_multiply, (tensors, work, num_units, ring, 1, SPLIT)),
            (_fetch, (x, weight, work, num_units, ring, SPLIT)),
        ],
        [4, 1],
        [168, 24],
    )


def divide_tail(tiles: int, blocks: int, programs: int) -> tuple[int, int]:
    """How many tiles programs take whole, in full waves, and into how many parts of K each of the others is split."""
    over = tiles % programs
    if not over or tiles < programs:
        return tiles, 1
    size = triton.cdiv(blocks, min(programs // over, blocks))
    splits: int = triton.cdiv(blocks, size)
    return (tiles - over, splits) if splits > 1 else (tiles, 1)


def launch_persistent(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
    *, block_m: int, block_n: int, programs: int, arrived: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``fp8_gemm`` of operands that are not empty, on a Hopper GPU; the tile is one of ``TILES``.

    arrived: two zeros a program, as between launches; the last wave's tiles are then split over all programs.
    """
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    tiles_m = triton.cdiv(rows, block_m)
    tiles, blocks = tiles_m * triton.cdiv(columns, block_n), channels // 128
    whole, splits = divide_tail(tiles, blocks, programs) if arrived is not None else (tiles, 1)
    partial = out
    if splits > 1:
        partial = torch.empty(((tiles - whole) * splits * block_m * block_n,), dtype=torch.float32, device=x.device)
    units = whole + (tiles - whole) * splits
    _gemm_kernel[(min(units, programs),)](
        TensorDescriptor(x, [rows, channels], [channels, 1], [block_m, 128], ROWS),
        TensorDescriptor(weight, [columns, channels], [channels, 1], [block_n, 128], ROWS),
        x_scale, weight_scale, out, partial, out if arrived is None else arrived, rows, columns, blocks, units,
        tiles_m, whole, splits,
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=TILES[block_m, block_n].buffers, SPLIT=splits > 1, LAYOUT=ROWS,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
