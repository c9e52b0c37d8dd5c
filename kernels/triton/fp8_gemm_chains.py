"""The block-scaled FP8 product for few rows by one tile a program, over all of K.

    out[m, n] as in fp8_gemm.py

Gluon, Hopper. A tile is 64 tokens by 16, 32 or 64 weight rows. One warp fetches by TMA into a ring (``fp8_gemm_ring``)
that fills its share of the shared memory; one warpgroup, or two in turn (chains), take the K blocks: [64, 128] x
[128, N] into fresh accumulators and, by both scales, into float32 totals. At the end the second chain hands its own
through shared memory to the first, which adds and stores. A K block's chain (wait, product, wait, scale) takes hundreds
of clocks, of which its bytes need a fraction; no K is split over programs, whose sums would cost more than they bring.
The weight is asked for before the kernel ahead in the stream has ended. With two programs a multiprocessor, half a ring
each, the next product's stand ready beside this one's.
Bytes: N K + M K tiles_n + 2 M N, the tokens through the L2, and the weight again for every 64 tokens: 91 MB at 128 rows
of 2112 x 7168.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
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

BLOCK_M = 64
_SHARED_BYTES = 227 << 10  # of a multiprocessor
_RESERVED_BYTES = 1536  # of a program: the system's 1 KB, barriers
_MOST_BUFFERS = 20


class Tile(NamedTuple):
    """block_n: weight rows of a tile; chains: warpgroups that share its K blocks; resident: programs a processor."""

    block_n: int
    chains: int
    resident: int


TILES = (Tile(16, 2, 1), Tile(16, 2, 2), Tile(32, 2, 1), Tile(32, 2, 2), Tile(64, 2, 1), Tile(64, 1, 2))
"""Those that are used."""


@gluon.jit
def _fetch(x, weight, work, ring):
    first_row, first_column, num_blocks, num_rows = work
    ahead = fetch_weight_ahead(x, weight, first_column, num_blocks, ring, num_rows)
    gdc_wait()
    fetch_blocks(x, weight, first_row, first_column, num_blocks, 0, ring, num_rows, ahead)


@gluon.jit
def _sum_chain(scales, work, ring, CHAIN: gl.constexpr, CHAINS: gl.constexpr, BOX: gl.constexpr):
    x_scale, weight_scale = scales
    first_row, first_column, num_blocks, num_rows = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, sums_layout(BLOCK_N)))
    # Rows of no token have the last one's scales.
    token = first_row + gl.minimum(token_of(row, num_rows - first_row, BLOCK_M, BOX), num_rows - first_row - 1)
    column_scales = weight_scale + first_column // 128 * num_blocks
    gdc_wait()
    return sum_blocks(x_scale + token * num_blocks, column_scales, num_blocks, 0, ring, 0, 0, BLOCK_N, CHAIN, CHAINS)


@gluon.jit
def _second_chain(scales, work, ring, sums, summed, BOX: gl.constexpr):
    sums.store(_sum_chain(scales, work, ring, 1, 2, BOX))
    gl.thread_barrier()
    mbarrier.arrive(summed, count=1)


@gluon.jit
def _first_chain(scales, work, ring, sums, summed, out, num_columns, CHAINS: gl.constexpr, BOX: gl.constexpr):
    first_row, first_column, _, num_rows = work
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    total = _sum_chain(scales, work, ring, 0, CHAINS, BOX)
    if CHAINS == 2:
        mbarrier.wait(summed, 0)
        total += sums.load(sums_layout(sums.shape[1]))
    out += first_row.to(gl.int64) * num_columns + first_column
    store_sums(total, out, num_rows - first_row, num_columns - first_column, num_columns, 0, BLOCK_M, BOX)


@gluon.jit(do_not_specialize=["num_rows", "num_blocks"])
def _gemm_kernel(
    x, weight, x_scale, weight_scale, out, num_rows, num_columns, num_blocks,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CHAINS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    # Launched before the kernel ahead in the stream has ended; all but the weight's copies waits for that end.
    gdc_launch_dependents()
    BOX: gl.constexpr = x.block_shape[0]
    ring = make_ring(BLOCK_M, BLOCK_N, STAGES, 1, LAYOUT)
    scales = (x_scale, weight_scale)
    # The row tiles of one weight tile are neighbours.
    first_row = first_token(gl.program_id(0), num_rows, BLOCK_M)
    work = (first_row, gl.program_id(1) * BLOCK_N, num_blocks, num_rows)
    if CHAINS == 2:
        SUMS: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
        sums = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_N], SUMS)
        summed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(summed, count=1)
        gl.warp_specialize(
            [
                (_first_chain, (scales, work, ring, sums, summed, out, num_columns, 2, BOX)),
                (_second_chain, (scales, work, ring, sums, summed, BOX)),
                (_fetch, (x, weight, work, ring)),
            ],
            [4, 1],
            [112, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_first_chain, (scales, work, ring, 0, 0, out, num_columns, 1, BOX)),
                (_fetch, (x, weight, work, ring)),
            ],
            [1],
            [24],
        )


def launch_chains(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, tile: Tile) -> Tensor:
    """``fp8_gemm`` of operands that are not empty, on a Hopper GPU; the tile is one of ``TILES``."""
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    # Warps and registers: of 4 a chain, 4 for the one that fetches, and an even share of the file for each program.
    warps = 4 * tile.chains + 4
    registers = {"maxnreg": (1 << 16) // (warps * 32 * tile.resident) // 8 * 8} if tile.resident > 1 else {}
    _gemm_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(columns, tile.block_n))](
        TensorDescriptor(x, [rows, channels], [channels, 1], [token_box(rows, BLOCK_M), 128], ROWS),
        TensorDescriptor(weight, [columns, channels], [channels, 1], [tile.block_n, 128], ROWS),
        x_scale, weight_scale, out, rows, columns, channels // 128,
        BLOCK_M=BLOCK_M, BLOCK_N=tile.block_n, STAGES=num_buffers(tile), CHAINS=tile.chains, LAYOUT=ROWS, num_warps=4,
        launch_pdl=True, **registers,
    )  # fmt: skip
    return out


def num_buffers(tile: Tile) -> int:
    """As many as fit beside the sums and the tile on its way out, up to 20 and a multiple of the chains."""
    sums = (tile.chains - 1) * BLOCK_M * tile.block_n * 4
    room = _SHARED_BYTES // tile.resident - _RESERVED_BYTES - BLOCK_M * tile.block_n * 2 - sums
    buffers = min(_MOST_BUFFERS, room // ((BLOCK_M + tile.block_n) * 128))
    return buffers - buffers % tile.chains
