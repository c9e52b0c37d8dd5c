"""Grouped block-scaled FP8 products for many rows an expert: arithmetic is what they wait for.

    out[r] = x[r] W[e]^T for the rows r of expert e, scales as in fp8_gemm.py;  or q, s = quantize(bf16(silu(gate) up))

Gluon, Hopper. A tile is 128 rows by two weight tiles of 128 rows: neighbours, or gate and up of the same channels in
the SwiGLU form. One warp fetches by TMA into a ring of three buffers of 48 KB. Two warpgroups of 64 rows each multiply
[64, 128] x [128, 128] a K block into fresh accumulators and add them, by both scales, to float32 totals of 128
registers a thread; while one scales, the products of the other occupy the tensor cores. TMA reads past an expert's rows
into the next one's: those rows are computed and not stored, and a warpgroup whose rows are all past the end only waits.
Tiles are taken in strides. Where they lie is found by a small launch before, an entry for 128 rows of an expert; the
row tiles of one weight tile are neighbours, so that a weight is read from memory once.
Bytes: those of grouped_gemm.py; 48 KB a tile and K block come through the L2, 87 multiply-adds a byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seamount.kernels.triton import fp8_gemm_ring
from seamount.kernels.triton.fp8_gemm import multiprocessors

_BLOCK_M = 128
_BLOCK_N = 128
_STAGES = 3
# Rows of 128 bytes, as TMA writes and the tensor cores read them.
_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@triton.jit(do_not_specialize=["slab_rows"])
def _locate_kernel(
    group_ptr, table_ptr, slab_rows,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """table: the number of row tiles; then, four int32 each: expert, row tiles before it, its rows, its first row."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PADDED)
    inside = experts < EXPERTS
    if MASKED:
        counts = tl.load(group_ptr + experts, mask=inside, other=0)
        begin = expert * slab_rows
        count = tl.load(group_ptr + expert)
    else:
        counts = tl.load(group_ptr + experts + 1, mask=inside, other=0)
        counts -= tl.load(group_ptr + experts, mask=inside, other=0)
        begin = tl.load(group_ptr + expert)
        count = tl.load(group_ptr + expert + 1) - begin
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    if expert == 0:
        tl.store(table_ptr, tl.sum(tiles, axis=0))
    for i in range((count + BLOCK_M - 1) // BLOCK_M):
        entry = table_ptr + 4 + (before + i) * 4
        tl.store(entry, expert)
        tl.store(entry + 1, before)
        tl.store(entry + 2, count)
        tl.store(entry + 3, begin)


def locate(groups: Tensor, experts: int, rows: int, *, masked: bool, block_m: int) -> Tensor:
    """The table of row tiles, int32 [1 + as many as there can be, 4]; rows: of x, or of an expert's slab."""
    max_tiles = experts * triton.cdiv(rows, block_m) if masked else rows // block_m + min(experts, rows)
    table = torch.empty((1 + max_tiles, 4), dtype=torch.int32, device=groups.device)
    _locate_kernel[(experts,)](
        groups, table, rows, EXPERTS=experts, EXPERTS_PADDED=triton.next_power_of_2(experts), MASKED=masked,
        BLOCK_M=block_m, num_warps=1,
    )  # fmt: skip
    return table


@gluon.jit
def place(table, tile, tiles_n, BLOCK_M: gl.constexpr):
    """(expert, first row in x, rows from there to the expert's end, column tile)."""
    entry = table + 4 + tile // tiles_n * 4
    count = gl.load(entry + 2)
    of_expert = tile - gl.load(entry + 1) * tiles_n
    row_tiles = (count + BLOCK_M - 1) // BLOCK_M
    local_row = of_expert % row_tiles * BLOCK_M
    return gl.load(entry), gl.load(entry + 3) + local_row, count - local_row, of_expert // row_tiles


@gluon.jit
def _fetch(x, weight, work, rings):
    table, num_columns, apart, tile_columns, tiles_n, num_blocks = work
    x_tiles, w_tiles, full, empty = rings
    STAGES: gl.constexpr = x_tiles.shape[0]
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    BLOCK_N: gl.constexpr = w_tiles.shape[1] // 2
    num_tiles = gl.load(table) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, first_row, _, column = place(table, tile, tiles_n, BLOCK_M)
        w_row = expert * num_columns + column * tile_columns
        for block in range(num_blocks):
            buffer = step % STAGES
            mbarrier.wait(empty.index(buffer), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(buffer), (BLOCK_M + 2 * BLOCK_N) * 128)
            near = w_tiles.index(buffer).slice(0, BLOCK_N, dim=0)
            far = w_tiles.index(buffer).slice(BLOCK_N, BLOCK_N, dim=0)
            tma.async_copy_global_to_shared(x, [first_row, block * 128], full.index(buffer), x_tiles.index(buffer))
            tma.async_copy_global_to_shared(weight, [w_row, block * 128], full.index(buffer), near)
            tma.async_copy_global_to_shared(weight, [w_row + apart, block * 128], full.index(buffer), far)
            step += 1


@gluon.jit
def _multiply(tensors, work, rings, PART: gl.constexpr, SWIGLU: gl.constexpr):
    """One warpgroup: rows PART * 64 .. of every tile."""
    table, _, _, _, tiles_n, num_blocks = work
    x_tiles, _, full, empty = rings
    STAGES: gl.constexpr = x_tiles.shape[0]
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    num_tiles = gl.load(table) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, first_row, rows_left, column = place(table, tile, tiles_n, BLOCK_M)
        if rows_left > PART * 64:
            _tile(tensors, work, rings, expert, first_row, rows_left, column, step, PART, SWIGLU)
        else:
            for block in range(num_blocks):
                buffer = (step + block) % STAGES
                mbarrier.wait(full.index(buffer), (step + block) // STAGES & 1)
                gl.thread_barrier()
                mbarrier.arrive(empty.index(buffer), count=1)
        step += num_blocks


@gluon.jit
def _tile(tensors, work, rings, expert, first_row, rows_left, column, step, PART: gl.constexpr, SWIGLU: gl.constexpr):
    x_scale, weight_scale, out, out_scale = tensors
    _, num_columns, apart, tile_columns, _, num_blocks = work
    x_tiles, w_tiles, full, empty = rings
    STAGES: gl.constexpr = x_tiles.shape[0]
    BLOCK_N: gl.constexpr = w_tiles.shape[1] // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
    row = PART * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    scales = x_scale + first_row.to(gl.int64) * num_blocks + gl.minimum(row, rows_left - 1) * num_blocks
    near_scales = weight_scale + (expert * (num_columns // 128) + column * (tile_columns // 128)) * num_blocks
    far_scales = near_scales + apart // 128 * num_blocks
    near = zeros
    far = zeros
    for block in range(num_blocks):
        buffer = (step + block) % STAGES
        near_tile = w_tiles.index(buffer).slice(0, BLOCK_N, dim=0).permute((1, 0))
        far_tile = w_tiles.index(buffer).slice(BLOCK_N, BLOCK_N, dim=0).permute((1, 0))
        rows = x_tiles.index(buffer).slice(PART * 64, 64, dim=0)
        scale = gl.load(scales + block)
        mbarrier.wait(full.index(buffer), (step + block) // STAGES & 1)
        product = warpgroup_mma(rows, near_tile, zeros, use_acc=False, is_async=True)
        near_scale = scale * gl.load(near_scales + block)
        far_scale = scale * gl.load(far_scales + block)
        product = warpgroup_mma_wait(0, [product])
        near += product * gl.expand_dims(near_scale, 1)
        product = warpgroup_mma(rows, far_tile, zeros, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, [product])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
        far += product * gl.expand_dims(far_scale, 1)

    # Through shared memory into a layout whose stores are 8 or 16 bytes a thread, whole rows a warp.
    WIDTH: gl.constexpr = 8
    STORED: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 * WIDTH // BLOCK_N, BLOCK_N // WIDTH], [4, 1], [1, 0])
    out_columns = num_columns
    if SWIGLU:
        out_columns = num_columns // 2
    out_row = PART * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    inside = gl.expand_dims(out_row < rows_left, 1)
    out_at = out + (first_row.to(gl.int64) * out_columns + column * tile_columns)
    out_at += gl.expand_dims(out_row * out_columns, 1)
    out_at += gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, STORED)), 0)
    if SWIGLU:
        values, block_scales = _quantize(_silu_product(near, far))
        gl.store(out_at, gl.convert_layout(values, STORED), mask=inside)
        scale_at = out_scale + (first_row + row).to(gl.int64) * (out_columns // 128) + column
        gl.store(scale_at, block_scales, mask=row < rows_left)
    else:
        gl.store(out_at, gl.convert_layout(near.to(gl.bfloat16), STORED), mask=inside)
        gl.store(out_at + BLOCK_N, gl.convert_layout(far.to(gl.bfloat16), STORED), mask=inside)


@gluon.jit
def _silu_product(gate, up):
    """silu(gate) * up of bfloat16 numbers, rounded to bfloat16, as float32: ``grouped_gemm.silu_product``."""
    gate = gate.to(gl.bfloat16).to(gl.float32)
    up = up.to(gl.bfloat16).to(gl.float32)
    return (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _quantize(x):
    """(e4m3, scale a row) of [64, 128] float32: ``elementwise.quantize_rows``."""
    bits = gl.maximum(gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), 0x38D1B717)  # 1e-4
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    finite = bits < 0x7F800000
    scale = gl.where(finite, exponent << 23, 0x7FC00000).to(gl.float32, bitcast=True)
    inverse = gl.where(finite, (254 - exponent) << 23, 0x7FC00000).to(gl.float32, bitcast=True)
    return (x * gl.expand_dims(inverse, 1)).to(gl.float8e4nv), scale


@gluon.jit(do_not_specialize=["tiles_n", "num_blocks"])
def _grouped_kernel(
    x, weight, x_scale, weight_scale, out, out_scale, table,
    num_columns, apart, tile_columns, tiles_n, num_blocks,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SWIGLU: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], LAYOUT)
    w_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 2 * BLOCK_N, 128], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(STAGES):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=2)
    tensors = (x_scale, weight_scale, out, out_scale)
    work = (table, num_columns, apart, tile_columns, tiles_n, num_blocks)
    rings = (x_tiles, w_tiles, full, empty)
    gl.warp_specialize(
        [
            (_multiply, (tensors, work, rings, 0, SWIGLU)),
            (_multiply, (tensors, work, rings, 1, SWIGLU)),
            (_fetch, (x, weight, work, rings)),
        ],
        [4, 1],
        [240, 24],
    )


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Whether this file and grouped_few.py take these operands: a Hopper GPU, weights of whole pairs of tiles."""
    return fp8_gemm_ring.is_supported(x) and weight.shape[1] % (2 * _BLOCK_N) == 0 and weight.shape[2] > 0


def launch_wide(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Tensor,
    out: Tensor, out_scale: Tensor | None,
) -> None:  # fmt: skip
    """Operands as ``grouped_gemm.launch_grouped`` takes them, none empty; out_scale makes it the SwiGLU form."""
    experts, columns, channels = weight.shape
    swiglu = out_scale is not None
    table = locate(groups, experts, x.shape[-2], masked=x.dim() == 3, block_m=_BLOCK_M)
    tile_columns = _BLOCK_N if swiglu else 2 * _BLOCK_N
    tiles_n = out.shape[-1] // tile_columns
    flat_x, flat_weight = x.view(-1, channels), weight.view(-1, channels)
    _grouped_kernel[(min((len(table) - 1) * tiles_n, multiprocessors(x.device)),)](
        TensorDescriptor(flat_x, list(flat_x.shape), [channels, 1], [_BLOCK_M, 128], _ROWS),
        TensorDescriptor(flat_weight, list(flat_weight.shape), [channels, 1], [_BLOCK_N, 128], _ROWS),
        x_scale, weight_scale, out, out if out_scale is None else out_scale, table,
        columns, columns // 2 if swiglu else _BLOCK_N, tile_columns, tiles_n, channels // 128,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, STAGES=_STAGES, SWIGLU=swiglu, LAYOUT=_ROWS, num_warps=4,
    )  # fmt: skip
