"""Sparse MLA decode on Hopper, in Gluon: the fp8 layout with C = 512 and R = 64. The formula stands in ``sparse_mla``.

Tiles: 64 heads by 64 tokens, K [64, 512 + 64] staged once in shared memory and read by both products. Twelve warps:
    four fetch:  wait until t - 1 is read | convert and store t + 1 as its successor, each quarter's registers refilled
                 with t + 2's as soon as they are free
    four left:   scores(t) issued, P V of columns 0..255 (t - 1) behind them | softmax(t) | release t - 1 | share P(t)
    four right:  wait for P(t) | P V of columns 256..511 (t) | release t
Each half of the output, 64 x 256 float32, stays in its warpgroup's registers; P and the factors of what was summed
before go from left to right through shared memory.
Work a tile: 2,176 clocks of the tensor cores; 227 KB read from shared memory for them, 74 KB written.
Bytes a tile: 42 KB, 656 a token; how they are fetched stands in ``sparse_mla_fetch``.

Latents and P are float16: latents must stay below its largest value, 65,504; those of an RMS norm are at most
sqrt(512) of its weight. Queries may be of any size: a head's are brought into range by a power of two, which its
softmax scale undoes. The rotary part is bfloat16.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.triton.mla_softmax import add_product, rescale, share, share_norm, softmax
from seamount.kernels.triton.sparse_mla_fetch import fetch

# Registers of a thread: 168 on average; the left half's warps get what these two leave, 208. A partition that needs
# more than it asks for makes ptxas ignore all of these and wait for each product by itself.
_RIGHT_REGISTERS = 160
_FETCH_REGISTERS = 136


@gluon.jit
def _stage_query(q, first_head, num_heads, q_left, q_right, q_rope, factors, FIRST: gl.constexpr):
    """32 heads' queries to shared memory, times a power of two, at most 1, whose inverse goes to ``factors``."""
    LATENT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    ROPE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head = FIRST + gl.arange(0, 32, layout=gl.SliceLayout(1, LATENT))
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, LATENT))
    at = gl.expand_dims(head, 1) * 576 + gl.expand_dims(column, 0)
    live = (gl.expand_dims(first_head + head, 1) < num_heads) & (at >= 0)
    left = gl.load(q + at, mask=live, other=0.0).to(gl.float32)
    right = gl.load(q + at + 256, mask=live, other=0.0).to(gl.float32)
    head = FIRST + gl.arange(0, 32, layout=gl.SliceLayout(1, ROPE))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, ROPE))
    at = gl.expand_dims(head, 1) * 576 + 512 + gl.expand_dims(column, 0)
    rope = gl.load(q + at, mask=(gl.expand_dims(first_head + head, 1) < num_heads) & (at >= 0), other=0.0)
    biggest = gl.max(gl.maximum(gl.maximum(left, -left), gl.maximum(right, -right)), axis=1)
    # Exponents, biased by 127, of the biggest channel and of the factor that brings it below 2^15.
    shrink = gl.minimum(268 - (biggest.to(gl.int32, bitcast=True) >> 23), 127)
    factor = (shrink << 23).to(gl.float32, bitcast=True)
    q_left.slice(FIRST, 32, dim=0).store((left * gl.expand_dims(factor, 1)).to(gl.float16))
    q_right.slice(FIRST, 32, dim=0).store((right * gl.expand_dims(factor, 1)).to(gl.float16))
    factors.slice(FIRST, 32, dim=0).store(((254 - shrink) << 23).to(gl.float32, bitcast=True))
    factor = gl.convert_layout(factor, gl.SliceLayout(1, ROPE))
    q_rope.slice(FIRST, 32, dim=0).store((rope.to(gl.float32) * gl.expand_dims(factor, 1)).to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _issue_scores(q_left, q_right, q_rope, k_latent, k_rope, full, tile, zeros):
    """Three products, as soon as the tile is there."""
    buffer = tile % 2
    mbarrier.wait(full.index(buffer), tile // 2 & 1)
    fence_async_shared()
    k_left = k_latent.index(buffer).slice(0, 256, dim=1)
    k_right = k_latent.index(buffer).slice(256, 256, dim=1)
    scores = warpgroup_mma(q_rope, k_rope.index(buffer).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_left, k_left.permute((1, 0)), scores, is_async=True)
    return warpgroup_mma(q_right, k_right.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _store(acc, out, result, first_head, num_heads, FIRST: gl.constexpr, OUTPUT: gl.constexpr, staged):
    """acc [64, 256] to rows ``result + head`` of out. Two-byte results go by way of a half of Q that nobody reads any
    more, so that a warp writes 512 bytes in a row: parts of a 32-byte sector are slow to write."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    STAGED: gl.constexpr = out.dtype.element_ty.primitive_bitwidth == 16
    LAYOUT: gl.constexpr = ROWS if STAGED else OUTPUT
    value = acc.to(out.dtype.element_ty)
    if STAGED:
        HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.float16)
        staged = staged._reinterpret(out.dtype.element_ty, [64, 256], HALF)
        staged.store(value)
        gl.thread_barrier()
        value = staged.load(ROWS)
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    column = FIRST + gl.arange(0, 256, layout=gl.SliceLayout(0, LAYOUT))
    at = (result + gl.expand_dims(head, 1)) * 512 + gl.expand_dims(column, 0)
    gl.store(out + at, value, mask=(gl.expand_dims(head, 1) < num_heads) & (gl.expand_dims(column, 0) >= 0))


@gluon.jit
def _attend_left(
    q,
    out,
    lse,
    num_tiles,
    num_heads,
    first_head,
    result,
    qk_scale,
    q_left,
    q_right,
    q_rope,
    k_latent_words,
    k_rope_words,
    bias,
    p_tile,
    keeps,
    full,
    empty,
    p_full,
    p_empty,
    q_full,
    SINGLE: gl.constexpr,
):
    """Four warps: scores, softmax, lse, and columns 0..255 of the output. While the product with V of one tile runs,
    they see to the next one's softmax."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    TOKEN: gl.constexpr = gl.SliceLayout(0, SCORES)
    HEAD: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_HEAD: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], gl.float16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    k_latent = k_latent_words._reinterpret(gl.float16, [2, 64, 512], WIDE)
    k_rope = k_rope_words._reinterpret(gl.bfloat16, [2, 64, 64], NARROW)
    _stage_query(q, first_head, num_heads, q_left, q_right, q_rope, keeps, 0)
    mbarrier.wait(q_full, 0)
    row_scale = gl.expand_dims(keeps.load(HEAD) * qk_scale, 1)
    gl.thread_barrier()

    zeros = gl.zeros([64, 64], gl.float32, SCORES)
    top = gl.full([64], float("-inf"), gl.float32, HEAD)
    total = gl.zeros([64], gl.float32, HEAD)
    acc = gl.zeros([64, 256], gl.float32, OUTPUT)
    scores = _issue_scores(q_left, q_right, q_rope, k_latent, k_rope, full, 0, zeros)
    scores = warpgroup_mma_wait(0, [scores])
    p, keep, top = softmax(scores, row_scale, bias.index(0).load(TOKEN), top)
    total = total * keep + gl.sum(p, axis=1)
    share(p, keep, p_tile, keeps, p_full, p_empty, 0)
    for tile in range(1, num_tiles):
        before = (tile - 1) % 2
        scores = _issue_scores(q_left, q_right, q_rope, k_latent, k_rope, full, tile, zeros)
        product = warpgroup_mma(p_tile, k_latent.index(before).slice(0, 256, dim=1), acc, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        p, keep, top = softmax(scores, row_scale, bias.index(tile % 2).load(TOKEN), top)
        total = total * keep + gl.sum(p, axis=1)
        acc = warpgroup_mma_wait(0, [product])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(before), count=1)
        share(p, keep, p_tile, keeps, p_full, p_empty, tile)
        acc = acc * gl.expand_dims(gl.convert_layout(keep, OUTPUT_HEAD), 1)
    k_left = k_latent.index((num_tiles - 1) % 2).slice(0, 256, dim=1)
    product = warpgroup_mma(p_tile, k_left, acc, is_async=True)

    is_empty, norm = share_norm(total, keeps, p_full, p_empty, num_tiles - 1)
    # Split results keep lse in log2, -inf for none; a whole row's is natural, +inf for none.
    head = first_head + gl.arange(0, 64, layout=HEAD)
    row_lse = top + gl.log2(gl.where(is_empty, 1.0, total))
    if SINGLE:
        row_lse = gl.where(is_empty, float("inf"), row_lse * 0.6931471805599453)
    gl.store(lse + result + head, row_lse, mask=head < num_heads)
    acc = warpgroup_mma_wait(0, [product])
    acc = acc * gl.expand_dims(gl.convert_layout(norm, OUTPUT_HEAD), 1)
    _store(acc, out, result, first_head, num_heads, 0, OUTPUT, q_left)


@gluon.jit
def _attend_right(
    q,
    out,
    num_tiles,
    num_heads,
    first_head,
    result,
    q_left,
    q_right,
    q_rope,
    k_latent_words,
    p_tile,
    keeps,
    empty,
    p_full,
    p_empty,
    q_full,
):
    """Four warps: columns 256..511 of the output; half of the queries' staging before."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], gl.float16)
    k_latent = k_latent_words._reinterpret(gl.float16, [2, 64, 512], WIDE)
    gdc_wait()
    _stage_query(q, first_head, num_heads, q_left, q_right, q_rope, keeps, 32)
    mbarrier.arrive(q_full, count=1)
    acc = gl.zeros([64, 256], gl.float32, OUTPUT)
    for tile in range(num_tiles):
        buffer = tile % 2
        mbarrier.wait(p_full, tile & 1)
        fence_async_shared()
        acc = rescale(acc, keeps)
        acc = add_product(acc, p_tile, k_latent.index(buffer).slice(256, 256, dim=1), p_empty)
        mbarrier.arrive(empty.index(buffer), count=1)
    mbarrier.wait(p_full, num_tiles & 1)
    acc = rescale(acc, keeps)
    _store(acc, out, result, first_head, num_heads, 256, OUTPUT, q_right)


@gluon.jit(do_not_specialize=["splits", "head_blocks", "tiles_per_split"])
def _attend(
    q,
    words,
    slots,
    out,
    lse,
    num_slots,
    num_heads,
    splits,
    head_blocks,
    tiles_per_split,
    qk_scale,
    SINGLE: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr,
):
    # Launched before the kernel ahead in the stream has ended, and ready for the next one to do the same.
    gdc_wait()
    gdc_launch_dependents()
    program = gl.program_id(0)
    split = program % splits
    row = (program // (splits * head_blocks)).to(gl.int64)
    first_head = (program // splits) % head_blocks * 64
    slots += row * num_slots
    first_tile = split * tiles_per_split
    end_tile = gl.minimum(first_tile + tiles_per_split, (num_slots + 63) // 64)
    # At least one tile, empty if need be: the result of a split without slots is written too.
    num_tiles = gl.maximum(end_tile - first_tile, 1)
    end = gl.minimum(num_slots, end_tile * 64)
    # Pairs of 16-bit values as words; read as single ones.
    WIDE_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.int32)
    NARROW_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], gl.int32)
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.float16)
    SMALL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_latent = gl.allocate_shared_memory(gl.int32, [2, 64, 256], WIDE_WORDS)
    k_rope = gl.allocate_shared_memory(gl.int32, [2, 64, 32], NARROW_WORDS)
    q_left = gl.allocate_shared_memory(gl.float16, [64, 256], HALF)
    q_right = gl.allocate_shared_memory(gl.float16, [64, 256], HALF)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SMALL)
    p_tile = gl.allocate_shared_memory(gl.float16, [64, 64], SMALL)
    # First what the queries were shrunk by, then the factors of what was summed before a tile, last the norm.
    keeps = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    # 0 for a token, -inf for none.
    bias = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=2)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    mbarrier.init(q_full, count=1)
    q += (row * num_heads + first_head) * 576
    result = (row * splits + split) * num_heads
    gl.warp_specialize(
        [
            (
                _attend_left,
                (
                    q,
                    out,
                    lse,
                    num_tiles,
                    num_heads,
                    first_head,
                    result,
                    qk_scale,
                    q_left,
                    q_right,
                    q_rope,
                    k_latent,
                    k_rope,
                    bias,
                    p_tile,
                    keeps,
                    full,
                    empty,
                    p_full,
                    p_empty,
                    q_full,
                    SINGLE,
                ),
            ),
            (
                _attend_right,
                (
                    q,
                    out,
                    num_tiles,
                    num_heads,
                    first_head,
                    result,
                    q_left,
                    q_right,
                    q_rope,
                    k_latent,
                    p_tile,
                    keeps,
                    empty,
                    p_full,
                    p_empty,
                    q_full,
                ),
            ),
            (fetch, (words, slots, first_tile, num_tiles, end, k_latent, k_rope, bias, full, empty)),
        ],
        [4, 4],
        [RIGHT_REGISTERS, FETCH_REGISTERS],
    )


def launch(
    query: Tensor,
    plane: Tensor,
    slots: Tensor,
    out: Tensor,
    lse: Tensor,
    splits: int,
    tiles_per_split: int,
    scale_log2: float,
) -> None:
    """One program a split, block of 64 heads and row. out: [B, (splits,) H, 512]; lse: [B, (splits,) H] float32."""
    batch, heads, _ = query.shape
    head_blocks = triton.cdiv(heads, 64)
    _attend[(batch * head_blocks * splits,)](
        query,
        plane.view(torch.int32),
        slots,
        out,
        lse,
        slots.shape[1],
        heads,
        splits,
        head_blocks,
        tiles_per_split,
        scale_log2,
        SINGLE=splits == 1,
        RIGHT_REGISTERS=_RIGHT_REGISTERS,
        FETCH_REGISTERS=_FETCH_REGISTERS,
        num_warps=4,
        launch_pdl=True,
    )
