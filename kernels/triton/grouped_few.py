"""Grouped block-scaled FP8 products for few rows an expert: the weights' bytes are what they wait for.

    out[r] = x[r] W[e]^T for the rows r of expert e, scales as in fp8_gemm.py

Gluon, Hopper: ``fp8_gemm_persistent`` over many weights. A tile is 64 rows of one expert by 256 weight rows; one warp
fetches by TMA into a ring of five buffers of 40 KB, each of two warpgroups multiplies [64, 128] x [128, 128] a K block.
TMA reads past an expert's rows into the next one's: those rows are computed and not stored. Tiles are taken in strides
and found as in grouped_wide.py.
Bytes: those of grouped_gemm.py; of the 40 KB a tile and K block that come through the L2, 32 are weight.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seamount.kernels.triton.fp8_gemm import multiprocessors
from seamount.kernels.triton.fp8_gemm_ring import ROWS, fetch_blocks, make_ring, store_sums, sum_blocks, sums_layout
from seamount.kernels.triton.grouped_wide import locate, place

_BLOCK_M = 64
_BLOCK_N = 256
_STAGES = 5


@gluon.jit
def _fetch(x, weight, work, ring):
    table, num_columns, tiles_n, num_blocks = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    num_tiles = gl.load(table) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, first_row, _, column = place(table, tile, tiles_n, BLOCK_M)
        w_row = expert * num_columns + column * BLOCK_N
        fetch_blocks(x, weight, first_row, w_row, num_blocks, step, ring, BLOCK_M)
        step += num_blocks


@gluon.jit
def _multiply(tensors, work, ring, PART: gl.constexpr):
    """One warpgroup: half of every tile's columns."""
    x_scale, weight_scale, out = tensors
    table, num_columns, tiles_n, num_blocks = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    WIDTH: gl.constexpr = ring[1].shape[1] // 2
    ROW: gl.constexpr = gl.SliceLayout(1, sums_layout(WIDTH))
    num_tiles = gl.load(table) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, first_row, rows_left, column = place(table, tile, tiles_n, BLOCK_M)
        first_column = column * (2 * WIDTH) + PART * WIDTH
        row = gl.minimum(gl.arange(0, 64, layout=ROW), rows_left - 1)
        row_scales = x_scale + first_row.to(gl.int64) * num_blocks + row * num_blocks
        column_scales = weight_scale + (expert * (num_columns // 128) + first_column // 128) * num_blocks
        total = sum_blocks(row_scales, column_scales, num_blocks, step, ring, 0, PART * WIDTH, WIDTH)
        step += num_blocks
        store_sums(total, out + first_row.to(gl.int64) * num_columns + first_column, rows_left, WIDTH, num_columns)


@gluon.jit(do_not_specialize=["tiles_n", "num_blocks"])
def _grouped_kernel(
    x, weight, x_scale, weight_scale, out, table, num_columns, tiles_n, num_blocks,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    ring = make_ring(BLOCK_M, BLOCK_N, STAGES, 2, LAYOUT)
    tensors = (x_scale, weight_scale, out)
    work = (table, num_columns, tiles_n, num_blocks)
    gl.warp_specialize(
        [
            (_multiply, (tensors, work, ring, 0)),
            (_multiply, (tensors, work, ring, 1)),
            (_fetch, (x, weight, work, ring)),
        ],
        [4, 1],
        [168, 24],
    )


def launch_few(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Tensor, out: Tensor) -> None:
    """Operands as ``grouped_gemm.launch_grouped`` takes them, none empty, without the SwiGLU form."""
    experts, columns, channels = weight.shape
    table = locate(groups, experts, x.shape[-2], masked=x.dim() == 3, block_m=_BLOCK_M)
    tiles_n = columns // _BLOCK_N
    flat_x, flat_weight = x.view(-1, channels), weight.view(-1, channels)
    _grouped_kernel[(min((len(table) - 1) * tiles_n, multiprocessors(x.device)),)](
        TensorDescriptor(flat_x, list(flat_x.shape), [channels, 1], [_BLOCK_M, 128], ROWS),
        TensorDescriptor(flat_weight, list(flat_weight.shape), [channels, 1], [_BLOCK_N, 128], ROWS),
        x_scale, weight_scale, out, table, columns, tiles_n, channels // 128,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, STAGES=_STAGES, LAYOUT=ROWS, num_warps=4,
    )  # fmt: skip
