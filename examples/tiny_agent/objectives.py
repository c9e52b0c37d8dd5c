"""What training minimises over the vocabulary: next tokens, and sampled tokens weighed by their advantage.

The logits of ``HEAD_ROWS`` rows exist at one time. Their gradients are formed together with the loss, so no logits are
kept or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.tiny_agent.compiling import compiled

HEAD_ROWS = 8192
"""Rows whose logits exist at one time."""
CLIP = 0.2
"""How far a sampled token's probability may move from the one it was drawn with before it stops to count."""
MAX_RATIO = 3.0
"""An unwelcome token that has become likelier than so many times what it was drawn with does not count either
(arXiv 1912.09729): the engine that draws and the trainer select tokens a little differently."""


class HeadSums(NamedTuple):
    """loss: the sum over rows. seen: rows whose likeliest token is the target, of ``cross_entropy``; rows that were
    clipped and the sum of log^2(r_i) / 2 over the others [2], of ``policy_loss``."""

    loss: Tensor
    seen: Tensor


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> HeadSums:
    """sum_i weights_i (logsumexp(z_i) - z_i[targets_i]) with z = hidden head^T.

    hidden: [n, hidden]; head: [vocab, hidden] float32; targets: [n] int64; weights: [n] float32.
    """
    return HeadSums(*_RowBlocks.apply(block_cross_entropy, hidden, head, targets, weights))


def policy_loss(hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor, drawn: Tensor) -> HeadSums:
    """-sum_i max(min(r_i A_i, clip(r_i, 1 - CLIP, 1 + CLIP) A_i), MAX_RATIO A_i if A_i < 0) with
    r_i = exp(log p_i[targets_i] - drawn_i).

    advantages: [n] float32, 0 where nothing was sampled; drawn: [n] float32, the log-probability that the target was
    drawn with (PPO's clipped objective, arXiv 1707.06347; used by GRPO).
    """
    return HeadSums(*_RowBlocks.apply(block_policy_loss, hidden, head, targets, advantages, drawn))


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Callable[..., tuple[Tensor, ...]], hidden: Tensor, head: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, seen = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        matrix = head.to(hidden.dtype)
        for start in range(0, hidden.shape[0], HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            part, some, d_rows, d_part = block(hidden[rows], matrix, *(column[rows] for column in columns))
            loss, seen = loss + part, seen + some
            d_hidden[rows] = d_rows
            d_head += d_part
        ctx.save_for_backward(d_hidden, d_head)
        ctx.num_columns = len(columns)
        ctx.mark_non_differentiable(seen)
        return loss, seen

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_seen: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return None, d_hidden * d_loss.to(d_hidden.dtype), d_head * d_loss, *[None] * ctx.num_columns


@compiled
def block_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and correct predictions of one block, gradient of its hidden states and of the head."""
    logits, log_share, at_target, logprobs = _shares(hidden, head, targets)
    correct = torch.where(at_target, logits, float("-inf")).amax(-1) >= logits.amax(-1)
    return (
        -(weights * logprobs).sum(),
        (weights * correct).sum(),
        *_gradients(hidden, head, log_share, at_target, weights),
    )


@compiled
def block_policy_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor, drawn: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and clipped rows of one block, gradient of its hidden states and of the head."""
    _, log_share, at_target, logprobs = _shares(hidden, head, targets)
    ratio = (logprobs - drawn).exp()
    kept = torch.where(advantages > 0, ratio <= 1 + CLIP, (ratio >= 1 - CLIP) & (ratio <= MAX_RATIO))
    bounded = torch.where(advantages > 0, ratio.clamp_max(1 + CLIP), ratio.clamp(1 - CLIP, MAX_RATIO))
    loss = -(bounded * advantages).sum()
    # d loss / d logprob = -r A where it is not clipped: the gradient of a cross entropy with these weights.
    weights = torch.where(kept, ratio * advantages, 0.0)
    learnt = advantages != 0
    apart = torch.where(learnt & kept, (logprobs - drawn).square() / 2, 0.0)
    seen = torch.stack(((~kept & learnt).float().sum(), apart.sum()))
    return loss, seen, *_gradients(hidden, head, log_share, at_target, weights)


def _shares(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = (hidden @ head.T).float()
    log_share = logits - logits.logsumexp(-1, keepdim=True)
    at_target = torch.arange(head.shape[0], device=head.device) == targets.unsqueeze(-1)
    return logits, log_share, at_target, torch.where(at_target, log_share, 0.0).sum(-1)


def _gradients(
    hidden: Tensor, head: Tensor, log_share: Tensor, at_target: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Of sum_i weights_i (-log p_i[targets_i]) by the hidden states and the head."""
    d_logits = ((log_share.exp() - at_target.float()) * weights.unsqueeze(-1)).to(hidden.dtype)
    return d_logits @ head, (d_logits.T @ hidden).float()
