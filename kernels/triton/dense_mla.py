"""Causal attention with expanded keys and values (MLA's plain form) on the GPU.

    s[t, j] = scale * (q[t, :N] . k[j] + q[t, N:] . k_rope[j]),   j < length[t]
    out[t] = sum_j 2^(s'[t, j] - m[t]) v[j] / l[t],   lse[t] = (m[t] + log2 l[t]) ln 2,   s' = s log2(e)

Tiles: a program holds 128 rows of one head and walks over 64 keys at a time with running maximum m and denominator l
(FlashAttention); two warpgroups of 64 rows each, keys and values on their way to shared memory two tiles ahead. Tiles
that all rows see whole go without a mask, the last few with one. Rows that see most begin first.
Bytes: 2 (N + R + V) a key and 128 rows, from L2; q and out once. The rotary key is read per head, stored once.
Work: 2 (N + R + V) flops a row, head and key: bound by the tensor cores, in part by the exponentials between products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 128
_TOKENS = 64
_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tile(
    q,
    q_rope,
    k_at,
    k_rope_at,
    v_at,
    k_stride,
    k_rope_stride,
    v_stride,
    start,
    end,
    length,
    qk_scale,
    top,
    total,
    acc,
    ROPE: tl.constexpr,
    TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
):
    token = start + tl.arange(0, TOKENS)
    first = start.to(tl.int64)
    if MASKED:
        live = (token < end)[:, None]
        k = tl.load(k_at + first * k_stride, mask=live, other=0.0)
        v = tl.load(v_at + first * v_stride, mask=live, other=0.0)
    else:
        k = tl.load(k_at + first * k_stride)
        v = tl.load(v_at + first * v_stride)
    s = tl.dot(q, k.T)
    if ROPE:
        if MASKED:
            k_rope = tl.load(k_rope_at + first * k_rope_stride, mask=live, other=0.0)
        else:
            k_rope = tl.load(k_rope_at + first * k_rope_stride)
        s = tl.dot(q_rope, k_rope.T, s)
    s = s * qk_scale
    if MASKED:
        s = tl.where(token[None, :] < length[:, None], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(s - safe_top[:, None])
    keep = tl.exp2(top - safe_top)
    total = total * keep + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
    return new_top, total, acc


@triton.jit
def _dense_mha(
    q,
    k,
    k_rope,
    v,
    lengths,
    out,
    lse,
    num_rows,
    num_heads,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    k_rope_stride,
    v_stride,
    v_head_stride,
    qk_scale,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    length = tl.load(lengths + row, mask=real, other=0).to(tl.int32)
    end = tl.max(length)
    seen_by_all = tl.min(tl.where(real, length, 0x7FFFFFFF)) // TOKENS * TOKENS
    row = row.to(tl.int64)
    nope = tl.arange(0, NOPE)
    value = tl.arange(0, VALUE)
    token = tl.arange(0, TOKENS).to(tl.int64)[:, None]
    q_at = q + head * q_head_stride + row[:, None] * q_stride
    query = tl.load(q_at + nope[None, :], mask=real[:, None], other=0.0)
    k_at = k + head * k_head_stride + token * k_stride + nope[None, :]
    v_at = v + head * v_head_stride + token * v_stride + value[None, :]
    if ROPE:
        rope = tl.arange(0, ROPE)
        query_rope = tl.load(q_at + NOPE + rope[None, :], mask=real[:, None], other=0.0)
        k_rope_at = k_rope + token * k_rope_stride + rope[None, :]
    else:
        query_rope = query
        k_rope_at = k_at
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE), tl.float32)
    for start in tl.range(0, seen_by_all, TOKENS, num_stages=STAGES):
        top, total, acc = _attend_tile(
            query, query_rope, k_at, k_rope_at, v_at, k_stride, k_rope_stride, v_stride, start, end, length, qk_scale,
            top, total, acc, ROPE, TOKENS, MASKED=False,
        )  # fmt: skip
    for start in tl.range(seen_by_all, end, TOKENS, num_stages=1):
        top, total, acc = _attend_tile(
            query, query_rope, k_at, k_rope_at, v_at, k_stride, k_rope_stride, v_stride, start, end, length, qk_scale,
            top, total, acc, ROPE, TOKENS, MASKED=True,
        )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    at = row * num_heads + head
    row_lse = tl.where(empty, float("inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + at, row_lse, mask=real)
    acc = acc / total[:, None]
    tl.store(out + at[:, None] * VALUE + value[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])


def is_supported(nope: int, rope: int, value: int) -> bool:
    """Whether ``dense_mha`` takes heads of these sizes: powers of two, as Triton's tiles are."""
    return all(size in (16, 32, 64, 128, 256) for size in (nope, value)) and rope in (0, 16, 32, 64, 128)


def dense_mha(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``seamount.kernels.dense_mla.dense_mha``; arguments are checked there."""
    num_rows, heads, _ = q.shape
    nope, rope, value = k.shape[2], k_rope.shape[1], v.shape[2]
    out = torch.empty((num_rows, heads, value), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_rows, heads), dtype=torch.float32, device=q.device)
    if num_rows == 0 or heads == 0:
        return out, lse
    _dense_mha[(heads, triton.cdiv(num_rows, _ROWS))](
        q,
        k,
        k_rope,
        v,
        lengths.contiguous(),
        out,
        lse,
        num_rows,
        heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        k_rope.stride(0),
        v.stride(0),
        v.stride(1),
        scale * _LOG2_E,
        NOPE=nope,
        ROPE=rope,
        VALUE=value,
        ROWS=_ROWS,
        TOKENS=_TOKENS,
        STAGES=3,
        num_warps=8,
    )
    return out, lse
