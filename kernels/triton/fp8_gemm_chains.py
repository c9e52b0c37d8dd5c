"""The block-scaled FP8 product for up to 256 rows where one wave of tiles with long chains does it.

    out[m, n] as in fp8_gemm.py

Gluon, Hopper. A tile is 64 tokens by 16, 32 or 64 weight rows, one a program, as narrow as it takes to give each
multiprocessor one. One warp fetches by TMA into a ring (``fp8_gemm_ring``) that fills the shared memory; four
warpgroups take the K blocks of the tile in turn: [64, 128] x [128, N] into fresh accumulators and, by both scales, into
float32 totals. At the end three hand theirs through shared memory to the first, which adds them in order and stores.
A K block's chain (wait, product, wait, scale) takes hundreds of clocks, of which its bytes need a fraction; four chains
run side by side, and no K is split over programs, whose sums would cost more than they bring here.
Of up to 32 tokens and with the widest tiles, each tile begins at a K block of its own and goes round: 5 to 12 % less
than with all programs asking for the same few lines of tokens at a time; slower with more tokens or narrower tiles.
Bytes: N K + M K tiles_n + 2 M N, the tokens through the L2, and the weight again for every 64 tokens: 91 MB at 128 rows
of 2112 x 7168.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton.fp8_gemm_ring import ROWS, fetch_blocks, make_ring, store_sums, sum_blocks, sums_layout

BLOCK_M = 64
CHAINS = 4
_SHARED_BYTES = 222 << 10


@gluon.jit
def _fetch(x, weight, work, ring):
    first_row, first_column, num_blocks, turn = work
    gdc_wait()
    fetch_blocks(x, weight, first_row, first_column, num_blocks, 0, ring, 0, turn)


@gluon.jit
def _sum_chain(scales, work, ring, CHAIN: gl.constexpr, CHAINS: gl.constexpr):
    x_scale, weight_scale, num_rows = scales
    first_row, first_column, num_blocks, turn = work
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    # Rows past the end are zeros in shared memory, have the last row's scales and are not stored.
    row = gl.minimum(gl.arange(0, 64, layout=gl.SliceLayout(1, sums_layout(BLOCK_N))), num_rows - first_row - 1)
    row_scales = x_scale + first_row.to(gl.int64) * num_blocks + row * num_blocks
    column_scales = weight_scale + first_column // 128 * num_blocks
    gdc_wait()
    return sum_blocks(row_scales, column_scales, num_blocks, 0, ring, 0, 0, BLOCK_N, CHAIN, CHAINS, turn)


@gluon.jit
def _other_chain(scales, work, ring, sums, summed, CHAIN: gl.constexpr):
    sums.index(CHAIN - 1).store(_sum_chain(scales, work, ring, CHAIN, sums.shape[0] + 1))
    gl.thread_barrier()
    mbarrier.arrive(summed, count=1)


@gluon.jit
def _first_chain(scales, work, ring, sums, summed, out, num_columns):
    _, _, num_rows = scales
    first_row, first_column, _, _ = work
    CHAINS: gl.constexpr = sums.shape[0] + 1
    total = _sum_chain(scales, work, ring, 0, CHAINS)
    mbarrier.wait(summed, 0)
    for other in gl.static_range(CHAINS - 1):
        total += sums.index(other).load(sums_layout(sums.shape[2]))
    out += first_row.to(gl.int64) * num_columns + first_column
    store_sums(total, out, num_rows - first_row, num_columns - first_column, num_columns)


@gluon.jit(do_not_specialize=["num_rows", "num_blocks", "turns"])
def _gemm_kernel(
    x, weight, x_scale, weight_scale, out, num_rows, num_columns, num_blocks, turns,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CHAINS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    # Launched before the kernel ahead in the stream has ended; whatever reads or writes memory waits for that end.
    gdc_launch_dependents()
    ring = make_ring(BLOCK_M, BLOCK_N, STAGES, 1, LAYOUT)
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [CHAINS - 1, BLOCK_M, BLOCK_N], SUMS)
    summed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(summed, count=CHAINS - 1)
    scales = (x_scale, weight_scale, num_rows)
    # The row tiles of one weight tile are neighbours.
    turn = gl.program_id(1) * turns % num_blocks
    work = (gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N, num_blocks, turn)
    gl.warp_specialize(
        [
            (_first_chain, (scales, work, ring, sums, summed, out, num_columns)),
            (_other_chain, (scales, work, ring, sums, summed, 1)),
            (_other_chain, (scales, work, ring, sums, summed, 2)),
            (_other_chain, (scales, work, ring, sums, summed, 3)),
            (_fetch, (x, weight, work, ring)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


def launch_chains(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, block_n: int) -> Tensor:
    """``fp8_gemm`` of operands that are not empty, on a Hopper GPU, by tiles of 64 x block_n, 16 to 64."""
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    _gemm_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(columns, block_n))](
        TensorDescriptor(x, [rows, channels], [channels, 1], [BLOCK_M, 128], ROWS),
        TensorDescriptor(weight, [columns, channels], [channels, 1], [block_n, 128], ROWS),
        x_scale, weight_scale, out, rows, columns, channels // 128, 1 if rows <= 32 and block_n == 64 else 0,
        BLOCK_M=BLOCK_M, BLOCK_N=block_n, STAGES=num_buffers(block_n), CHAINS=CHAINS, LAYOUT=ROWS, num_warps=4,
        launch_pdl=block_n < 64,  # with the widest tile it made a row of launches slower
    )  # fmt: skip
    return out


def num_buffers(block_n: int) -> int:
    """As many as fit beside the sums, up to 20 and a multiple of the chains."""
    sums = (CHAINS - 1) * BLOCK_M * block_n * 4
    buffers = min(20, (_SHARED_BYTES - sums) // ((BLOCK_M + block_n) * 128))
    return buffers - buffers % CHAINS
