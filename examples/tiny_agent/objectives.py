"""What the stages minimise: next tokens, the tokens after them, the indexer's divergence; and the experts' balance."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.tiny_agent.compiling import compiled

HEAD_ROWS = 8192
"""Rows whose logits exist at one time."""


class HeadSums(NamedTuple):
    """Over the weighted rows: cross entropy in nats and the number of rows whose likeliest token is the target."""

    loss: Tensor
    correct: Tensor


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> HeadSums:
    """sum_i weights_i (logsumexp(z_i) - z_i[targets_i]) with z = hidden head^T, ``HEAD_ROWS`` rows at a time.

    hidden: [n, hidden]; head: [vocab, hidden] float32; targets: [n] int64; weights: [n] float32. The gradients are
    formed together with the loss while a block's logits exist, so no logits are kept or computed twice.
    """
    loss, correct = _ChunkedCrossEntropy.apply(hidden, head, targets, weights)
    return HeadSums(loss, correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss, correct = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        matrix = head.to(hidden.dtype)
        for start in range(0, hidden.shape[0], HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            part, right, d_rows, d_part = block_cross_entropy(hidden[rows], matrix, targets[rows], weights[rows])
            loss, correct = loss + part, correct + right
            d_hidden[rows] = d_rows
            d_head += d_part
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_correct: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_head * d_loss, None, None


@compiled
def block_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and correct predictions of one block, gradient of its hidden states and of the head."""
    logits = (hidden @ head.T).float()
    normalizer = logits.logsumexp(-1, keepdim=True)
    columns = torch.arange(head.shape[0], device=head.device)
    at_target = columns == targets.unsqueeze(-1)
    picked = torch.where(at_target, logits, 0.0).sum(-1)
    loss = (weights * (normalizer.squeeze(-1) - picked)).sum()
    correct = (weights * (picked >= logits.amax(-1))).sum()
    d_logits = ((logits - normalizer).exp() - at_target.float()) * weights.unsqueeze(-1)
    d_logits = d_logits.to(hidden.dtype)
    return loss, correct, d_logits @ head, (d_logits.T @ hidden).float()
