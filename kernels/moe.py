"""The expert gate."""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.quant import wide_dtype


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
    wide = wide_dtype(x.dtype)
    scores = torch.sigmoid(x.to(wide) @ weight.to(wide).T)
    choice = scores + bias.to(wide)
    if num_chosen_groups < num_groups:
        groups = choice.view(-1, num_groups, weight.shape[0] // num_groups)
        group_scores = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(dim=2)
        dropped = _best_first(group_scores)[:, num_chosen_groups:]
        # -inf, not 0: with a negative bias a chosen group's c may lie below 0.
        choice = groups.scatter(1, dropped.unsqueeze(2).expand(-1, -1, groups.shape[2]), float("-inf")).flatten(1)
    ids = _best_first(choice)[:, :num_chosen]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return weights * scale, ids


def _best_first(x: Tensor) -> Tensor:
    return torch.sort(x, dim=1, descending=True, stable=True).indices
