"""Grouped block-scaled FP8 products, rows sorted by expert (contiguous) or in one slab an expert (masked).

    out[r] = x[r] W[e]^T for the rows r of expert e, scales as in fp8_gemm.py
    SwiGLU form: h = bf16(silu(bf16(gate)) bf16(up)), amax over 128 channels of h gives s, q = e4m3(h / s)

Tiles: those of fp8_gemm.py. The experts' row counts are on the device, so each program finds its tile itself: a
prefix sum over ceil(count / BLOCK_M), kept in registers, maps a tile number to (expert, 128 weight rows, token rows);
the token tiles of one weight tile are neighbours, so a weight is read from memory once. The grid is bounded by what the
counts can be at most; programs take tiles in strides and those without one leave at once. In the SwiGLU form a program
holds the gate's and the up's tile of the same 128 channels, which is one quantisation block: the [rows, 2 I]
intermediate never reaches memory. On Hopper GPUs grouped_few.py does the work without SwiGLU up to 64 rows an expert,
and grouped_wide.py all of it beyond.
Bytes: active experts * N K + rows (K + 2 N); SwiGLU form rows (K + N / 2) in place of rows (K + 2 N + 2 N + N / 2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.triton import grouped_few, grouped_wide
from seamount.kernels.triton.elementwise import scale_of
from seamount.kernels.triton.fp8_gemm import accumulate, multiprocessors
from seamount.kernels.triton.moe import swiglu_quantize

_BLOCK_N = 128
_PROGRAMS_PER_MULTIPROCESSOR = 16
_MANY_ROWS = 64


@triton.jit
def silu_product(gate, up):
    """silu(gate) * up in float32, rounded to bfloat16; gate and up are bfloat16."""
    wide = gate.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _accumulate_pair(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, rows, columns, apart, num_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Two tiles of ``accumulate``: weight rows ``columns`` and ``columns + apart``, a multiple of 128."""
    inner = tl.arange(0, 128)
    size = num_blocks * 128
    x_ptrs = x_ptr + (rows[:, None] * size + inner[None, :])
    weight_offsets = columns[:, None] * size + inner[None, :]
    first_ptrs = weight_ptr + weight_offsets
    second_ptrs = first_ptrs + apart * size
    x_scale_ptrs = x_scale_ptr + rows * num_blocks
    first_scale_ptrs = weight_scale_ptr
    second_scale_ptrs = weight_scale_ptr + apart // 128 * num_blocks
    TOKENS_LEFT: tl.constexpr = BLOCK_M >= 64
    first = tl.zeros((BLOCK_M, BLOCK_N) if TOKENS_LEFT else (BLOCK_N, BLOCK_M), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N) if TOKENS_LEFT else (BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(0, num_blocks, num_stages=STAGES):
        x = tl.load(x_ptrs + block * 128)
        x_scale = tl.expand_dims(tl.load(x_scale_ptrs + block), 1 if TOKENS_LEFT else 0)
        if TOKENS_LEFT:
            first_product = tl.dot(x, tl.trans(tl.load(first_ptrs + block * 128)))
            second_product = tl.dot(x, tl.trans(tl.load(second_ptrs + block * 128)))
        else:
            first_product = tl.dot(tl.load(first_ptrs + block * 128), tl.trans(x))
            second_product = tl.dot(tl.load(second_ptrs + block * 128), tl.trans(x))
        first += first_product * (x_scale * tl.load(first_scale_ptrs + block))
        second += second_product * (x_scale * tl.load(second_scale_ptrs + block))
    return first, second


@triton.jit(do_not_specialize=["slab_rows"])
def _grouped_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, group_ptr, out_ptr, out_scale_ptr,
    slab_rows, num_columns, num_blocks, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, EXPERTS_PADDED)
    if MASKED:
        counts = tl.load(group_ptr + experts, mask=experts < EXPERTS, other=0)
    else:
        begins = tl.load(group_ptr + experts, mask=experts < EXPERTS, other=0)
        counts = tl.load(group_ptr + experts + 1, mask=experts < EXPERTS, other=0) - begins
    tiles_m = (counts + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles_m, axis=0)
    out_columns = num_columns // 2 if SWIGLU else num_columns
    tiles_n = tl.cdiv(out_columns, BLOCK_N)
    num_tiles = tl.sum(tiles_m, axis=0) * tiles_n
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
        expert = tl.sum((last_tile <= tile // tiles_n).to(tl.int32), axis=0)
        before = tl.sum(tl.where(experts < expert, tiles_m, 0), axis=0)
        if MASKED:
            begin = expert.to(tl.int64) * slab_rows
            count = tl.load(group_ptr + expert)
        else:
            begin = tl.load(group_ptr + expert).to(tl.int64)
            count = tl.load(group_ptr + expert + 1) - tl.load(group_ptr + expert)
        of_expert = tile - before * tiles_n
        expert_tiles = (count + BLOCK_M - 1) // BLOCK_M
        local_row = of_expert % expert_tiles * BLOCK_M
        first_column = of_expert // expert_tiles * BLOCK_N
        rows = local_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        # Rows past the end repeat the last one and are not stored: no masks on the way in.
        read_rows = tl.minimum(rows, count - 1) - local_row
        read_columns = tl.minimum(columns, out_columns - 1) - first_column
        x = x_ptr + (begin + local_row) * (num_blocks * 128)
        x_scale = x_scale_ptr + (begin + local_row) * num_blocks
        weight = weight_ptr + (expert.to(tl.int64) * num_columns + first_column) * (num_blocks * 128)
        weight_scale = weight_scale_ptr + (expert * tl.cdiv(num_columns, 128) + first_column // 128) * num_blocks
        row_inside = rows < count
        out_rows = begin + rows
        # Broadcast along the tile, whichever way it lies.
        TOKEN_AXIS: tl.constexpr = 0 if BLOCK_M >= 64 else 1
        row_of_tile = tl.expand_dims(row_inside, 1 - TOKEN_AXIS)
        inside = row_of_tile & tl.expand_dims(columns < num_columns, TOKEN_AXIS)
        out_ptrs = out_ptr + tl.expand_dims(out_rows, 1 - TOKEN_AXIS) * out_columns
        out_ptrs += tl.expand_dims(columns, TOKEN_AXIS)
        if SWIGLU:
            gate, up = _accumulate_pair(
                x, x_scale, weight, weight_scale, read_rows, read_columns, num_columns // 2, num_blocks,
                BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
            product = silu_product(gate.to(tl.bfloat16), up.to(tl.bfloat16)).to(tl.float32)
            amax_bits = tl.max(product.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1 - TOKEN_AXIS)
            scale, inverse = scale_of(amax_bits)
            values = (product * tl.expand_dims(inverse, 1 - TOKEN_AXIS)).to(tl.float8e4nv)
            tl.store(out_ptrs, values, mask=row_of_tile)
            block = of_expert // expert_tiles
            tl.store(out_scale_ptr + out_rows * (out_columns // 128) + block, scale, mask=row_inside)
        else:
            total = accumulate(
                x, x_scale, weight, weight_scale, read_rows, read_columns, 0, num_blocks, num_blocks,
                BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
            tl.store(out_ptrs, total.to(tl.bfloat16), mask=inside)


def launch_grouped(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Tensor,
    out: Tensor, out_scale: Tensor | None,
    *, block_m: int, stages: int, block_n: int = _BLOCK_N, warps: int = 4,
) -> None:  # fmt: skip
    """One configuration; the choice is ``grouped_gemm``'s. out_scale makes it the SwiGLU form."""
    experts, columns, channels = weight.shape
    masked = x.dim() == 3
    rows = x.shape[-2]
    tiles_m = experts * triton.cdiv(rows, block_m) if masked else rows // block_m + min(experts, rows)
    tiles = tiles_m * triton.cdiv(out.shape[-1], block_n)
    programs = min(tiles, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device)) if masked else tiles
    _grouped_kernel[(programs,)](
        x, x_scale, weight, weight_scale, groups, out, out if out_scale is None else out_scale,
        rows, columns, channels // 128, EXPERTS=experts, EXPERTS_PADDED=triton.next_power_of_2(experts),
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, MASKED=masked, SWIGLU=out_scale is not None,
        num_warps=warps,
    )  # fmt: skip


def grouped_gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Tensor) -> Tensor:
    """``grouped_fp8_gemm`` (x [R, K]) and ``grouped_fp8_gemm_masked`` (x [E, M, K]) for checked CUDA tensors."""
    out = torch.empty((*x.shape[:-1], weight.shape[1]), dtype=torch.bfloat16, device=x.device)
    if not out.numel() or not weight.shape[0]:  # without experts every row is of no group
        return out
    rows = _mean_rows(x, weight)
    operands = (x, x_scale, weight, weight_scale, groups, out, None)
    if rows > _MANY_ROWS and grouped_wide.is_supported(x, weight):
        grouped_wide.launch_wide(*operands)
    elif grouped_wide.is_supported(x, weight):
        grouped_few.launch_few(x, x_scale, weight, weight_scale, groups, out)
    elif rows <= 24:  # one tile an expert; deep prefetch, for all the time goes into reading weights
        launch_grouped(*operands, block_m=32, stages=6)
    else:
        launch_grouped(*operands, block_m=64, stages=3)
    return out


def grouped_gemm_swiglu(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """``grouped_fp8_gemm_swiglu`` for checked CUDA tensors."""
    rows = _mean_rows(x, weight) if weight.shape[0] else 0
    wide = rows > _MANY_ROWS and grouped_wide.is_supported(x, weight)
    if rows > _MANY_ROWS and not wide:  # two accumulators leave too small a tile: 1.14 times the time of the parts
        return swiglu_quantize(grouped_gemm(x, x_scale, weight, weight_scale, groups))
    channels = weight.shape[1] // 2
    values = torch.empty((*x.shape[:-1], channels), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], channels // 128), dtype=torch.float32, device=x.device)
    if values.numel() and weight.shape[0]:
        operands = (x, x_scale, weight, weight_scale, groups, values, scales)
        if wide:
            grouped_wide.launch_wide(*operands)
        elif rows <= 16:
            launch_grouped(*operands, block_m=16, stages=4)
        else:
            launch_grouped(*operands, block_m=64, stages=4, warps=8)
    return values, scales


def _mean_rows(x: Tensor, weight: Tensor) -> int:
    """An expert's mean rows; for slabs, whose filling the host does not know, a quarter of what they hold."""
    return x.shape[1] // 4 if x.dim() == 3 else x.shape[0] // weight.shape[0]
