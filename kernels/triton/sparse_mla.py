"""Sparse MLA decode on the GPU: paged latents gathered by index, split over the SMs, combined.

    s[h, j] = scale * q[h] . kv[i_j],   out[h] = sum_j 2^(s'[h, j] - m[h]) kv[i_j, :C] / l[h],   s' = s log2(e)
    lse[h] = (m[h] + log2 l[h]) ln 2;   partial results of splits p:  out = sum_p w_p out_p,  w = softmax_p(lse_p)

Tiles: a program holds 64 heads (fewer are padded) of one row and walks 64 tokens at a time over its split of the
row's slots. Splits are chosen so that the programs fill the SMs once, or in as few equal waves as possible.
Bytes: 656 (fp8) or 1,152 (bf16) a slot and 64 heads, read once from L2 or memory; 8 a slot number; q and out
2 (C + R) and 2 C a head; each split beyond the first adds 4 C a head written and read.
Work: 2 (2 C + R) flops a slot and head: 570 MFLOP for 2,048 slots and 128 heads, so a full batch is bound by the tensor
cores (34 clocks a slot and 64 heads), a single row by latency.

``_hopper`` (Gluon; the fp8 layout with C = 512, R = 64): four warps fetch and convert, eight multiply; two tiles in
shared memory go round between them. e4m3 becomes bf16 by moving its seven bits into bf16's fields (that is the value
times 2^-120, subnormals included) and one multiplication by scale * 2^56, exact for the layout's power-of-two scales:
shared memory holds K * 2^-64, undone in the softmax scale and at the end, so that no scale overflows. A NaN travels in
the block's scale. K is staged once and read by both products; the output, 64 x 512 float32, stays in registers.
    four warps:  fetch t+1 to registers | wait until t-1 is read | convert and store t+1 as t-1's successor
    eight warps: softmax(S_t) | P_t V_t issued | S_t+1 issued | wait for P_t V_t | release t
``_general`` (Triton; any C, R, both layouts): the same maths without that overlap.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from seamount.kernels.layout import CacheLayout

_TOKENS = 64
_HEADS = 64
_LOG2_E = 1.4426950408889634
_K_BIAS = 2.0**64

# Four e4m3 in one register to two pairs of bfloat16, times the pair in $3.
_E4M3_TO_BF16 = tl.constexpr("""
{
.reg .b32 x, t;
prmt.b32 x, $2, 0, 0x1404;
shr.u32 t, x, 4;
and.b32 t, t, 0x07f007f0;
lop3.b32 t, x, 0x80008000, t, 0xea;
mul.rn.bf16x2 $0, t, $3;
prmt.b32 x, $2, 0, 0x3424;
shr.u32 t, x, 4;
and.b32 t, t, 0x07f007f0;
lop3.b32 t, x, 0x80008000, t, 0xea;
mul.rn.bf16x2 $1, t, $3;
}
""")


@gluon.jit
def _load_slots(slots, tile, end, layout: gl.constexpr):
    """The slots of a tile, -1 for none: [64] int32."""
    at = tile * 64 + gl.arange(0, 64, layout=layout)
    return gl.load(slots + at, mask=at < end, other=-1).to(gl.int32)


@gluon.jit
def _load_columns(words, slot, first, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """32-bit words [first, first + COLUMNS) of each slot, zeros for none."""
    row = gl.expand_dims(slot.to(gl.int64), 1)
    column = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    return gl.load(words + (row * 164 + first + column), mask=(row >= 0) & (column >= 0), other=0)


@gluon.jit
def _stage_group(value, shared_factors, latent_tile, GROUP: gl.constexpr, VALUES: gl.constexpr):
    """Converts 128 channels [64, 32 words] and stores them for the tensor cores, times scale and 2^-64."""
    factor = gl.expand_dims(shared_factors.index(GROUP).load(gl.SliceLayout(1, VALUES)), 1)
    value, factor = gl.broadcast(value, factor)
    low, high = gl.inline_asm_elementwise(
        _E4M3_TO_BF16, "=&r,=&r,r,r", [value, factor], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )
    latent_tile.slice(GROUP * 64, 64, dim=1).store(gl.reshape(gl.join(low, high), [64, 64]))


@gluon.jit
def _produce(words, slots, first_tile, num_tiles, end, k_latent, k_rope, bias, full, empty):
    """Four warps: fill the two buffers in turn, each as soon as its readers are done.

    A tile's bytes wait in registers: 64 words of e4m3 a thread, 16 of the rotary part, two scales. The scales go
    through shared memory to the threads that need them. No register to spare: what spills, spills to L2, because shared
    memory takes the L1's place.
    """
    VALUES: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
    ROPE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1, 2], [16, 2], [4, 1], [1, 0])
    VALUE_SLOT: gl.constexpr = gl.SliceLayout(1, VALUES)
    ROPE_SLOT: gl.constexpr = gl.SliceLayout(1, ROPE)
    SCALE_SLOT: gl.constexpr = gl.SliceLayout(1, SCALES)
    shared_factors = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    factor_columns = shared_factors._reinterpret(gl.int32, [64, 4], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    value_slot = _load_slots(slots, first_tile, end, VALUE_SLOT)
    rope_slot = _load_slots(slots, first_tile, end, ROPE_SLOT)
    scale_slot = _load_slots(slots, first_tile, end, SCALE_SLOT)
    for step in range(num_tiles):
        scale = _load_columns(words, scale_slot, 128, 4, SCALES)
        value_0 = _load_columns(words, value_slot, 0, 32, VALUES)
        value_1 = _load_columns(words, value_slot, 32, 32, VALUES)
        value_2 = _load_columns(words, value_slot, 64, 32, VALUES)
        value_3 = _load_columns(words, value_slot, 96, 32, VALUES)
        rope = _load_columns(words, rope_slot, 132, 32, ROPE)
        invalid = gl.where(scale_slot >= 0, 0.0, float("-inf"))
        value_slot = _load_slots(slots, first_tile + step + 1, end, VALUE_SLOT)
        rope_slot = _load_slots(slots, first_tile + step + 1, end, ROPE_SLOT)
        scale_slot = _load_slots(slots, first_tile + step + 1, end, SCALE_SLOT)
        # Pairs of bfloat16 scale * 2^56.
        factor = gl.inline_asm_elementwise(
            "{ .reg .f32 x; mul.f32 x, $1, 0f5B800000; cvt.rn.bf16x2.f32 $0, x, x; }",
            "=r,r",
            [scale],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
        factor_columns.store(factor)
        buffer = step % 2
        mbarrier.wait(empty.index(buffer), (step // 2 & 1) ^ 1)
        _stage_group(value_0, shared_factors, k_latent.index(buffer), 0, VALUES)
        _stage_group(value_1, shared_factors, k_latent.index(buffer), 1, VALUES)
        _stage_group(value_2, shared_factors, k_latent.index(buffer), 2, VALUES)
        _stage_group(value_3, shared_factors, k_latent.index(buffer), 3, VALUES)
        k_rope.index(buffer).store(rope)
        bias.index(buffer).store(invalid)
        # The fence also waits for loads in flight: the next tile's start behind it.
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(full.index(buffer), count=1)


@gluon.jit
def _attend(
    q,
    out,
    lse,
    num_tiles,
    num_heads,
    first_head,
    result,
    qk_scale,
    out_scale,
    k_latent_words,
    k_rope_words,
    bias,
    full,
    empty,
    SPLITS: gl.constexpr,
):
    """Eight warps: products and softmax. q: the first head's query; result: the row in out of head 0."""
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    QUERY_ROPE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], gl.bfloat16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    k_latent = k_latent_words._reinterpret(gl.bfloat16, [2, 64, 512], WIDE)
    k_rope = k_rope_words._reinterpret(gl.bfloat16, [2, 64, 64], NARROW)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [64, 512], WIDE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], NARROW)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], NARROW)

    head = gl.arange(0, 64, layout=gl.SliceLayout(1, QUERY))
    column = gl.arange(0, 512, layout=gl.SliceLayout(0, QUERY))
    at = gl.expand_dims(head, 1) * 576 + gl.expand_dims(column, 0)
    q_latent.store(gl.load(q + at, mask=(gl.expand_dims(first_head + head, 1) < num_heads) & (at >= 0), other=0.0))
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, QUERY_ROPE))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, QUERY_ROPE))
    at = gl.expand_dims(head, 1) * 576 + 512 + gl.expand_dims(column, 0)
    query = gl.load(q + at, mask=(gl.expand_dims(first_head + head, 1) < num_heads) & (at >= 0), other=0.0)
    q_rope.store((query.to(gl.float32) * 5.421010862427522e-20).to(gl.bfloat16))  # 2^-64
    fence_async_shared()
    gl.thread_barrier()

    zeros = gl.zeros([64, 64], gl.float32, SCORES)
    mbarrier.wait(full.index(0), 0)
    scores = warpgroup_mma(q_rope, k_rope.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_latent, k_latent.index(0).permute((1, 0)), scores, is_async=True)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, 512], gl.float32, OUTPUT)
    for step in range(num_tiles):
        buffer = step % 2
        unseen = bias.index(buffer).load(gl.SliceLayout(0, SCORES))
        s = warpgroup_mma_wait(0, [scores])
        s = s * qk_scale + gl.expand_dims(unseen, 0)
        new_top = gl.maximum(top, gl.max(s, axis=1))
        safe_top = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s - gl.expand_dims(safe_top, 1))
        p_tile.store(p.to(gl.bfloat16))
        keep = gl.exp2(top - safe_top)
        top = new_top
        total = total * keep + gl.sum(p, axis=1)
        acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, OUTPUT)), 1)
        fence_async_shared()
        gl.thread_barrier()
        product = warpgroup_mma(p_tile, k_latent.index(buffer), acc, is_async=True)
        # Behind the last tile: the same buffer again, its scores unused, rather than a branch around the product.
        ahead = gl.minimum(step + 1, num_tiles - 1)
        mbarrier.wait(full.index(ahead % 2), ahead // 2 & 1)
        scores = warpgroup_mma(q_rope, k_rope.index(ahead % 2).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_latent, k_latent.index(ahead % 2).permute((1, 0)), scores, is_async=True)
        acc = warpgroup_mma_wait(2, [product])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
    warpgroup_mma_wait(0, [scores])

    is_empty = total == 0.0
    norm = gl.where(is_empty, 0.0, out_scale / gl.where(is_empty, 1.0, total))
    acc = acc * gl.expand_dims(gl.convert_layout(norm, gl.SliceLayout(1, OUTPUT)), 1)
    # Split results keep lse in log2, -inf for none; a whole row's is natural, +inf for none.
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    row_lse = top + gl.log2(gl.where(is_empty, 1.0, total))
    if SPLITS == 1:
        row_lse = gl.where(is_empty, float("inf"), row_lse * 0.6931471805599453)
    gl.store(lse + result + head, row_lse, mask=head < num_heads)
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
    column = gl.arange(0, 512, layout=gl.SliceLayout(0, OUTPUT))
    at = (result + gl.expand_dims(head, 1)) * 512 + gl.expand_dims(column, 0)
    mask = (gl.expand_dims(head, 1) < num_heads) & (gl.expand_dims(column, 0) >= 0)
    gl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _hopper(
    q,
    words,
    slots,
    out,
    lse,
    num_slots,
    num_heads,
    tiles_per_split,
    qk_scale,
    out_scale,
    SPLITS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
):
    program = gl.program_id(0)
    split = program % SPLITS
    row = (program // (SPLITS * HEAD_BLOCKS)).to(gl.int64)
    first_head = (program // SPLITS) % HEAD_BLOCKS * 64
    slots += row * num_slots
    first_tile = split * tiles_per_split
    end_tile = gl.minimum(first_tile + tiles_per_split, (num_slots + 63) // 64)
    # At least one tile, empty if need be: the result of a split without slots is written too.
    num_tiles = gl.maximum(end_tile - first_tile, 1)
    end = gl.minimum(num_slots, end_tile * 64)
    # Pairs of bfloat16 as words; read as single ones.
    WIDE_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.int32)
    NARROW_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], gl.int32)
    k_latent = gl.allocate_shared_memory(gl.int32, [2, 64, 256], WIDE_WORDS)
    k_rope = gl.allocate_shared_memory(gl.int32, [2, 64, 32], NARROW_WORDS)
    # 0 for a token, -inf for none.
    bias = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    q += (row * num_heads + first_head) * 576
    result = (row * SPLITS + split) * num_heads
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q,
                    out,
                    lse,
                    num_tiles,
                    num_heads,
                    first_head,
                    result,
                    qk_scale,
                    out_scale,
                    k_latent,
                    k_rope,
                    bias,
                    full,
                    empty,
                    SPLITS,
                ),
            ),
            (_produce, (words, slots, first_tile, num_tiles, end, k_latent, k_rope, bias, full, empty)),
        ],
        [4],
        [136],
    )


@triton.jit
def _general(
    q,
    plane,
    slots,
    out,
    lse,
    num_slots,
    num_heads,
    tiles_per_split,
    qk_scale,
    SPLITS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % SPLITS
    row = (program // (SPLITS * HEAD_BLOCKS)).to(tl.int64)
    head = (program // SPLITS) % HEAD_BLOCKS * HEADS + tl.arange(0, HEADS)
    slots += row * num_slots
    channel = tl.arange(0, BLOCK_RANK)
    rotary = tl.arange(0, BLOCK_ROPE)
    q_row = q + (row * num_heads + head[:, None]) * (RANK + ROPE)
    live = head[:, None] < num_heads
    q_latent = tl.load(q_row + channel[None, :], mask=live & (channel < RANK)[None, :], other=0.0)
    q_rope = tl.load(q_row + RANK + rotary[None, :], mask=live & (rotary < ROPE)[None, :], other=0.0)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK_RANK), tl.float32)
    first_tile = split * tiles_per_split
    end = tl.minimum((first_tile + tiles_per_split) * TOKENS, num_slots)
    for start in range(first_tile * TOKENS, end, TOKENS):
        at = start + tl.arange(0, TOKENS)
        slot = tl.load(slots + at, mask=at < end, other=-1).to(tl.int64)
        valid = slot >= 0
        latent_mask = valid[:, None] & (channel < RANK)[None, :]
        rope_mask = valid[:, None] & (rotary < ROPE)[None, :]
        if FP8:
            token = plane + slot[:, None] * (RANK + RANK // 32 + 2 * ROPE)
            raw = tl.load(token + channel[None, :], mask=latent_mask, other=0).to(tl.float8e4nv, bitcast=True)
            scale_at = (token + RANK).to(tl.pointer_type(tl.float32)) + (channel // 128)[None, :]
            scale = tl.load(scale_at, mask=latent_mask, other=0.0)
            k_latent = (raw.to(tl.float32) * scale).to(tl.bfloat16)
            rope_at = (token + RANK + RANK // 32).to(tl.pointer_type(tl.bfloat16)) + rotary[None, :]
            k_rope = tl.load(rope_at, mask=rope_mask, other=0.0)
        else:
            token = plane.to(tl.pointer_type(tl.bfloat16)) + slot[:, None] * (RANK + ROPE)
            k_latent = tl.load(token + channel[None, :], mask=latent_mask, other=0.0)
            k_rope = tl.load(token + RANK + rotary[None, :], mask=rope_mask, other=0.0)
        s = tl.dot(q_rope, k_rope.T)
        s = tl.dot(q_latent, k_latent.T, s)
        s = tl.where(valid[None, :], s * qk_scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe_top[:, None])
        keep = tl.exp2(top - safe_top)
        top = new_top
        total = total * keep + tl.sum(p, axis=1)
        acc = tl.dot(p.to(tl.bfloat16), k_latent, acc * keep[:, None])
    empty = total == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))[:, None]
    row_lse = top + tl.log2(tl.where(empty, 1.0, total))
    if SPLITS == 1:
        row_lse = tl.where(empty, float("inf"), row_lse * 0.6931471805599453)
    result = (row * SPLITS + split) * num_heads + head
    tl.store(lse + result, row_lse, mask=head < num_heads)
    out_at = out + result[:, None] * RANK + channel[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=live & (channel < RANK)[None, :])


@triton.jit
def _combine(parts, part_lse, out, lse, num_heads, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, SPLITS: tl.constexpr):
    """One program a row and head: the splits' outputs, weighted by their shares of the denominator, in split order."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = row * SPLITS * num_heads + head
    split = tl.arange(0, SPLITS)
    parts_lse = tl.load(part_lse + first + split * num_heads)
    top = tl.max(parts_lse, axis=0)
    empty = top == float("-inf")
    weights = tl.exp2(parts_lse - tl.where(empty, 0.0, top))
    total = tl.sum(weights, axis=0)
    weights = weights / tl.where(empty, 1.0, total)
    channel = tl.arange(0, BLOCK_RANK)
    at = (first + split * num_heads)[:, None] * RANK + channel[None, :]
    parts_out = tl.load(parts + at, mask=(channel < RANK)[None, :] & (split >= 0)[:, None], other=0.0)
    result = row * num_heads + head
    combined = tl.sum(parts_out * weights[:, None], axis=0)
    tl.store(out + result * RANK + channel, combined.to(out.dtype.element_ty), mask=channel < RANK)
    tl.store(lse + result, tl.where(empty, float("inf"), (top + tl.log2(total)) * 0.6931471805599453))


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _choose_splits(num_programs: int, num_tiles: int, num_sms: int) -> int:
    """The power of two that ends soonest, in tiles: waves of programs, three tiles to begin each, five to combine."""

    def cost(splits: int) -> float:
        waves = -(-num_programs * splits // num_sms)
        return waves * (-(-num_tiles // splits) + 3) + (5 + num_programs * splits / 64 if splits > 1 else 0)

    options = [1 << i for i in range(7) if 1 << i <= max(1, num_tiles)]
    return min(options, key=lambda splits: (cost(splits), splits))


def sparse_mla_decode(
    q: Tensor, plane: Tensor, slots: Tensor, layout: CacheLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``seamount.kernels.sparse_mla.sparse_mla_decode``; arguments are checked there."""
    batch, heads, _ = q.shape
    num_slots = slots.shape[1]
    rank, rope = layout.kv_lora_rank, layout.qk_rope_head_dim
    out = torch.empty((batch, heads, rank), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    if batch == 0 or heads == 0:
        return out, lse
    query, slots = q.to(torch.bfloat16).contiguous(), slots.contiguous()
    hopper = layout.name == "fp8" and (rank, rope) == (512, 64) and torch.cuda.get_device_capability(q.device)[0] == 9
    head_block = _HEADS if hopper else (16 if heads <= 16 else 32 if heads <= 32 else _HEADS)
    tokens = _TOKENS if hopper else 32
    head_blocks = triton.cdiv(heads, head_block)
    num_tiles = triton.cdiv(num_slots, tokens)
    splits = _choose_splits(batch * head_blocks, num_tiles, _num_sms(q.device))
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((batch, splits, heads, rank), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((batch, splits, heads), dtype=torch.float32, device=q.device)
    grid = (batch * head_blocks * splits,)
    tiles_per_split = triton.cdiv(num_tiles, splits)
    if hopper:
        _hopper[grid](
            query,
            plane.view(torch.int32),
            slots,
            parts,
            part_lse,
            num_slots,
            heads,
            tiles_per_split,
            scale * _LOG2_E * _K_BIAS,
            _K_BIAS,
            SPLITS=splits,
            HEAD_BLOCKS=head_blocks,
            num_warps=8,
        )
    else:
        _general[grid](
            query,
            plane,
            slots,
            parts,
            part_lse,
            num_slots,
            heads,
            tiles_per_split,
            scale * _LOG2_E,
            SPLITS=splits,
            HEAD_BLOCKS=head_blocks,
            RANK=rank,
            ROPE=rope,
            FP8=layout.name == "fp8",
            HEADS=head_block,
            TOKENS=tokens,
            BLOCK_RANK=max(16, triton.next_power_of_2(rank)),
            BLOCK_ROPE=max(16, triton.next_power_of_2(rope)),
            num_warps=8 if head_block == _HEADS else 4,
            num_stages=1,
        )
    if splits > 1:
        _combine[(batch, heads)](
            parts,
            part_lse,
            out,
            lse,
            heads,
            RANK=rank,
            BLOCK_RANK=triton.next_power_of_2(rank),
            SPLITS=splits,
            num_warps=4,
        )
    return out, lse
