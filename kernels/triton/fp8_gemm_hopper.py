"""The block-scaled FP8 product for 33 to 128 rows of a small weight, where one chain of products a tile is too slow.

    out[m, n] as in fp8_gemm.py

Gluon, Hopper. A tile is 64 tokens by 32 or 64 weight rows, one a program. One warp fetches by TMA into a ring of
buffers; two warpgroups take alternate K blocks of the same tile: [64, 128] x [128, N] into fresh accumulators and, by
both scales, into float32 totals. The second hands its totals through shared memory to the first, which adds and stores.
A K block's chain (wait, product, wait, scale) takes hundreds of clocks, of which its bytes need a fraction; two chains
run side by side, and no K is split over programs, whose sums would cost more than they bring here.
Bytes: N K + M K tiles_n + 2 M N, the tokens through the L2.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BLOCK_M = 64
# Rows of 128 bytes, as TMA writes and the tensor cores read them.
_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def _fetch(x, weight, work, rings):
    first_row, first_column, num_blocks = work
    x_tiles, w_tiles, full, empty = rings
    STAGES: gl.constexpr = x_tiles.shape[0]
    for block in range(num_blocks):
        buffer = block % STAGES
        mbarrier.wait(empty.index(buffer), (block // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(buffer), (x_tiles.shape[1] + w_tiles.shape[1]) * 128)
        tma.async_copy_global_to_shared(weight, [first_column, block * 128], full.index(buffer), w_tiles.index(buffer))
        tma.async_copy_global_to_shared(x, [first_row, block * 128], full.index(buffer), x_tiles.index(buffer))


@gluon.jit
def _sum_blocks(scales, work, rings, FIRST: gl.constexpr):
    """The float32 sums of every second K block, from block FIRST on."""
    x_scale, weight_scale, num_rows = scales
    first_row, first_column, num_blocks = work
    x_tiles, w_tiles, full, empty = rings
    STAGES: gl.constexpr = x_tiles.shape[0]
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    BLOCK_N: gl.constexpr = w_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SUMS)
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SUMS))
    # Rows past the end are zeros in shared memory, have the last row's scales and are not stored.
    row_scales = x_scale + first_row.to(gl.int64) * num_blocks
    row_scales += gl.minimum(row, num_rows - first_row - 1) * num_blocks
    column_scales = weight_scale + first_column // 128 * num_blocks
    total = zeros
    for block in range(FIRST, num_blocks, 2):
        buffer = block % STAGES
        scale = gl.load(row_scales + block) * gl.load(column_scales + block)
        mbarrier.wait(full.index(buffer), block // STAGES & 1)
        columns = w_tiles.index(buffer).permute((1, 0))
        product = warpgroup_mma(x_tiles.index(buffer), columns, zeros, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, [product])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
        total += product * gl.expand_dims(scale, 1)
    return total


@gluon.jit
def _odd_blocks(scales, work, rings, sums, summed):
    sums.store(_sum_blocks(scales, work, rings, 1))
    gl.thread_barrier()
    mbarrier.arrive(summed, count=1)


@gluon.jit
def _even_blocks(scales, work, rings, sums, summed, out, num_columns):
    _, _, num_rows = scales
    first_row, first_column, _ = work
    BLOCK_M: gl.constexpr = sums.shape[0]
    BLOCK_N: gl.constexpr = sums.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    total = _sum_blocks(scales, work, rings, 0)
    mbarrier.wait(summed, 0)
    total += sums.load(SUMS)
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SUMS))
    inside = gl.expand_dims(row < num_rows - first_row, 1) & gl.expand_dims(column < num_columns - first_column, 0)
    out_at = out + (first_row.to(gl.int64) * num_columns + first_column)
    out_at += gl.expand_dims(row * num_columns, 1) + gl.expand_dims(column, 0)
    gl.store(out_at, total.to(gl.bfloat16), mask=inside)


@gluon.jit(do_not_specialize=["num_rows", "num_blocks"])
def _gemm_kernel(
    x, weight, x_scale, weight_scale, out, num_rows, num_columns, num_blocks,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], LAYOUT)
    w_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_N, 128], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    sums = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_N], gl.SwizzledSharedLayout(2, 1, 16, [1, 0]))
    for buffer in gl.static_range(STAGES):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    mbarrier.init(summed, count=1)
    scales = (x_scale, weight_scale, num_rows)
    # The row tiles of one weight tile are neighbours.
    work = (gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N, num_blocks)
    rings = (x_tiles, w_tiles, full, empty)
    gl.warp_specialize(
        [
            (_even_blocks, (scales, work, rings, sums, summed, out, num_columns)),
            (_odd_blocks, (scales, work, rings, sums, summed)),
            (_fetch, (x, weight, work, rings)),
        ],
        [4, 1],
        [168, 24],
    )


def is_supported(x: Tensor) -> bool:
    """Whether ``launch_pairs`` runs where x lies: a Hopper GPU."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def launch_pairs(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, block_n: int, stages: int
) -> Tensor:
    """``fp8_gemm`` of operands that are not empty, by tiles of 64 x block_n, which divides 128."""
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    _gemm_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(columns, block_n))](
        TensorDescriptor(x, [rows, channels], [channels, 1], [BLOCK_M, 128], _ROWS),
        TensorDescriptor(weight, [columns, channels], [channels, 1], [block_n, 128], _ROWS),
        x_scale, weight_scale, out, rows, columns, channels // 128,
        BLOCK_M=BLOCK_M, BLOCK_N=block_n, STAGES=stages, LAYOUT=_ROWS, num_warps=4,
    )  # fmt: skip
    return out
