"""Sparse MLA decode on the GPU: paged latents gathered by index, split over the SMs, combined.

    s[h, j] = scale * q[h] . kv[i_j],   out[h] = sum_j 2^(s'[h, j] - m[h]) kv[i_j, :C] / l[h],   s' = s log2(e)
    lse[h] = (m[h] + log2 l[h]) ln 2;   partial results of splits p:  out = sum_p w_p out_p,  w = softmax_p(lse_p)

Tiles: a program holds 64 heads (fewer are padded) of one row and walks 64 tokens at a time over its split of the
row's slots. Splits are chosen so that the programs fill the SMs once, or in as few equal waves as possible.
Bytes: 656 (fp8) or 1,152 (bf16) a slot and 64 heads, read once from L2 or memory; 8 a slot number; q and out
2 (C + R) and 2 C a head; each split beyond the first adds 4 C a head written and read.
Work: 2 (2 C + R) flops a slot and head: 570 MFLOP for 2,048 slots and 128 heads, so a full batch is bound by the tensor
cores (34 clocks a slot and 64 heads), a single row by latency.

``_hopper`` (Gluon; the fp8 layout with C = 512, R = 64): eight warps. Raw bytes of the next tile travel to registers
while the current one is multiplied. e4m3 becomes bf16 by moving its seven bits into bf16's fields (that is the value
times 2^-120, subnormals included) and one multiplication by scale * 2^56, exact for the layout's power-of-two scales:
shared memory holds K * 2^-64, undone in the softmax scale and at the end, so that no scale overflows. A NaN travels in
the block's scale. K is staged once and read by both products; the output, 64 x 512 float32, stays in registers.
    tile t: softmax(S_t) | P_t V_t issued | K_t+1 stored, loads of t+2 issued | S_t+1 issued | wait for P V
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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

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
def _load_tile(words, scales, slots, tile, end, VALUES: gl.constexpr, ROPE: gl.constexpr):
    """64 slots as 32-bit words: e4m3 [64, 4, 32], scales [64, 4] float32, rotary part [64, 32]; zeros for none."""
    at = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, VALUES)))
    slot = gl.expand_dims(gl.load(slots + at, mask=at < end, other=-1).to(gl.int64), 1)
    group = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, VALUES))), 0)
    scale = gl.load(scales + (slot * 164 + 128 + group), mask=(slot >= 0) & (group >= 0), other=0.0)
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, VALUES)))
    offset = gl.expand_dims(gl.expand_dims(word, 0), 0) + gl.expand_dims(group, 2) * 32
    row = gl.expand_dims(slot, 2)
    value = gl.load(words + (row * 164 + offset), mask=(row >= 0) & (offset >= 0), other=0)
    at = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROPE))
    slot = gl.expand_dims(gl.load(slots + at, mask=at < end, other=-1).to(gl.int64), 1)
    column = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, ROPE)), 0)
    rope = gl.load(words + (slot * 164 + 132 + column), mask=(slot >= 0) & (column >= 0), other=0)
    return value, scale, rope


@gluon.jit
def _stage_tile(value, scale, rope, latent_tile, rope_tile):
    """Converts a tile and stores it for the tensor cores: latents times 2^-64, and the rotary part as it is."""
    pair = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $1;",
        "=r,f",
        [scale * 72057594037927936.0],  # 2^56
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    value, pair = gl.broadcast(value, gl.expand_dims(pair, 2))
    low, high = gl.inline_asm_elementwise(
        _E4M3_TO_BF16, "=&r,=&r,r,r", [value, pair], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    latent_tile.store(gl.reshape(gl.join(low, high), [64, 256]))
    rope_tile.store(rope)


@gluon.jit
def _hopper(
    q,
    words,
    scales,
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
    VALUES: gl.constexpr = gl.BlockedLayout([1, 4, 2], [2, 1, 16], [8, 1, 1], [2, 1, 0])
    ROPE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    QUERY_ROPE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], gl.bfloat16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    # The same bytes as words: pairs of bfloat16 are stored, single ones multiplied.
    WIDE_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.int32)
    NARROW_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], gl.int32)

    program = gl.program_id(0)
    split = program % SPLITS
    head_block = (program // SPLITS) % HEAD_BLOCKS
    row = (program // (SPLITS * HEAD_BLOCKS)).to(gl.int64)
    first_head = head_block * 64
    slots += row * num_slots
    first_tile = split * tiles_per_split
    end_tile = gl.minimum(first_tile + tiles_per_split, (num_slots + 63) // 64)

    value, scale, rope = _load_tile(words, scales, slots, first_tile, num_slots, VALUES, ROPE)

    q_latent = gl.allocate_shared_memory(gl.bfloat16, [64, 512], WIDE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], NARROW)
    k_latent_words = gl.allocate_shared_memory(gl.int32, [2, 64, 256], WIDE_WORDS)
    k_rope_words = gl.allocate_shared_memory(gl.int32, [2, 64, 32], NARROW_WORDS)
    k_latent = k_latent_words._reinterpret(gl.bfloat16, [2, 64, 512], WIDE)
    k_rope = k_rope_words._reinterpret(gl.bfloat16, [2, 64, 64], NARROW)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], NARROW)

    q += (row * num_heads + first_head) * 576
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, QUERY))
    column = gl.arange(0, 512, layout=gl.SliceLayout(0, QUERY))
    at = gl.expand_dims(head, 1) * 576 + gl.expand_dims(column, 0)
    q_latent.store(gl.load(q + at, mask=(gl.expand_dims(first_head + head, 1) < num_heads) & (at >= 0), other=0.0))
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, QUERY_ROPE))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, QUERY_ROPE))
    at = gl.expand_dims(head, 1) * 576 + 512 + gl.expand_dims(column, 0)
    query = gl.load(q + at, mask=(gl.expand_dims(first_head + head, 1) < num_heads) & (at >= 0), other=0.0)
    q_rope.store((query.to(gl.float32) * 5.421010862427522e-20).to(gl.bfloat16))  # 2^-64

    _stage_tile(value, scale, rope, k_latent_words.index(0), k_rope_words.index(0))
    value, scale, rope = _load_tile(words, scales, slots, first_tile + 1, num_slots, VALUES, ROPE)
    fence_async_shared()
    gl.thread_barrier()
    zeros = gl.zeros([64, 64], gl.float32, SCORES)
    scores = warpgroup_mma(q_rope, k_rope.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_latent, k_latent.index(0).permute((1, 0)), scores, is_async=True)

    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, 512], gl.float32, OUTPUT)
    for tile in range(first_tile, end_tile):
        buffer = (tile - first_tile) % 2
        token = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
        valid = gl.load(slots + token, mask=token < num_slots, other=-1) >= 0
        s = warpgroup_mma_wait(0, [scores])
        s = gl.where(gl.expand_dims(valid, 0), s * qk_scale, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, axis=1))
        safe_top = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s - gl.expand_dims(safe_top, 1))
        keep = gl.exp2(top - safe_top)
        top = new_top
        total = total * keep + gl.sum(p, axis=1)
        acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, OUTPUT)), 1)
        p_tile.store(p.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        product = warpgroup_mma(p_tile, k_latent.index(buffer), acc, is_async=True)
        # The other buffer's readers, the products of tile - 1, are done. Past the last tile these are zeros.
        _stage_tile(value, scale, rope, k_latent_words.index(1 - buffer), k_rope_words.index(1 - buffer))
        value, scale, rope = _load_tile(
            words, scales, slots, tile + 2, gl.minimum(num_slots, end_tile * 64), VALUES, ROPE
        )
        fence_async_shared()
        gl.thread_barrier()
        scores = warpgroup_mma(q_rope, k_rope.index(1 - buffer).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_latent, k_latent.index(1 - buffer).permute((1, 0)), scores, is_async=True)
        acc = warpgroup_mma_wait(2, [product])
    warpgroup_mma_wait(0, [scores])

    empty = total == 0.0
    norm = gl.where(empty, 0.0, out_scale / gl.where(empty, 1.0, total))
    acc = acc * gl.expand_dims(gl.convert_layout(norm, gl.SliceLayout(1, OUTPUT)), 1)
    # Split results keep lse in log2, -inf for none; a whole row's is natural, +inf for none.
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    row_lse = top + gl.log2(gl.where(empty, 1.0, total))
    if SPLITS == 1:
        row_lse = gl.where(empty, float("inf"), row_lse * 0.6931471805599453)
    result = (row * SPLITS + split) * num_heads
    gl.store(lse + result + head, row_lse, mask=head < num_heads)
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
    column = gl.arange(0, 512, layout=gl.SliceLayout(0, OUTPUT))
    at = (result + gl.expand_dims(head, 1)) * 512 + gl.expand_dims(column, 0)
    mask = (gl.expand_dims(head, 1) < num_heads) & (gl.expand_dims(column, 0) >= 0)
    gl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


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
            plane.view(torch.float32),
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
