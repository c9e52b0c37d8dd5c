"""The expert gate, rows grouped by expert, and their weighted sum back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.kernels.quant import BLOCK_SIZE, quantize, wide_dtype


def gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    num_chosen_groups: int,
    num_chosen: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose experts by group-limited, bias-corrected sigmoid scores ("noaux_tc").

        s = sigmoid(x W^T),  c = s + bias
        score of a group = sum of its two largest c;  the best ``num_chosen_groups`` groups stay
        ids = top ``num_chosen`` of c within them;  weights = s[ids] (/ their sum if ``normalize``) * scale

    The bias corrects the choice only. Among equals the lowest id wins.

    x: [T, hidden], T may be 0; weight: [E, hidden]; bias: [E]; E a multiple of num_groups.
    Returns (weights [T, num_chosen] float32 (float64 for float64 x), ids [T, num_chosen] int64, best first).
    Source: DeepSeek-V3's gate, sections 2.1.2 of its report.
    """
    if x.is_cuda and x.dtype != torch.float64:
        from seamount.kernels.triton import moe as triton_moe

        if triton_moe.gate_fits(weight.shape[0], num_groups):
            return triton_moe.gate(
                x,
                weight,
                bias,
                num_groups=num_groups,
                num_chosen_groups=num_chosen_groups,
                num_chosen=num_chosen,
                normalize=normalize,
                scale=scale,
            )
    wide = wide_dtype(x.dtype)
    scores = torch.sigmoid(x.to(wide) @ weight.to(wide).T)
    choice = scores + bias.to(wide)
    if num_chosen_groups < num_groups:
        groups = choice.view(-1, num_groups, weight.shape[0] // num_groups)
        group_scores = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(dim=2)
        dropped = _best_first(group_scores)[:, num_chosen_groups:]
        # -inf, not 0: with a negative bias a chosen group's c may lie below 0.
        choice = groups.scatter(1, dropped.unsqueeze(2).expand(-1, -1, groups.shape[2]), float("-inf")).flatten(1)
    ids = _best_first(choice)[:, :num_chosen].contiguous()
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return weights * scale, ids


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """Where each choice's row lies when rows are sorted by expert, then token, then choice.

    offsets: [E + 1] int32, expert e's rows are offsets[e] .. offsets[e + 1].
    rows: [T, K] int32, the row of each choice; -1 for an id outside 0 .. E - 1, which has none.
    tokens: [T K] int32, the token of each row; -1 from offsets[E] on.
    """

    offsets: Tensor
    rows: Tensor
    tokens: Tensor


def group_by_expert(ids: Tensor, num_experts: int) -> ExpertOrder:
    """Sort choices by expert, equal ones in the order of tokens.

    ids: [T, K] int64, contiguous, T may be 0; an id outside 0 .. num_experts - 1 (another rank's) is dropped.
    Nothing waits for the device: the number of rows stays there.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64 or num_experts < 1:
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)} for {num_experts} experts; it must be int64 [T, K]")
    if ids.is_cuda:
        from seamount.kernels.triton import moe as triton_moe

        offsets, rows, tokens = triton_moe.group_by_expert(ids, num_experts)
        return ExpertOrder(offsets=offsets, rows=rows, tokens=tokens)
    flat = ids.flatten()
    legal = (flat >= 0) & (flat < num_experts)
    order = torch.sort(torch.where(legal, flat, num_experts), stable=True).indices[: int(legal.sum())]
    rows = torch.full_like(flat, -1)
    rows[order] = torch.arange(order.shape[0], device=ids.device)
    tokens = torch.full_like(flat, -1)
    tokens[: order.shape[0]] = order // max(1, ids.shape[1])
    counts = torch.bincount(flat[legal], minlength=num_experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return ExpertOrder(offsets=offsets.int(), rows=rows.view(ids.shape).int(), tokens=tokens.int())


def permute(x: Tensor, order: ExpertOrder) -> Tensor:
    """The rows of x in the order of experts: out[r] = x[order.tokens[r]].

    x: [T, H], any dtype. Returns [T K, H]; rows of no choice are unspecified.
    """
    if x.dim() != 2 or x.shape[0] != order.rows.shape[0]:
        raise ValueError(f"x has shape {list(x.shape)}; the order is of {order.rows.shape[0]} tokens")
    if x.is_cuda:
        from seamount.kernels.triton import moe as triton_moe

        return triton_moe.permute(x, order.tokens)
    return x[order.tokens.clamp_min(0)] if x.shape[0] else x.new_empty((order.tokens.shape[0], x.shape[1]))


def permute_quantize(x: Tensor, order: ExpertOrder) -> tuple[Tensor, Tensor]:
    """``quantize`` of ``permute``: what the first grouped product reads.

    x: [T, H], H a multiple of 128. Returns (q [T K, H] float8_e4m3fn, s [T K, H / 128] float32).
    """
    if x.dim() != 2 or x.shape[0] != order.rows.shape[0] or x.shape[1] % BLOCK_SIZE:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [{order.rows.shape[0]}, a multiple of {BLOCK_SIZE}]")
    if x.is_cuda and x.dtype != torch.float64:
        from seamount.kernels.triton import moe as triton_moe

        return triton_moe.permute_quantize(x, order.tokens)
    return quantize(permute(x, order))


def combine(y: Tensor, order: ExpertOrder, weights: Tensor, shared: Tensor | None = None) -> Tensor:
    """Each token's rows, weighted and summed in the order of its choices, over the shared expert's output.

        out[t] = sum_k weights[t, k] y[order.rows[t, k]] + shared[t],  dropped choices add nothing

    y: [R, H]; weights: [T, K] float32 (float64 for float64 y); shared: [T, H] in y's dtype.
    Returns [T, H] in y's dtype, accumulated in at least float32.
    """
    if y.dim() != 2 or weights.shape != order.rows.shape:
        raise ValueError(f"y has shape {list(y.shape)}, weights {list(weights.shape)}; rows {list(order.rows.shape)}")
    if y.is_cuda and y.dtype != torch.float64:
        from seamount.kernels.triton import moe as triton_moe

        return triton_moe.combine(y, order.rows, weights, shared)
    wide = wide_dtype(y.dtype)
    out = torch.zeros((weights.shape[0], y.shape[1]), dtype=wide, device=y.device)
    for k in range(weights.shape[1]):
        present = (order.rows[:, k] >= 0).nonzero().squeeze(1)
        out[present] += y[order.rows[present, k]].to(wide) * weights[present, k, None].to(wide)
    return (out if shared is None else out + shared.to(wide)).to(y.dtype)


def _best_first(x: Tensor) -> Tensor:
    return torch.sort(x, dim=1, descending=True, stable=True).indices
