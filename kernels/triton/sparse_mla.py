"""Sparse MLA decode on the GPU: paged latents gathered by index, split over the SMs, combined.

    s[h, j] = scale * q[h] . kv[i_j],   out[h] = sum_j 2^(s'[h, j] - m[h]) kv[i_j, :C] / l[h],   s' = s log2(e)
    lse[h] = (m[h] + log2 l[h]) ln 2;   partial results of splits p:  out = sum_p w_p out_p,  w = softmax_p(lse_p)

Tiles: a program holds 64 heads (fewer are padded) of one row and walks 64 tokens at a time over its split of the
row's slots. Splits are chosen so that the programs fill the SMs once, or in as few equal waves as possible.
Bytes: 656 (fp8) or 1,152 (bf16) a slot and 64 heads, read once from L2 or memory; 8 a slot number; q and out
2 (C + R) and 2 C a head; each split, where there are several, 2 C (4 C in the general kernel) a head written and read.
Work: 2 (2 C + R) flops a slot and head: 570 MFLOP for 2,048 slots and 128 heads, so a full batch is bound by the tensor
cores (34 clocks a slot and 64 heads), a single row by latency.

Two kernels: ``sparse_mla_hopper`` for the fp8 layout with C = 512 and R = 64 on Hopper, ``sparse_mla_general`` for the
rest. The combine is launched early on Hopper (programmatic dependent launch) and waits for the splits by itself.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seamount.kernels.layout import CacheLayout
from seamount.kernels.triton import sparse_mla_general, sparse_mla_hopper

_LOG2_E = 1.4426950408889634


@triton.jit
def _combine(
    parts,
    part_lse,
    out,
    lse,
    num_heads,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a row and head: the splits' outputs, weighted by their shares of the denominator, in split order."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = row * SPLITS * num_heads + head
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, BLOCK_RANK)
    parts_lse = tl.load(part_lse + first + split * num_heads)
    at = (first + split * num_heads)[:, None] * RANK + channel[None, :]
    parts_out = tl.load(parts + at, mask=(channel < RANK)[None, :] & (split >= 0)[:, None], other=0.0).to(tl.float32)
    top = tl.max(parts_lse, axis=0)
    empty = top == float("-inf")
    weights = tl.exp2(parts_lse - tl.where(empty, 0.0, top))
    total = tl.sum(weights, axis=0)
    weights = weights / tl.where(empty, 1.0, total)
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
    head_block = 64 if hopper else sparse_mla_general.head_block(heads)
    num_tiles = triton.cdiv(num_slots, 64 if hopper else sparse_mla_general.TOKENS)
    head_blocks = triton.cdiv(heads, head_block)
    splits = _choose_splits(batch * head_blocks, num_tiles, _num_sms(q.device))
    parts, part_lse = out, lse
    if splits > 1:
        # Half as many bytes to write and read; the result is rounded to 8 bits later, these to 11.
        part_dtype = torch.float16 if hopper else torch.float32
        parts = torch.empty((batch, splits, heads, rank), dtype=part_dtype, device=q.device)
        part_lse = torch.empty((batch, splits, heads), dtype=torch.float32, device=q.device)
    arguments = (query, plane, slots, parts, part_lse, splits, triton.cdiv(num_tiles, splits), scale * _LOG2_E)
    if hopper:
        sparse_mla_hopper.launch(*arguments)
    else:
        sparse_mla_general.launch(*arguments, layout)
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
            EARLY=hopper,
            # A split's row is one load of all threads: no sum crosses warps, no shared memory is needed.
            num_warps=2 if hopper else 4,
            launch_pdl=hopper,
        )
    return out, lse
