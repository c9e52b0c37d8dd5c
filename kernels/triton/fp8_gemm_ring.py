"""What the block-scaled products in Gluon share: a ring of tiles that one warp fills by TMA, and who multiplies them.

    total[m, n] = sum over K blocks b of  xs[m, b] ws[n // 128, b]  (sum over k in b of  x[m, k] w[n, k])

A ring is (x_tiles [S, M, 128], w_tiles [S, N, 128], full [S], empty [S]): buffers of one K block of 128 each, and
barriers that say that a buffer has come and that its readers are done with it. Steps count buffers since the kernel's
start: step s lies in buffer s % S, in round s // S.
A tile's rows are tokens as ``token_of`` says; what lies in rows of no token is not defined, and is not stored.
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
def first_token(tile, num_rows, BLOCK_M: gl.constexpr):
    """The first row of a tile of tokens: the last tile lies at their end, over some rows of the one before it.

    A row that two tiles compute comes out the same, bit for bit. No copy but of the first 8 rows reaches past the end:
    the zeros that TMA then fills in take it longer than reading rows (20 us instead of 13 for 8 rows of 4096 x 7168).
    """
    return gl.minimum(tile * BLOCK_M, gl.maximum(num_rows - BLOCK_M, 0))


@gluon.jit
def token_of(row, num_rows, BLOCK_M: gl.constexpr, BOX: gl.constexpr):
    """Which token a tile's row is, from the tile's first on; ``num_rows`` and more: none.

    Where tokens are fewer than rows of a tile, it holds the first BOX of them and then the last BOX, if more than BOX.
    """
    if BOX == BLOCK_M:
        return row
    return row + gl.where(row < BOX, 0, gl.where(num_rows > BOX, num_rows - 2 * BOX, BLOCK_M))


def token_box(rows: int, block_m: int) -> int:
    """How many rows a copy of tokens has: a power of two, at least the swizzle's 8 and else no more than there are."""
    return min(block_m, max(8, 1 << rows.bit_length() - 1))


@gluon.jit
def _ask_for_weight(x, weight, column, channel, buffer, ring, has_second):
    """Say what a buffer is to receive of both operands, and ask for its rows of the weight."""
    _, w_tiles, full, _ = ring
    X_BYTES: gl.constexpr = x.block_shape[0] * 128
    W_BYTES: gl.constexpr = w_tiles.shape[1] * 128
    if has_second:
        mbarrier.expect(full.index(buffer), 2 * X_BYTES + W_BYTES)
    else:
        mbarrier.expect(full.index(buffer), X_BYTES + W_BYTES)
    tma.async_copy_global_to_shared(weight, [column, channel], full.index(buffer), w_tiles.index(buffer))


@gluon.jit
def fetch_weight_ahead(x, weight, column, num_blocks, ring, num_rows):
    """One warp, before its first ``fetch_blocks``: as many K blocks of the weight as the ring holds. Returns how many.

    A weight is a constant: it need not wait for the kernel ahead in the stream to end, and memory stays busy while one
    product ends and the next begins.
    """
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BOX: gl.constexpr = x.block_shape[0]
    count = gl.minimum(num_blocks, ring[0].shape[0])
    for block in range(count):
        _ask_for_weight(x, weight, column, block * 128, block, ring, (BOX < BLOCK_M) & (num_rows > BOX))
    return count


@gluon.jit
def fetch_blocks(x, weight, row, column, num_blocks, step, ring, num_rows, ahead=0):
    """One warp: ``num_blocks`` K blocks of the tile that begins at this row and column, the first in step ``step``.

    num_rows: of all tokens. Steps before ``ahead`` have asked for their weight already.
    """
    x_tiles, _, full, empty = ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    BOX: gl.constexpr = x.block_shape[0]
    has_second = (BOX < BLOCK_M) & (num_rows > BOX)
    for block in range(num_blocks):
        buffer = (step + block) % STAGES
        if step + block >= ahead:
            mbarrier.wait(empty.index(buffer), ((step + block) // STAGES & 1) ^ 1)
            _ask_for_weight(x, weight, column, block * 128, buffer, ring, has_second)
        x_tile = x_tiles.index(buffer)
        tma.async_copy_global_to_shared(x, [row, block * 128], full.index(buffer), x_tile.slice(0, BOX, dim=0))
        if BOX < BLOCK_M:  # noqa: SIM102 (this one is the compiler's)
            if has_second:
                last = x_tile.slice(BOX, BOX, dim=0)
                tma.async_copy_global_to_shared(x, [num_rows - BOX, block * 128], full.index(buffer), last)


@gluon.jit
def sum_blocks(
    row_scales, column_scales, num_blocks, step, ring,
    FIRST_ROW: gl.constexpr, FIRST_COLUMN: gl.constexpr, WIDTH: gl.constexpr,
    CHAIN: gl.constexpr = 0, CHAINS: gl.constexpr = 1,
):  # fmt: skip
    """One warpgroup: the sums [64, WIDTH] over K blocks CHAIN, CHAIN + CHAINS, .. of a part of the tile.

    row_scales: pointers to 64 rows' first scales; column_scales: to those of WIDTH columns, which share them. The next
    block's scales are on their way while this one's copy is awaited.
    """
    x_tiles, w_tiles, full, empty = ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    gl.static_assert(STAGES % CHAINS == 0)
    zeros = gl.zeros([64, WIDTH], gl.float32, sums_layout(WIDTH))
    total = zeros
    first = gl.minimum(CHAIN, num_blocks - 1)
    scale = gl.load(row_scales + first) * gl.load(column_scales + first)
    for block in range(CHAIN, num_blocks, CHAINS):
        buffer = (step + block) % STAGES
        following = gl.minimum(block + CHAINS, num_blocks - 1)
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
def store_sums(
    total, out, num_rows, num_columns, row_stride,
    FIRST_ROW: gl.constexpr = 0, BLOCK_M: gl.constexpr = 64, BOX: gl.constexpr = 64,
):  # fmt: skip
    """total [64, WIDTH], a tile's rows from FIRST_ROW on, as bfloat16 to ``out``, the tile's first element's place.

    num_rows by num_columns of it exist. By way of shared memory, for stores of 16 bytes a thread and whole rows a warp.
    """
    WIDTH: gl.constexpr = total.shape[1]
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = FIRST_ROW + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    row = gl.expand_dims(token_of(row, num_rows, BLOCK_M, BOX), 1)
    column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, STORED)), 0)
    value = gl.convert_layout(total.to(gl.bfloat16), STORED)
    gl.store(out + row * row_stride + column, value, mask=(row < num_rows) & (column < num_columns))


def is_supported(x: Tensor) -> bool:
    """Whether kernels with a ring run where x lies: a Hopper GPU."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
