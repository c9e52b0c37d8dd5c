"""The block-scaled FP8 product for up to 256 rows where tiles are short or wide: programs that walk over them.

    out[m, n] as in fp8_gemm.py

Gluon, Hopper. One program a multiprocessor takes tiles of 64 by 128, 128 by 64 or 128 by 128 tokens and weight rows, in
strides. One warp fetches by TMA into a ring (``fp8_gemm_ring``), ahead of the two warpgroups that multiply, so that
memory does not wait for a tile's end, nor, for the first tile's weight, for the end of the kernel ahead in the stream.
Of 128 tokens each warpgroup takes half, of 64 tokens each takes half of the weight rows. Row tiles of one weight tile
are neighbours: a weight is read from memory once.
Bytes: N K + M K + 2 M N; 24 KB a tile of 64 x 128 and K block come through the L2.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton.fp8_gemm_ring import (
    ROWS,
    fetch_blocks,
    fetch_weight_ahead,
    first_token,
    make_ring,
    store_sums,
    sum_blocks,
    sums_layout,
    token_box,
    token_of,
)


class Tile(NamedTuple):
    """buffers: of the ring, as many as fit beside a tile on its way out. cost: a wave's time, relative, as measured."""

    buffers: int
    cost: float


TILES = {(128, 64): Tile(8, 1.0), (64, 128): Tile(8, 1.05), (128, 128): Tile(6, 1.7)}
"""By tokens and weight rows."""


@gluon.jit
def _fetch(x, weight, work, ring):
    tiles_m, num_blocks, num_rows, _, num_tiles = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    column = gl.program_id(0) // tiles_m * BLOCK_N
    ahead = fetch_weight_ahead(x, weight, column, num_blocks, ring, num_rows)
    gdc_wait()
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row = first_token(tile % tiles_m, num_rows, BLOCK_M)
        fetch_blocks(x, weight, row, tile // tiles_m * BLOCK_N, num_blocks, step, ring, num_rows, ahead)
        step += num_blocks


@gluon.jit
def _multiply(tensors, work, ring, PART: gl.constexpr, BOX: gl.constexpr):
    """One warpgroup: half of every tile's rows if there are 128, else half of its columns."""
    x_scale, weight_scale, out = tensors
    tiles_m, num_blocks, num_rows, num_columns, num_tiles = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    BY_ROWS: gl.constexpr = BLOCK_M == 128
    WIDTH: gl.constexpr = BLOCK_N if BY_ROWS else BLOCK_N // 2
    FIRST_ROW: gl.constexpr = PART * 64 if BY_ROWS else 0
    FIRST_COLUMN: gl.constexpr = 0 if BY_ROWS else PART * WIDTH
    ROW: gl.constexpr = gl.SliceLayout(1, sums_layout(WIDTH))
    gdc_wait()
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_row = first_token(tile % tiles_m, num_rows, BLOCK_M)
        first_column = tile // tiles_m * BLOCK_N + FIRST_COLUMN
        # Rows of no token have the last one's scales, columns past the end, which are zeros, the last one's.
        row = token_of(FIRST_ROW + gl.arange(0, 64, layout=ROW), num_rows - first_row, BLOCK_M, BOX)
        token = first_row + gl.minimum(row, num_rows - first_row - 1)
        column_scales = weight_scale + gl.minimum(first_column, num_columns - 1) // 128 * num_blocks
        row_scales = x_scale + token * num_blocks
        total = sum_blocks(row_scales, column_scales, num_blocks, step, ring, FIRST_ROW, FIRST_COLUMN, WIDTH)
        step += num_blocks
        to = out + first_row.to(gl.int64) * num_columns + first_column
        store_sums(total, to, num_rows - first_row, num_columns - first_column, num_columns, FIRST_ROW, BLOCK_M, BOX)


@gluon.jit(do_not_specialize=["num_rows", "num_blocks", "num_tiles", "tiles_m"])
def _gemm_kernel(
    x, weight, x_scale, weight_scale, out, num_rows, num_columns, num_blocks, num_tiles, tiles_m,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    # Launched before the kernel ahead in the stream has ended; all but the weight's copies waits for that end.
    gdc_launch_dependents()
    BOX: gl.constexpr = x.block_shape[0]
    ring = make_ring(BLOCK_M, BLOCK_N, STAGES, 2, LAYOUT)
    tensors = (x_scale, weight_scale, out)
    work = (tiles_m, num_blocks, num_rows, num_columns, num_tiles)
    gl.warp_specialize(
        [
            (_multiply, (tensors, work, ring, 0, BOX)),
            (_multiply, (tensors, work, ring, 1, BOX)),
            (_fetch, (x, weight, work, ring)),
        ],
        [4, 1],
        [168, 24],
    )


def launch_persistent(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, block_m: int, block_n: int, programs: int
) -> Tensor:
    """``fp8_gemm`` of operands that are not empty, on a Hopper GPU; the tile is one of ``TILES``."""
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    tiles_m = triton.cdiv(rows, block_m)
    tiles = tiles_m * triton.cdiv(columns, block_n)
    _gemm_kernel[(min(tiles, programs),)](
        TensorDescriptor(x, [rows, channels], [channels, 1], [token_box(rows, block_m), 128], ROWS),
        TensorDescriptor(weight, [columns, channels], [channels, 1], [block_n, 128], ROWS),
        x_scale, weight_scale, out, rows, columns, channels // 128, tiles, tiles_m,
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=TILES[block_m, block_n].buffers, LAYOUT=ROWS,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
