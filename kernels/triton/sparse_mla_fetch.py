"""Fetching for sparse MLA decode on Hopper: tokens of the fp8 layout, at random addresses, to float16 in shared memory.

A tile is 64 tokens, 42 KB: 656 bytes each. A warp's load takes 256 bytes of two tokens, the next one the 256 beside
them: smaller pieces of more tokens at a time are slower. The bytes wait in registers, 82 of a thread.

e4m3 becomes float16 by one conversion of two values and one multiplication by the block's scale: exact where the scale
is a power of two and the product not below float16's smallest step, 2^-24. The rotary part stays bfloat16.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

# Four e4m3 in one register to two pairs of float16, times the pair in $3.
_E4M3_TO_F16 = tl.constexpr("""
{
.reg .b16 a, b;
.reg .b32 x, y;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 x, a;
cvt.rn.f16x2.e4m3x2 y, b;
mul.rn.f16x2 $0, x, $3;
mul.rn.f16x2 $1, y, $3;
}
""")
_TO_F16_PAIR = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")


@gluon.jit
def _load_slots(slots, tile, end, LAYOUT: gl.constexpr):
    """The slots of a tile, -1 for none: [64] int32."""
    at = tile * 64 + gl.arange(0, 64, layout=LAYOUT)
    return gl.load(slots + at, mask=at < end, other=-1).to(gl.int32)


@gluon.jit
def _load_words(words, slot, FIRST: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """32-bit words [FIRST, FIRST + COLUMNS) of each slot, zeros for none."""
    row = gl.expand_dims(slot.to(gl.int64), 1)
    column = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    return gl.load(words + (row * 164 + FIRST + column), mask=(row >= 0) & (column >= 0), other=0)


@gluon.jit
def _load_values(words, tile_slots, QUARTER: gl.constexpr, LAYOUT: gl.constexpr):
    """The 512 e4m3 of 16 slots, zeros for none: [16, 4 blocks, 32 words]."""
    slot = tile_slots.slice(QUARTER * 16, 16, dim=0).load(gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    row = gl.expand_dims(gl.expand_dims(slot.to(gl.int64), 1), 2)
    block = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    column = gl.expand_dims(gl.expand_dims(block, 0), 2) * 32 + gl.expand_dims(gl.expand_dims(word, 0), 1)
    return gl.load(words + (row * 164 + column), mask=(row >= 0) & (column >= 0), other=0)


@gluon.jit
def _convert(value, factors, latent_tile, QUARTER: gl.constexpr, LAYOUT: gl.constexpr):
    """16 slots' values times their blocks' scales, to shared memory."""
    factor = factors.slice(QUARTER * 16, 16, dim=0).load(gl.SliceLayout(2, LAYOUT))
    value, factor = gl.broadcast(value, gl.expand_dims(factor, 2))
    # Said to be impure, so that these quarters and the loads between them keep their order.
    low, high = gl.inline_asm_elementwise(
        _E4M3_TO_F16, "=&r,=r,r,r", [value, factor], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )
    latent_tile.slice(QUARTER * 16, 16, dim=0).store(gl.reshape(gl.join(low, high), [16, 256]))


@gluon.jit
def fetch(words, slots, first_tile, num_tiles, end, k_latent, k_rope, bias, full, empty):
    """Four warps: fill the two buffers in turn, each as soon as its readers are done.

    words: the plane as 32-bit words; slots: the row's, of which tiles [first_tile, first_tile + num_tiles) up to slot
    number ``end`` are fetched. k_latent [2, 64, 256], k_rope [2, 64, 32] words of two values; bias [2, 64] float32, 0
    for a token, -inf for none. The readers' fence makes them visible to the tensor cores.

    A tile waits in registers; the next one's quarters are on their way as soon as these are free. Slots and scales go
    through shared memory to the threads that need them. No register to spare: what spills, spills to L2, because shared
    memory takes the L1's place.
    """
    # 16 lanes of a warp's load share a slot; eight neighbours have two, so that they store to all banks at once.
    VALUES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 2, 0], [8, 0, 0]],
        [[0, 0, 4], [0, 0, 8], [1, 0, 0], [0, 0, 16], [0, 1, 0]],
        [[2, 0, 0], [4, 0, 0]],
        [],
        [16, 4, 32],
    )
    ROPE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1, 2], [16, 2], [4, 1], [1, 0])
    SLOTS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gdc_wait()
    factors = gl.allocate_shared_memory(gl.int32, [64, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    tile_slots = gl.allocate_shared_memory(gl.int32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_slots.store(_load_slots(slots, first_tile, end, SLOTS))
    next_slots = _load_slots(slots, first_tile + 1, end, SLOTS)
    scale = _load_words(words, tile_slots.load(gl.SliceLayout(1, SCALES)), 128, 4, SCALES)
    value_0 = _load_values(words, tile_slots, 0, VALUES)
    value_1 = _load_values(words, tile_slots, 1, VALUES)
    value_2 = _load_values(words, tile_slots, 2, VALUES)
    value_3 = _load_values(words, tile_slots, 3, VALUES)
    rope = _load_words(words, tile_slots.load(gl.SliceLayout(1, ROPE)), 132, 32, ROPE)
    for step in range(num_tiles):
        buffer = step % 2
        mbarrier.wait(empty.index(buffer), (step // 2 & 1) ^ 1)
        latent_tile = k_latent.index(buffer)
        factors.store(gl.inline_asm_elementwise(_TO_F16_PAIR, "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1))
        bias.index(buffer).store(gl.where(tile_slots.load(SLOTS) >= 0, 0.0, float("-inf")))
        tile_slots.store(next_slots)
        next_slots = _load_slots(slots, first_tile + step + 2, end, SLOTS)
        scale = _load_words(words, tile_slots.load(gl.SliceLayout(1, SCALES)), 128, 4, SCALES)
        _convert(value_0, factors, latent_tile, 0, VALUES)
        value_0 = _load_values(words, tile_slots, 0, VALUES)
        _convert(value_1, factors, latent_tile, 1, VALUES)
        value_1 = _load_values(words, tile_slots, 1, VALUES)
        _convert(value_2, factors, latent_tile, 2, VALUES)
        value_2 = _load_values(words, tile_slots, 2, VALUES)
        _convert(value_3, factors, latent_tile, 3, VALUES)
        value_3 = _load_values(words, tile_slots, 3, VALUES)
        k_rope.index(buffer).store(rope)
        rope = _load_words(words, tile_slots.load(gl.SliceLayout(1, ROPE)), 132, 32, ROPE)
        # The fence that the tensor cores need would wait for the loads in flight: the readers have it.
        gl.thread_barrier()
        mbarrier.arrive(full.index(buffer), count=1)
