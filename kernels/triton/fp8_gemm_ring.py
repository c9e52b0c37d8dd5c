"""What the block-scaled products in Gluon share: a ring of tiles that one warp fills by TMA, and who multiplies them.

    total[m, n] = sum over K blocks b of  xs[m, b] ws[n // 128, b]  (sum over k in b of  x[m, k] w[n, k])

A ring is (x_tiles [S, M, 128], w_tiles [S, N, 128], full [S], empty [S]): buffers of one K block of 128 each, and
barriers that say that a buffer has come and that its readers are done with it. Steps count buffers since the kernel's
start: step s lies in buffer s % S, in round s // S.
A reader takes every step, or is one of CHAINS readers that take every CHAINS-th; their number must then divide S, so
that a buffer always meets the same one: copies may end in another order than they began, and who waits for a round
too far ahead would take an earlier one for it.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
"""Rows of 128 bytes, as TMA writes and the tensor cores read them."""


@gluon.constexpr_function
def sums_layout(width):
    """Of a warpgroup's float32 sums of 64 rows by ``width`` columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 32])


@gluon.jit
def make_ring(
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr, LAYOUT: gl.constexpr
):
    """READERS: how many warpgroups read each buffer."""
    x_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], LAYOUT)
    w_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_N, 128], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(STAGES):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=READERS)
    return x_tiles, w_tiles, full, empty


@gluon.jit
def _turned(block, turn, num_blocks):
    block += turn
    return gl.where(block < num_blocks, block, block - num_blocks)


@gluon.jit
def fetch_blocks(x, weight, row, column, num_blocks, step, ring, first_block=0, turn=0):
    """One warp: ``num_blocks`` K blocks of the tile that begins at this row and column, the first in step ``step``.

    They are first_block + turn and on, behind the last of them again first_block and on; turn < num_blocks.
    """
    x_tiles, w_tiles, full, empty = ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    for block in range(num_blocks):
        buffer = (step + block) % STAGES
        mbarrier.wait(empty.index(buffer), ((step + block) // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(buffer), (x_tiles.shape[1] + w_tiles.shape[1]) * 128)
        channel = (first_block + _turned(block, turn, num_blocks)) * 128
        tma.async_copy_global_to_shared(weight, [column, channel], full.index(buffer), w_tiles.index(buffer))
        tma.async_copy_global_to_shared(x, [row, channel], full.index(buffer), x_tiles.index(buffer))


@gluon.jit
def sum_blocks(
    row_scales, column_scales, num_blocks, step, ring,
    FIRST_ROW: gl.constexpr, FIRST_COLUMN: gl.constexpr, WIDTH: gl.constexpr,
    CHAIN: gl.constexpr = 0, CHAINS: gl.constexpr = 1, turn=0,
):  # fmt: skip
    """One warpgroup: the sums [64, WIDTH] over K blocks CHAIN, CHAIN + CHAINS, .. of a part of the tile.

    row_scales: pointers to 64 rows' first scales; column_scales: to those of WIDTH columns, which share them; turn: as
    the blocks were fetched. The next block's scales are on their way while this one's copy is awaited.
    """
    x_tiles, w_tiles, full, empty = ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    gl.static_assert(STAGES % CHAINS == 0)
    zeros = gl.zeros([64, WIDTH], gl.float32, sums_layout(WIDTH))
    total = zeros
    first = _turned(gl.minimum(CHAIN, num_blocks - 1), turn, num_blocks)
    scale = gl.load(row_scales + first) * gl.load(column_scales + first)
    for block in range(CHAIN, num_blocks, CHAINS):
        buffer = (step + block) % STAGES
        following = _turned(gl.minimum(block + CHAINS, num_blocks - 1), turn, num_blocks)
        next_row_scale = gl.load(row_scales + following)
        next_column_scale = gl.load(column_scales + following)
        mbarrier.wait(full.index(buffer), (step + block) // STAGES & 1)
        rows = x_tiles.index(buffer).slice(FIRST_ROW, 64, dim=0)
        columns = w_tiles.index(buffer).slice(FIRST_COLUMN, WIDTH, dim=0).permute((1, 0))
        product = warpgroup_mma(rows, columns, zeros, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, [product])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
        total += product * gl.expand_dims(scale, 1)
        scale = next_row_scale * next_column_scale
    return total


@gluon.jit
def store_sums(total, out, num_rows, num_columns, row_stride):
    """total [64, WIDTH] as bfloat16 to ``out``, its first element's place; of them num_rows by num_columns exist.

    By way of shared memory, for stores of 16 bytes a thread and whole rows a warp.
    """
    WIDTH: gl.constexpr = total.shape[1]
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, STORED)), 1)
    column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, STORED)), 0)
    value = gl.convert_layout(total.to(gl.bfloat16), STORED)
    gl.store(out + row * row_stride + column, value, mask=(row < num_rows) & (column < num_columns))


def is_supported(x: Tensor) -> bool:
    """Whether kernels with a ring run where x lies: a Hopper GPU."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
