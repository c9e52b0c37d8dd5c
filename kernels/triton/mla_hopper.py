"""Multi-head latent attention on Hopper's tensor cores: the two warpgroups that multiply, for whoever stages K.

    s = q k^T * scale,   m = max(m', rowmax s),   p = 2^(s - m),   acc = acc 2^(m' - m) + p v,   v = k[:, :512]

Tiles: 64 heads by 64 tokens; K [64, 512 + 64] is staged once and read by both products. Each warpgroup holds half of
the output, 64 x 256 float32, in registers. ``attend_left`` also computes scores and softmax; its own product takes P
from registers, ``attend_right`` gets P and the factors 2^(m' - m) through shared memory.
    left:   softmax(t) | P V left (t), half | P shared | other half | scores(t + 1); left half of tile t released
    right:                                             wait for P | acc rescaled | P V right (t) | right half released
Counting (a tile): 2,176 clocks of the tensor cores (36 times 32 for scores, two times 4 times 128 for P V), of about
3,100 that it takes. A warp that issues matrix products gets one or two ahead of them and then waits, so that only other
warps can overlap them; the softmax between scores and P V, 500 clocks, stays exposed. The scores read 4 KB of shared
memory each 32 clocks, all that it delivers, while P V right and the copies want their share: so the query's rope and
64 more channels stay in registers, as many as there are.

Shared memory that the caller allocates, and who signals what (tile t lies in buffer t % 2; barriers of one buffer after
the other):
    k_left, k_right [2, 64, 256], k_rope [2, 64, 64] bfloat16; bias [2, 64] float32, 0 for a token, -inf for none
    full_left, full_right [2]: the tile's columns 0..255; its columns 256..511, rope and bias; by the caller's warps
    empty_left, empty_right [2], one arrival each: these may be filled again
    p_tile [64, 64] bfloat16, keeps [64] float32, p_full, p_empty: between the two warpgroups, one arrival each
    q_latent [1, 64, 512], q_rope [64, 64] bfloat16: filled before q_full; q_empty, two arrivals: may be filled again
    counts [128] int32: the number of tiles, at least one, in each element; filled before q_full
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from seamount.kernels.triton.mla_softmax import add_product, rescale, share, share_norm, softmax


@gluon.jit
def _num_tiles(counts):
    return gl.max(counts.load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _query(q_latent, tile):
    """The only buffer, by an index that the compiler does not know to be 0.

    It would compute the descriptors of a query that stays in place ahead of all loops, and spill what they displace.
    """
    return q_latent.index(tile >> 30)


@gluon.jit
def _first_scores(q_rotary, q_256, q_latent, k_right, k_rope, full_right, tile, zeros):
    """Issues what the scores need of rope and columns 256..511: four products, two of them with q from registers."""
    buffer = tile % 2
    query = _query(q_latent, tile)
    mbarrier.wait(full_right.index(buffer), tile // 2 & 1)
    right = k_right.index(buffer)
    scores = warpgroup_mma(q_rotary, k_rope.index(buffer).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_256, right.slice(0, 64, dim=1).permute((1, 0)), scores, is_async=True)
    q_320, k_320 = query.slice(320, 64, dim=1), right.slice(64, 64, dim=1)
    scores = warpgroup_mma(q_320, k_320.permute((1, 0)), scores, is_async=True)
    q_384, k_384 = query.slice(384, 128, dim=1), right.slice(128, 128, dim=1)
    return warpgroup_mma(q_384, k_384.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _other_scores(q_latent, k_left, full_left, tile, scores):
    """Issues the rest of them: columns 0..255."""
    buffer = tile % 2
    query = _query(q_latent, tile)
    mbarrier.wait(full_left.index(buffer), tile // 2 & 1)
    return warpgroup_mma(query.slice(0, 256, dim=1), k_left.index(buffer).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _store(acc, out, first_head, num_heads, FIRST: gl.constexpr, staged, empty):
    """acc [64, 256] to out (the row of head 0), 16 bytes a thread by way of a half tile nobody reads any more."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    staged.store(acc.to(out.dtype.element_ty))
    gl.thread_barrier()
    value = staged.load(WIDE)
    gl.thread_barrier()
    mbarrier.arrive(empty, count=1)
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    column = FIRST + gl.arange(0, 256, layout=gl.SliceLayout(0, WIDE))
    at = gl.expand_dims(head, 1) * 512 + gl.expand_dims(column, 0)
    gl.store(out + at, value, mask=(gl.expand_dims(head, 1) < num_heads) & (gl.expand_dims(column, 0) >= 0))


@gluon.jit
def attend_left(
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
):
    """Four warps: scores, softmax, lse, and columns 0..255 of the output, for every item of this program."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    TOKEN: gl.constexpr = gl.SliceLayout(0, SCORES)
    HEAD: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_HEAD: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    QUERY: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    zeros = gl.zeros([64, 64], gl.float32, SCORES)
    first = gl.program_id(0)
    tile = 0
    for item in range(first, num_items, gl.num_programs(0)):
        done = (item - first) // gl.num_programs(0)
        mbarrier.wait(q_full, done & 1)
        num_tiles = _num_tiles(counts)
        q_rotary = q_rope.load(QUERY)
        q_256 = q_latent.index(0).slice(256, 64, dim=1).load(QUERY)
        top = gl.full([64], float("-inf"), gl.float32, HEAD)
        total = gl.zeros([64], gl.float32, HEAD)
        acc = gl.zeros([64, 256], gl.float32, OUTPUT)
        scores = _first_scores(q_rotary, q_256, q_latent, k_right, k_rope, full_right, tile, zeros)
        scores = _other_scores(q_latent, k_left, full_left, tile, scores)
        # One turn of P a tile, and one more an item for the norm.
        for _ in range(1, num_tiles):
            buffer = tile % 2
            unseen = bias.index(buffer).load(TOKEN)
            p, keep, top = softmax(warpgroup_mma_wait(0, [scores]), qk_scale, unseen, top)
            acc = acc * gl.expand_dims(gl.convert_layout(keep, OUTPUT_HEAD), 1)
            # The first 32 tokens keep the tensor cores busy while P is shared.
            low = p.to(p_tile.dtype)
            first_low, other_low = gl.split(gl.permute(gl.reshape(low, [64, 2, 32]), (0, 2, 1)))
            left = k_left.index(buffer)
            first_low = gl.convert_layout(first_low, PROBABILITIES)
            product = warpgroup_mma(first_low, left.slice(0, 32, dim=0), acc, is_async=True)
            share(low, keep, p_tile, keeps, p_full, p_empty, tile + done)
            other_low = gl.convert_layout(other_low, PROBABILITIES)
            product = warpgroup_mma(other_low, left.slice(32, 32, dim=0), product, is_async=True)
            total = total * keep + gl.sum(p, axis=1)
            tile += 1
            scores = _first_scores(q_rotary, q_256, q_latent, k_right, k_rope, full_right, tile, zeros)
            acc = warpgroup_mma_wait(4, [product])
            gl.thread_barrier()
            mbarrier.arrive(empty_left.index(buffer), count=1)
            scores = _other_scores(q_latent, k_left, full_left, tile, scores)
        buffer = tile % 2
        unseen = bias.index(buffer).load(TOKEN)
        scores = warpgroup_mma_wait(0, [scores])
        gl.thread_barrier()
        mbarrier.arrive(q_empty, count=1)
        p, keep, top = softmax(scores, qk_scale, unseen, top)
        acc = acc * gl.expand_dims(gl.convert_layout(keep, OUTPUT_HEAD), 1)
        low = p.to(p_tile.dtype)
        product = warpgroup_mma(gl.convert_layout(low, PROBABILITIES), k_left.index(buffer), acc, is_async=True)
        share(low, keep, p_tile, keeps, p_full, p_empty, tile + done)
        total = total * keep + gl.sum(p, axis=1)
        is_empty, norm = share_norm(total, keeps, p_full, p_empty, tile + done)
        row = (item // head_blocks).to(gl.int64)
        first_head = item % head_blocks * 64
        head = first_head + gl.arange(0, 64, layout=HEAD)
        row_lse = (top + gl.log2(gl.where(is_empty, 1.0, total))) * 0.6931471805599453
        gl.store(lse + row * num_heads + head, gl.where(is_empty, float("inf"), row_lse), mask=head < num_heads)
        acc = warpgroup_mma_wait(0, [product])
        acc = acc * gl.expand_dims(gl.convert_layout(norm, OUTPUT_HEAD), 1)
        gl.thread_barrier()
        out_row = out + row * num_heads * 512
        _store(acc, out_row, first_head, num_heads, 0, k_left.index(buffer), empty_left.index(buffer))
        tile += 1


@gluon.jit
def attend_right(
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
):
    """Four warps: columns 256..511 of the output, for every item of this program."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    first = gl.program_id(0)
    tile = 0
    for item in range(first, num_items, gl.num_programs(0)):
        done = (item - first) // gl.num_programs(0)
        mbarrier.wait(q_full, done & 1)
        num_tiles = _num_tiles(counts)
        gl.thread_barrier()
        mbarrier.arrive(q_empty, count=1)
        acc = gl.zeros([64, 256], gl.float32, OUTPUT)
        for step in range(num_tiles):
            buffer = tile % 2
            mbarrier.wait(p_full, tile + done & 1)
            acc = rescale(acc, keeps)
            acc = add_product(acc, p_tile, k_right.index(buffer), p_empty)
            # The last tile's half is staging space first.
            mbarrier.arrive(empty_right.index(buffer), count=1, pred=step < num_tiles - 1)
            tile += 1
        mbarrier.wait(p_full, tile + done & 1)
        acc = rescale(acc, keeps)
        gl.thread_barrier()
        mbarrier.arrive(p_empty, count=1)
        buffer = (tile - 1) % 2
        row = (item // head_blocks).to(gl.int64)
        out_row = out + row * num_heads * 512
        first_head = item % head_blocks * 64
        _store(acc, out_row, first_head, num_heads, 256, k_right.index(buffer), empty_right.index(buffer))
