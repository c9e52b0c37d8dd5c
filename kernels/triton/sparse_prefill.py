"""Sparse MLA prefill on the GPU: the rows of one sequence, each over the tokens that it chose.

    out[t, h] = softmax_j(scale * q[t, h] . kv[i_j]) kv[i_j, :C],   i = context[indices[t]]

Tiles: an item is one row and 64 heads (fewer are padded); one program an SM walks over its items, 64 tokens at a time.
Of its twelve warps eight multiply (``mla_hopper``) and four copy: 16 bytes a thread and instruction, from global to
shared memory without passing registers, each half tile as soon as its readers are done with the one before. They also
bring the next item's query, and look how far its indices reach: tiles behind the last valid one are left out.
Bytes: 1,152 a token and item, from L2 as far as the context fits there; 4 or 8 an index, 8 a slot; q and out 2 (C + R)
and 2 C a head. Work: 2 (2 C + R) flops a token and head, 292 GFLOP for 1,024 rows, 2,048 tokens, 64 heads.

An fp8 context is unpacked to bfloat16 once (656 + 1,152 bytes a token), unless the rows are few: then
``sparse_mla.sparse_mla_decode`` reads what they chose, and only that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from seamount.kernels.layout import CacheLayout
from seamount.kernels.triton.mla_hopper import attend_left, attend_right
from seamount.kernels.triton.sparse_mla import sparse_mla_decode

_LOG2_E = 1.4426950408889634
# Of 168 a thread on average: the left half's warps get what these two leave.
_RIGHT_REGISTERS = 160
_COPY_REGISTERS = 88


@gluon.jit
def _load_indices(indices, tile, num_indices, LAYOUT: gl.constexpr):
    at = tile * 64 + gl.arange(0, 64, layout=LAYOUT)
    return gl.load(indices + at, mask=at < num_indices, other=-1)


@gluon.jit
def _to_slots(indices, context, PAGED: gl.constexpr):
    """Rows of kv, -1 for none: int64."""
    if PAGED:
        indices = gl.load(context + indices, mask=indices >= 0, other=-1)
    return indices.to(gl.int64)


@gluon.jit
def _copy(target, rows, live, FIRST: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr):
    """Columns [FIRST, FIRST + COLUMNS) of rows of 576, zeros where not live."""
    column = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ROWS)), 0)
    async_copy.async_copy_global_to_shared(target, rows + FIRST + column, live & (column >= 0))


@gluon.jit
def _last_valid(indices, first, num_indices):
    """The last position from ``first`` on whose index is valid, 0 if none."""
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    at = gl.arange(0, 1024, layout=FLAT)
    last = gl.full([1024], 0, gl.int32, FLAT)
    for start in range(first, num_indices, 1024):
        index = gl.load(indices + start + at, mask=start + at < num_indices, other=-1)
        last = gl.where(index >= 0, start + at, last)
    return gl.max(last, axis=0)


@gluon.jit
def _prefetch_query(rows, live):
    """The 128-byte lines of 64 rows of 576, to L2."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    line = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, LINES)), 0)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, $2; }",
        "=r,l,r",
        [rows + line * 64, (live & (line < 9)).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _bring(
    q,
    kv,
    context,
    indices,
    num_items,
    num_indices,
    num_heads,
    q_latent,
    q_rope,
    k_left,
    k_right,
    k_rope,
    bias,
    counts,
    full_left,
    full_right,
    empty_left,
    empty_right,
    q_full,
    q_empty,
    head_blocks,
    PAGED: gl.constexpr,
):
    """Four warps: every tile of every item, its query behind its first tile."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TOKEN: gl.constexpr = gl.SliceLayout(1, ROWS)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = 0
    first = gl.program_id(0)
    lane = gl.arange(0, 64, layout=FLAT)
    num_tiles = _last_valid(indices + (first // head_blocks).to(gl.int64) * num_indices, 0, num_indices) // 64 + 1
    for item in range(first, num_items, gl.num_programs(0)):
        done = (item - first) // gl.num_programs(0)
        row = (item // head_blocks).to(gl.int64)
        row_indices = indices + row * num_indices
        head = gl.expand_dims(gl.arange(0, 64, layout=TOKEN), 1)
        slot = _to_slots(_load_indices(row_indices, 0, num_indices, TOKEN), context, PAGED)
        index = _load_indices(row_indices, 1, num_indices, TOKEN)
        bias_index = _load_indices(row_indices, 0, num_indices, FLAT)
        # How far the next item reaches is found out in passing, a tile at a time.
        following = gl.minimum(item + gl.num_programs(0), num_items - 1)
        next_row = (following // head_blocks).to(gl.int64)
        next_indices = indices + next_row * num_indices
        next_index = _load_indices(next_indices, 0, num_indices, FLAT)
        last = gl.full([64], 0, gl.int32, FLAT)
        for step in range(num_tiles):
            buffer = tile % 2
            phase = (tile // 2 & 1) ^ 1
            live = gl.expand_dims(slot, 1) >= 0
            rows = kv + gl.expand_dims(slot, 1) * 576
            invalid = gl.where(bias_index >= 0, 0.0, float("-inf"))
            slot = _to_slots(index, context, PAGED)
            index = _load_indices(row_indices, step + 2, num_indices, TOKEN)
            bias_index = _load_indices(row_indices, step + 1, num_indices, FLAT)
            last = gl.where(next_index >= 0, step * 64 + lane, last)
            next_index = _load_indices(next_indices, step + 1, num_indices, FLAT)
            mbarrier.wait(empty_right.index(buffer), phase)
            bias.index(buffer).store(invalid)
            _copy(k_rope.index(buffer), rows, live, 512, 64, ROWS)
            _copy(k_right.index(buffer), rows, live, 256, 256, ROWS)
            async_copy.mbarrier_arrive(full_right.index(buffer), increment_count=False)
            gl.thread_barrier()
            mbarrier.arrive(full_right.index(buffer), count=1)
            mbarrier.wait(empty_left.index(buffer), phase)
            _copy(k_left.index(buffer), rows, live, 0, 256, ROWS)
            async_copy.mbarrier_arrive(full_left.index(buffer), increment_count=False)
            if step == 0:
                mbarrier.wait(q_empty, (done & 1) ^ 1)
                counts.store(gl.full([128], 0, gl.int32, FLAT) + num_tiles)
                live = item % head_blocks * 64 + head < num_heads
                rows = q + (row * num_heads + item % head_blocks * 64) * 576 + head * 576
                _copy(q_rope, rows, live, 512, 64, ROWS)
                _copy(q_latent.index(0), rows, live, 0, 512, ROWS)
                async_copy.mbarrier_arrive(q_full, increment_count=False)
                gl.thread_barrier()
                mbarrier.arrive(q_full, count=1)
                first_head = following % head_blocks * 64
                LINES: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
                next_head = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LINES)), 1)
                next_query = q + (next_row * num_heads + first_head) * 576 + next_head * 576
                _prefetch_query(next_query, first_head + next_head < num_heads)
            tile += 1
        reach = gl.max(last, axis=0)
        if num_tiles * 64 < num_indices:
            reach = gl.maximum(reach, _last_valid(next_indices, num_tiles * 64, num_indices))
        num_tiles = reach // 64 + 1


@gluon.jit(do_not_specialize=["num_items", "num_indices", "num_heads", "head_blocks"])
def _prefill(
    q,
    kv,
    context,
    indices,
    out,
    lse,
    num_items,
    num_indices,
    num_heads,
    qk_scale,
    head_blocks,
    PAGED: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], gl.bfloat16)
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.bfloat16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 512], WIDE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], NARROW)
    k_left = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], HALF)
    k_right = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], HALF)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], NARROW)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], NARROW)
    bias = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    keeps = gl.allocate_shared_memory(gl.float32, [64], VECTOR)
    counts = gl.allocate_shared_memory(gl.int32, [128], VECTOR)
    full_left = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full_right = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_left = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_right = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    # Copies arrive by thread; one more arrival where ordinary stores belong to it. Between copies that threads ask for
    # (cp.async) and the tensor cores' reads PTX wants a proxy fence; behind the barrier none is, as in FlashMLA.
    for buffer in gl.static_range(2):
        mbarrier.init(full_left.index(buffer), count=128)
        mbarrier.init(full_right.index(buffer), count=129)
        mbarrier.init(empty_left.index(buffer), count=1)
        mbarrier.init(empty_right.index(buffer), count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    mbarrier.init(q_full, count=129)
    mbarrier.init(q_empty, count=2)
    gl.warp_specialize(
        [
            (
                attend_left,
                (
                    out,
                    lse,
                    num_items,
                    num_heads,
                    qk_scale,
                    q_latent,
                    q_rope,
                    k_left,
                    k_right,
                    k_rope,
                    bias,
                    p_tile,
                    keeps,
                    counts,
                    full_left,
                    full_right,
                    empty_left,
                    p_full,
                    p_empty,
                    q_full,
                    q_empty,
                    head_blocks,
                ),
            ),
            (
                attend_right,
                (
                    out,
                    num_items,
                    num_heads,
                    k_right,
                    p_tile,
                    keeps,
                    counts,
                    empty_right,
                    p_full,
                    p_empty,
                    q_full,
                    q_empty,
                    head_blocks,
                ),
            ),
            (
                _bring,
                (
                    q,
                    kv,
                    context,
                    indices,
                    num_items,
                    num_indices,
                    num_heads,
                    q_latent,
                    q_rope,
                    k_left,
                    k_right,
                    k_rope,
                    bias,
                    counts,
                    full_left,
                    full_right,
                    empty_left,
                    empty_right,
                    q_full,
                    q_empty,
                    head_blocks,
                    PAGED,
                ),
            ),
        ],
        [4, 4],
        [RIGHT_REGISTERS, COPY_REGISTERS],
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _unpack(plane, context, kv, num_tokens, TOKENS: tl.constexpr):
    """TOKENS fp8 rows of the cache to bfloat16 rows; exact, as a scale is a power of two."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    row = tl.load(context + token, mask=live, other=0).to(tl.int64) * 656
    group, channel, rotary = tl.arange(0, 4), tl.arange(0, 128), tl.arange(0, 64)
    at = group[None, :, None] * 128 + channel[None, None, :]
    value = tl.load(plane + row[:, None, None] + at, mask=live[:, None, None], other=0).to(tl.float8e4nv, bitcast=True)
    scale_at = (plane + 512 + row).to(tl.pointer_type(tl.float32))
    scale = tl.load(scale_at[:, None] + group[None, :], mask=live[:, None], other=0.0)
    target = kv + token.to(tl.int64) * 576
    latent = (value.to(tl.float32) * scale[:, :, None]).to(tl.bfloat16)
    tl.store(target[:, None, None] + at, latent, mask=live[:, None, None])
    rope_at = (plane + 528 + row).to(tl.pointer_type(tl.bfloat16))
    rope = tl.load(rope_at[:, None] + rotary[None, :], mask=live[:, None], other=0.0)
    tl.store(target[:, None] + 512 + rotary[None, :], rope, mask=live[:, None])


def sparse_mla_prefill(
    q: Tensor, plane: Tensor, context: Tensor, indices: Tensor, layout: CacheLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``seamount.kernels.sparse_mla.sparse_mla_prefill``; arguments are checked there."""
    num_rows, heads, _ = q.shape
    num_tokens = context.shape[0]
    fits = (layout.kv_lora_rank, layout.qk_rope_head_dim) == (512, 64)
    hopper = fits and torch.cuda.get_device_capability(q.device)[0] == 9
    is_fp8 = layout.name == "fp8"
    if not hopper or num_tokens == 0 or (is_fp8 and indices.numel() < 2 * num_tokens):
        return sparse_mla_decode(q, plane, _chosen_slots(context, indices), layout, scale)
    out = torch.empty((num_rows, heads, layout.kv_lora_rank), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty((num_rows, heads), dtype=torch.float32, device=q.device)
    if num_rows == 0 or heads == 0:
        return out.to(q.dtype), lse
    context = context.contiguous()
    kv = plane
    if is_fp8:
        kv = torch.empty((num_tokens, layout.latent_dim), dtype=torch.bfloat16, device=q.device)
        _unpack[(triton.cdiv(num_tokens, 16),)](plane, context, kv, num_tokens, TOKENS=16, num_warps=4)
    head_blocks = triton.cdiv(heads, 64)
    num_items = num_rows * head_blocks
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    _prefill[(min(num_items, num_sms),)](
        q.to(torch.bfloat16).contiguous(),
        kv.view(torch.bfloat16),
        context,
        indices.contiguous(),
        out,
        lse,
        num_items,
        indices.shape[1],
        heads,
        scale * _LOG2_E,
        head_blocks,
        PAGED=not is_fp8,
        RIGHT_REGISTERS=_RIGHT_REGISTERS,
        COPY_REGISTERS=_COPY_REGISTERS,
        num_warps=4,
    )
    return out.to(q.dtype), lse


def _chosen_slots(context: Tensor, indices: Tensor) -> Tensor:
    if context.shape[0] == 0:
        return indices.clamp(max=-1)
    return torch.where(indices < 0, -1, context[indices.clamp(min=0)])
