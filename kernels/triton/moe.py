"""Around the expert products: the gate, grouping rows by expert, and the weighted sum back.

    gate        s = sigmoid(x W^T), c = s + bias; groups by their two largest c; best k of c in them; weights s (/ sum)
    group       offsets[e] = #(ids < e); a choice's row = offsets[its expert] + #(equal ids before it)
    permute     out[row of (t, k)] = x[t], quantised on the way for an FP8 product
    combine     out[t] = shared[t] + sum_k w[t, k] y[row of (t, k)], in float32, k ascending
    swiglu      q, s = quantize(bf16(silu(gate) up))

Tiles: the gate's product is split over K and over 64 experts at a time into partial [16 tokens, 64] tiles; the last
program of 16 tokens to arrive sums them in the order of the splits and selects, all experts of a token in registers.
One grouping program an expert counts and places its own choices, in order, without atomics. One program moves one row.
Bytes: gate E H w + T H w + splits * 4 T E (in the L2); group 8 T k an expert (in the L2); permute T k (2 H + H);
combine T k 2 H + 2 T H; swiglu 5 I a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.triton.arguments import FLOATS, check_tensor
from seamount.kernels.triton.elementwise import quantize_rows
from seamount.kernels.triton.fp8_gemm import arrivals, multiprocessors

_TOKENS = 16
_GATE_EXPERTS = 64


@triton.jit
def _take_best(values, columns):
    """The column of each row's largest value, the lowest among equals; within range even if all are NaN. [R, C]."""
    best = tl.max(values, axis=1)
    return tl.min(tl.where(values == best[:, None], columns[None, :], columns.shape[0] - 1), axis=1)


@triton.jit
def _select(
    logits, tokens, num_tokens, bias_ptr, weight_ptr, id_ptr, scale,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr, CHOSEN_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    NONE: tl.constexpr = float("-inf")
    experts = tl.arange(0, EXPERTS)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores + tl.load(bias_ptr + experts).to(tl.float32)[None, :]
    if CHOSEN_GROUPS < GROUPS:
        SIZE: tl.constexpr = EXPERTS // GROUPS
        groups = tl.arange(0, GROUPS)
        by_group = tl.reshape(choice, (TOKENS, GROUPS, SIZE))
        inner = tl.arange(0, SIZE)[None, None, :]
        first = tl.max(by_group, axis=2)
        at = tl.min(tl.where(by_group == first[:, :, None], inner, SIZE), axis=2)
        group_scores = first
        if SIZE > 1:
            group_scores = first + tl.max(tl.where(inner == at[:, :, None], NONE, by_group), axis=2)
        kept = tl.zeros((TOKENS, GROUPS), dtype=tl.int32)
        for _ in tl.static_range(CHOSEN_GROUPS):
            group = _take_best(group_scores, groups)
            chosen = groups[None, :] == group[:, None]
            kept = tl.where(chosen, 1, kept)
            group_scores = tl.where(chosen, NONE, group_scores)
        # -inf, not 0: with a negative bias a chosen group's c may lie below 0.
        choice = tl.reshape(tl.where(kept[:, :, None] != 0, by_group, NONE), (TOKENS, EXPERTS))
    slots = tl.arange(0, CHOSEN_PADDED)
    ids = tl.zeros((TOKENS, CHOSEN_PADDED), dtype=tl.int32)
    weights = tl.zeros((TOKENS, CHOSEN_PADDED), dtype=tl.float32)
    for i in tl.static_range(CHOSEN):
        expert = _take_best(choice, experts)
        chosen = experts[None, :] == expert[:, None]
        score = tl.sum(tl.where(chosen, scores, 0.0), axis=1)
        choice = tl.where(chosen, NONE, choice)
        here = (slots == i)[None, :]
        ids = tl.where(here, expert[:, None], ids)
        weights = tl.where(here, score[:, None], weights)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    offsets = tokens.to(tl.int64)[:, None] * CHOSEN + slots[None, :]
    inside = (tokens < num_tokens)[:, None] & (slots < CHOSEN)[None, :]
    tl.store(weight_ptr + offsets, weights * scale, mask=inside)
    tl.store(id_ptr + offsets, ids.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_kernel(
    x_ptr, gate_ptr, bias_ptr, partial_ptr, arrived_ptr, weight_ptr, id_ptr, num_tokens, size, x_stride, scale,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr, CHOSEN_PADDED: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    band, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = band * TOKENS + tl.arange(0, TOKENS)
    rows = part * PART + tl.arange(0, PART)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * x_stride + inner[None, :]
    gate_ptrs = gate_ptr + rows.to(tl.int64)[:, None] * size + inner[None, :]
    total = tl.zeros((TOKENS, PART), dtype=tl.float32)
    per_split = tl.cdiv(tl.cdiv(size, BLOCK_K), SPLITS)
    for block in tl.range(split * per_split, (split + 1) * per_split, num_stages=4):
        inside = (block * BLOCK_K + inner < size)[None, :]
        x = tl.load(x_ptrs + block * BLOCK_K, mask=inside, other=0.0)
        weight = tl.load(gate_ptrs + block * BLOCK_K, mask=inside, other=0.0)
        if NARROW:
            total = tl.dot(x, tl.trans(weight), total)
        else:
            total = tl.dot(x.to(tl.float32), tl.trans(weight.to(tl.float32)), total, input_precision="ieee")
    # partial: [split, token, expert]
    padded = tl.num_programs(0) * TOKENS
    partial = partial_ptr + tokens[:, None] * EXPERTS
    tl.store(partial + split * padded * EXPERTS + rows[None, :], total)
    tl.debug_barrier()  # every thread's part is written before one thread says so
    arrived = tl.atomic_add(arrived_ptr + band, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS * (EXPERTS // PART) - 1:
        experts = tl.arange(0, EXPERTS)
        logits = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
        for i in tl.static_range(SPLITS):
            logits += tl.load(partial + i * padded * EXPERTS + experts[None, :], cache_modifier=".cg")
        _select(
            logits, tokens, num_tokens, bias_ptr, weight_ptr, id_ptr, scale,
            EXPERTS, GROUPS, CHOSEN_GROUPS, CHOSEN, NORMALIZE, CHOSEN_PADDED, TOKENS,
        )  # fmt: skip
        tl.store(arrived_ptr + band, 0)  # for the next launch


def gate_fits(num_experts: int, num_groups: int) -> bool:
    """Whether the kernel can hold these experts: powers of two, 16 .. 1024, so that groups are register tiles."""
    powers = num_experts & (num_experts - 1) == 0 and num_groups & (num_groups - 1) == 0
    return powers and 16 <= num_experts <= 1024 and 0 < num_groups <= num_experts


def gate(
    x: Tensor, weight: Tensor, bias: Tensor,
    *, num_groups: int, num_chosen_groups: int, num_chosen: int, normalize: bool, scale: float,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``seamount.kernels.moe.gate`` in one launch. bfloat16 x and weight multiply exactly; others in float32."""
    tokens, experts, size = x.shape[0], weight.shape[0], x.shape[-1]
    if not gate_fits(experts, num_groups):
        raise ValueError(
            f"{experts} experts in {num_groups} groups; the kernel needs powers of two, 16 .. 1024 experts"
        )
    if not 0 < num_chosen_groups <= num_groups or not 0 < num_chosen <= experts // num_groups * num_chosen_groups:
        raise ValueError(
            f"{num_chosen} experts of {num_chosen_groups} groups cannot be chosen from {num_groups} groups"
        )
    check_tensor("x", x, shape=(None, size), dtypes=FLOATS, like=x)
    check_tensor("weight", weight, shape=(None, size), dtypes=FLOATS, like=x, contiguous=True)
    check_tensor("bias", bias, shape=(experts,), dtypes=FLOATS, like=x)
    weights = torch.empty((tokens, num_chosen), dtype=torch.float32, device=x.device)
    ids = torch.empty((tokens, num_chosen), dtype=torch.int64, device=x.device)
    if not tokens:
        return weights, ids
    narrow = x.dtype == weight.dtype == torch.bfloat16
    block_k = 128 if narrow else 32
    part, bands = min(_GATE_EXPERTS, experts), triton.cdiv(tokens, _TOKENS)
    arrived = arrivals(x.device)
    if bands > arrived.shape[0]:
        raise ValueError(
            f"x has {tokens} tokens; a launch has counters for {arrived.shape[0] * _TOKENS}: call in parts"
        )
    if splits is None:
        splits = max(1, min(8, size // block_k // 4, multiprocessors(x.device) // (bands * (experts // part))))
    partial = torch.empty((splits, bands * _TOKENS, experts), dtype=torch.float32, device=x.device)
    _gate_kernel[(bands, experts // part, splits)](
        x, weight, bias, partial, arrived, weights, ids, tokens, size, x.stride(0), scale,
        EXPERTS=experts, GROUPS=num_groups, CHOSEN_GROUPS=num_chosen_groups, CHOSEN=num_chosen, NORMALIZE=normalize,
        CHOSEN_PADDED=triton.next_power_of_2(num_chosen), TOKENS=_TOKENS, PART=part, SPLITS=splits,
        BLOCK_K=block_k, NARROW=narrow, num_warps=4,
    )  # fmt: skip
    return weights, ids


@triton.jit  # num_ids as a multiple of 16 is worth 7 to 15 % of the time
def _group_kernel(id_ptr, offset_ptr, row_ptr, token_ptr, num_ids, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    last = tl.num_programs(0) - 1
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    upto = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, num_ids, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(id_ptr + at, mask=at < num_ids, other=-1)
        legal = (ids >= 0) & (ids <= last)
        below += (legal & (ids < expert)).to(tl.int32)
        upto += (legal & (ids <= expert)).to(tl.int32)
        if expert == 0:
            tl.store(row_ptr + at, -1, mask=(at < num_ids) & (legal == 0))
    begin = tl.sum(below, axis=0)
    end = tl.sum(upto, axis=0)
    tl.store(offset_ptr + expert, begin)
    if expert == last:
        tl.store(offset_ptr + expert + 1, end)
    row = begin
    for start in range(0, num_ids, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(id_ptr + at, mask=at < num_ids, other=-1)
        mine = (ids == expert).to(tl.int32)
        place = row + tl.cumsum(mine, axis=0) - mine
        tl.store(row_ptr + at, place, mask=mine != 0)
        tl.store(token_ptr + place, at // NUM_CHOSEN, mask=mine != 0)
        row += tl.sum(mine, axis=0)


def group_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, rows, tokens) of ``seamount.kernels.moe.group_by_expert`` in one launch after a fill."""
    check_tensor("ids", ids, shape=(None, None), dtypes=(torch.int64,), like=ids, contiguous=True)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    rows = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    tokens = torch.full((ids.numel(),), -1, dtype=torch.int32, device=ids.device)
    block = min(4096, max(128, triton.next_power_of_2(ids.numel())))
    _group_kernel[(num_experts,)](
        ids, offsets, rows, tokens, ids.numel(), NUM_CHOSEN=max(1, ids.shape[1]), BLOCK=block, num_warps=4
    )
    return offsets, rows, tokens


@triton.jit
def _permute_kernel(x_ptr, token_ptr, out_ptr, x_stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row)
    columns = tl.arange(0, PADDED)
    inside = (columns < SIZE) & (token >= 0)
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + columns, mask=inside)
    tl.store(out_ptr + row * SIZE + columns, x, mask=inside)


@triton.jit
def _permute_quantize_kernel(
    x_ptr, token_ptr, out_ptr, scale_ptr, x_stride, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row)
    blocks = tl.arange(0, BLOCKS_PADDED)
    inside = (blocks < BLOCKS) & (token >= 0)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + columns, mask=inside[:, None], other=0.0).to(tl.float32)
    values, scales = quantize_rows(x)
    tl.store(out_ptr + row * (BLOCKS * 128) + columns, values, mask=inside[:, None])
    tl.store(scale_ptr + row * BLOCKS + blocks, scales, mask=inside)


def permute(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows tokens[r] of x, any dtype; rows of token -1 are unspecified. One launch."""
    check_tensor("x", x, shape=(None, None), dtypes=(x.dtype,), like=x)
    check_tensor("tokens", tokens, shape=(None,), dtypes=(torch.int32,), like=x, contiguous=True)
    out = torch.empty((tokens.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    if out.numel():
        size = x.shape[1]
        _permute_kernel[(tokens.shape[0],)](
            x, tokens, out, x.stride(0), SIZE=size, PADDED=triton.next_power_of_2(size), num_warps=4
        )
    return out


def permute_quantize(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``permute``, then ``quantize`` by blocks of 128 channels, in one launch."""
    check_tensor("x", x, shape=(None, None), dtypes=FLOATS, like=x)
    check_tensor("tokens", tokens, shape=(None,), dtypes=(torch.int32,), like=x, contiguous=True)
    blocks = x.shape[1] // 128
    values = torch.empty((tokens.shape[0], x.shape[1]), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((tokens.shape[0], blocks), dtype=torch.float32, device=x.device)
    if values.numel():
        _permute_quantize_kernel[(tokens.shape[0],)](
            x, tokens, values, scales, x.stride(0), BLOCKS=blocks, BLOCKS_PADDED=triton.next_power_of_2(blocks),
            num_warps=8,
        )  # fmt: skip
    return values, scales


@triton.jit
def _combine_kernel(
    y_ptr, row_ptr, weight_ptr, shared_ptr, out_ptr, NUM_CHOSEN: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < SIZE
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in tl.static_range(NUM_CHOSEN):
        row = tl.load(row_ptr + token * NUM_CHOSEN + k)
        weight = tl.load(weight_ptr + token * NUM_CHOSEN + k).to(tl.float32)
        y = tl.load(y_ptr + row.to(tl.int64) * SIZE + columns, mask=inside & (row >= 0), other=0.0)
        # The row may be unspecified memory, NaN included: what is dropped adds nothing.
        total += tl.where(row >= 0, y.to(tl.float32) * weight, 0.0)
    if SHARED:
        total += tl.load(shared_ptr + token * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + columns, total, mask=inside)


def combine(y: Tensor, rows: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
    """``seamount.kernels.moe.combine`` in one launch."""
    size = y.shape[-1]
    check_tensor("y", y, shape=(None, size), dtypes=FLOATS, like=y, contiguous=True)
    check_tensor("rows", rows, shape=(None, None), dtypes=(torch.int32,), like=y, contiguous=True)
    check_tensor("weights", weights, shape=rows.shape, dtypes=(torch.float32,), like=y, contiguous=True)
    if shared is not None:
        check_tensor("shared", shared, shape=(rows.shape[0], size), dtypes=(y.dtype,), like=y, contiguous=True)
    out = torch.empty((rows.shape[0], size), dtype=y.dtype, device=y.device)
    if out.numel():
        columns = min(1024, triton.next_power_of_2(size))
        _combine_kernel[(rows.shape[0], triton.cdiv(size, columns))](
            y, rows, weights, out if shared is None else shared, out,
            NUM_CHOSEN=rows.shape[1], SIZE=size, COLUMNS=columns, SHARED=shared is not None,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_blocks"])
def _swiglu_kernel(x_ptr, q_ptr, scale_ptr, num_blocks, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    # A row of the tile is one block of 128 products; BLOCKS of them make a row of x.
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (blocks < num_blocks)[:, None]
    inner = tl.arange(0, 128)[None, :]
    gate_ptrs = x_ptr + (blocks // BLOCKS * (2 * BLOCKS) + blocks % BLOCKS)[:, None] * 128 + inner
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + BLOCKS * 128, mask=inside, other=0.0).to(tl.float32)
    product = (gate / (1.0 + tl.exp(-gate)) * up).to(x_ptr.dtype.element_ty).to(tl.float32)
    values, scales = quantize_rows(product)
    tl.store(q_ptr + blocks[:, None] * 128 + inner, values, mask=inside)
    tl.store(scale_ptr + blocks, scales, mask=blocks < num_blocks)


def swiglu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``seamount.kernels.gemm.swiglu_quantize`` for float32, bfloat16 and float16, in one launch."""
    check_tensor("x", x, shape=x.shape, dtypes=FLOATS, like=x)
    x = x.contiguous()
    channels = x.shape[-1] // 2
    values = torch.empty((*x.shape[:-1], channels), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], channels // 128), dtype=torch.float32, device=x.device)
    if scales.numel():
        rows = 4 if scales.numel() <= 4096 else 16
        _swiglu_kernel[(triton.cdiv(scales.numel(), rows),)](
            x, values, scales, scales.numel(), BLOCKS=channels // 128, ROWS=rows, num_warps=4
        )
    return values, scales
