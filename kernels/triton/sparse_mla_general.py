"""Sparse MLA decode for any C, R and head count, fp8 and bf16 layouts: plain Triton, fetching and products in turn.

The formula and the splits stand in ``sparse_mla``. Tiles: HEADS heads of one row, TOKENS tokens at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.layout import CacheLayout

TOKENS = 32


@triton.jit(do_not_specialize=["tiles_per_split"])
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


def head_block(heads: int) -> int:
    """Heads of a program."""
    return 16 if heads <= 16 else 32 if heads <= 32 else 64


def launch(
    query: Tensor,
    plane: Tensor,
    slots: Tensor,
    out: Tensor,
    lse: Tensor,
    splits: int,
    tiles_per_split: int,
    scale_log2: float,
    layout: CacheLayout,
) -> None:
    """One program a split, head block and row. out: [B, (splits,) H, C]; lse: [B, (splits,) H] float32."""
    batch, heads, _ = query.shape
    block = head_block(heads)
    head_blocks = triton.cdiv(heads, block)
    _general[(batch * head_blocks * splits,)](
        query,
        plane,
        slots,
        out,
        lse,
        slots.shape[1],
        heads,
        tiles_per_split,
        scale_log2,
        SPLITS=splits,
        HEAD_BLOCKS=head_blocks,
        RANK=layout.kv_lora_rank,
        ROPE=layout.qk_rope_head_dim,
        FP8=layout.name == "fp8",
        HEADS=block,
        TOKENS=TOKENS,
        BLOCK_RANK=max(16, triton.next_power_of_2(layout.kv_lora_rank)),
        BLOCK_ROPE=max(16, triton.next_power_of_2(layout.qk_rope_head_dim)),
        num_warps=8 if block == 64 else 4,
        num_stages=1,
    )
