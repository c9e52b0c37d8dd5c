"""Causal attention with expanded keys and values on Hopper, heads of 128 + 64 channels and values of 128.

    s[t, j] = scale * (q[t, :128] . k[j] + q[t, 128:] . k_rope[j]),   j < length[t]
    out[t] = sum_j 2^(s'[t, j] - m[t]) v[j] / l[t],   lse[t] = (m[t] + log2 l[t]) ln 2,   s' = s log2(e)

Tiles: a program holds 128 rows of one head in shared memory and walks over 128 keys at a time with running maximum m
and denominator l. One warp fetches keys and values by TMA, two tiles in flight; two warpgroups take 64 rows each, P
goes from registers into the second product. While one warpgroup is at its exponentials the other multiplies. Tiles that
all rows of a warpgroup see go without a mask. Rows that see most begin first.
Keys and values that no row sees must be finite: TMA fetches whole tiles, and 0 times NaN would reach the sums.
Bytes: 640 a key and 128 rows, from L2; q and out once. The rotary key is read per head, stored once.
Work: 640 flops a row, head and key: 1,280 tensor-core clocks a tile and warpgroup, beside 470 instructions a warp, of
which 66 exponentials take eight clocks each.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_ROWS = 128
_TOKENS = 128
_STAGES = 2
_LOG2_E = 1.4426950408889634
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# [64 rows, 128 keys] and [64 rows, 128 value channels].
_TILE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_ROW = gl.constexpr(gl.SliceLayout(1, _TILE.value))
_COLUMN = gl.constexpr(gl.SliceLayout(0, _TILE.value))


@gluon.jit
def _fetch(sources, head_columns, head, first_row, num_tiles, tiles, barriers):
    """One warp: the queries once, then keys and values tile after tile, each as soon as its buffer is free."""
    queries, queries_rope, keys, keys_rope, values = sources
    q_head, k_head, v_head = head_columns
    q_tiles, q_rope_tiles, k_tiles, k_rope_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    mbarrier.expect(q_full, 128 * 192 * 2)
    for half in gl.static_range(2):
        row = first_row + half * 64
        tma.async_copy_global_to_shared(queries, [row, head * q_head], q_full, q_tiles.index(half))
        tma.async_copy_global_to_shared(queries_rope, [row, head * q_head + 128], q_full, q_rope_tiles.index(half))
    for step in range(num_tiles):
        buffer = step % STAGES
        free = (step // STAGES & 1) ^ 1
        token = step * 128
        mbarrier.wait(k_empty.index(buffer), free)
        mbarrier.expect(k_full.index(buffer), 128 * 192 * 2)
        tma.async_copy_global_to_shared(keys_rope, [token, 0], k_full.index(buffer), k_rope_tiles.index(buffer))
        tma.async_copy_global_to_shared(keys, [token, head * k_head], k_full.index(buffer), k_tiles.index(buffer))
        mbarrier.wait(v_empty.index(buffer), free)
        mbarrier.expect(v_full.index(buffer), 128 * 128 * 2)
        tma.async_copy_global_to_shared(values, [token, head * v_head], v_full.index(buffer), v_tiles.index(buffer))


@gluon.jit
def _attend_tile(step, q, q_rope, tiles, barriers, length, qk_scale, top, total, acc, MASKED: gl.constexpr):
    _, _, k_tiles, k_rope_tiles, v_tiles = tiles
    _, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    buffer = step % STAGES
    filled = step // STAGES & 1
    zeros = gl.zeros([64, 128], gl.float32, _TILE)
    mbarrier.wait(k_full.index(buffer), filled)
    s = warpgroup_mma(q_rope, k_rope_tiles.index(buffer).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma(q, k_tiles.index(buffer).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(buffer), count=1)
    if MASKED:
        token = step * 128 + gl.arange(0, 128, layout=_COLUMN)
        s = gl.where(gl.expand_dims(token, 0) < gl.expand_dims(length, 1), s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, axis=1) * qk_scale)
    safe_top = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = gl.exp2(s * qk_scale - gl.expand_dims(safe_top, 1))
    keep = gl.exp2(top - safe_top)
    total = total * keep + gl.sum(p, axis=1)
    acc = acc * gl.expand_dims(keep, 1)
    p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, _TILE, 2))
    mbarrier.wait(v_full.index(buffer), filled)
    acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v_tiles.index(buffer), acc, is_async=True)])
    gl.thread_barrier()
    mbarrier.arrive(v_empty.index(buffer), count=1)
    return new_top, total, acc


@gluon.jit
def _attend(rows, tiles, barriers, head, first_row, num_tiles, qk_scale, HALF: gl.constexpr):
    """Four warps: 64 rows."""
    lengths, out, lse, num_rows, num_heads = rows
    q_tiles, q_rope_tiles, _, _, _ = tiles
    q_full, _, _, _, _ = barriers
    row = first_row + HALF * 64 + gl.arange(0, 64, layout=_ROW)
    real = row < num_rows
    length = gl.load(lengths + row, mask=real, other=0).to(gl.int32)
    num_whole = gl.minimum(gl.min(gl.where(real, length, 0x7FFFFFFF), axis=0) // 128, num_tiles)
    q = q_tiles.index(HALF)
    q_rope = q_rope_tiles.index(HALF)
    top = gl.full([64], float("-inf"), gl.float32, _ROW)
    total = gl.zeros([64], gl.float32, _ROW)
    acc = gl.zeros([64, 128], gl.float32, _TILE)
    mbarrier.wait(q_full, 0)
    for step in range(num_whole):
        top, total, acc = _attend_tile(step, q, q_rope, tiles, barriers, length, qk_scale, top, total, acc, False)
    for step in range(num_whole, num_tiles):
        top, total, acc = _attend_tile(step, q, q_rope, tiles, barriers, length, qk_scale, top, total, acc, True)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    at = row.to(gl.int64) * num_heads + head
    row_lse = gl.where(empty, float("inf"), (top + gl.log2(total)) * 0.6931471805599453)
    gl.store(lse + at, row_lse, mask=real)
    acc = acc * gl.expand_dims(1.0 / total, 1)
    channel = gl.expand_dims(gl.arange(0, 128, layout=_COLUMN), 0)
    mask = gl.expand_dims(real, 1) & (channel >= 0)
    gl.store(out + gl.expand_dims(at * 128, 1) + channel, acc.to(gl.bfloat16), mask=mask)


@gluon.jit
def _dense_mha(
    queries,
    queries_rope,
    keys,
    keys_rope,
    values,
    q_head,
    k_head,
    v_head,
    lengths,
    out,
    lse,
    num_rows,
    num_heads,
    qk_scale,
    STAGES: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    head = gl.program_id(0)
    first_row = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    row = first_row + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    length = gl.max(gl.load(lengths + row, mask=row < num_rows, other=0).to(gl.int32), axis=0)
    num_tiles = (length + 127) // 128
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], LAYOUT)
    q_rope_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], LAYOUT)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 128], LAYOUT)
    k_rope_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 64], LAYOUT)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 128], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for buffer in gl.static_range(STAGES):
        mbarrier.init(k_full.index(buffer), count=1)
        mbarrier.init(k_empty.index(buffer), count=2)
        mbarrier.init(v_full.index(buffer), count=1)
        mbarrier.init(v_empty.index(buffer), count=2)
    rows = (lengths, out, lse, num_rows, num_heads)
    sources = (queries, queries_rope, keys, keys_rope, values)
    tiles = (q_tiles, q_rope_tiles, k_tiles, k_rope_tiles, v_tiles)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_attend, (rows, tiles, barriers, head, first_row, num_tiles, qk_scale, 0)),
            (_attend, (rows, tiles, barriers, head, first_row, num_tiles, qk_scale, 1)),
            (_fetch, (sources, (q_head, k_head, v_head), head, first_row, num_tiles, tiles, barriers)),
        ],
        [4, 1],
        [232, 24],
    )


def is_supported(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor) -> bool:
    """Whether ``dense_mha`` takes these: sizes, chip, and what TMA can address (16 bytes)."""
    return (
        (k.shape[2], k_rope.shape[1], v.shape[2]) == (128, 64, 128)
        and q.numel() > 0
        and k.numel() > 0
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 for x in (q, k, k_rope, v))
    )


def dense_mha(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``seamount.kernels.dense_mla.dense_mha``; arguments are checked there, ``is_supported`` must hold."""
    num_rows, heads, _ = q.shape
    out = torch.empty((num_rows, heads, 128), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_rows, heads), dtype=torch.float32, device=q.device)
    _dense_mha[(heads, triton.cdiv(num_rows, _ROWS))](
        _columns(q, 192, [64, 128]),
        _columns(q, 192, [64, 64]),
        _columns(k, 128, [_TOKENS, 128]),
        _columns(k_rope.unsqueeze(1), 64, [_TOKENS, 64]),
        _columns(v, 128, [_TOKENS, 128]),
        q.stride(1),
        k.stride(1),
        v.stride(1),
        lengths.contiguous(),
        out,
        lse,
        num_rows,
        heads,
        scale * _LOG2_E,
        STAGES=_STAGES,
        LAYOUT=_LAYOUT,
        num_warps=4,
    )
    return out, lse


def _columns(x: Tensor, width: int, box: list[int]) -> TensorDescriptor:
    """[n, H, width] as rows of all heads' columns, whatever lies between the heads."""
    columns = (x.shape[1] - 1) * x.stride(1) + width
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], box, _LAYOUT)
