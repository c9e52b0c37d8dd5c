"""The softmax of the attention references."""

from __future__ import annotations

from torch import Tensor


def masked_softmax(scores: Tensor, masked: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * scores) over the last dimension without the masked keys, and its log denominator.

    scores: [..., L], overwritten; masked: bool, broadcastable to it. L may be 0.
    Returns (probabilities [..., L], lse [...]); a row without any key has probabilities 0 and lse +inf.
    """
    scores.mul_(scale).masked_fill_(masked, float("-inf"))
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("inf"))
    top = scores.amax(dim=-1, keepdim=True)
    top.masked_fill_(top == float("-inf"), 0)
    scores.sub_(top).exp_()
    total = scores.sum(dim=-1, keepdim=True)
    empty = total == 0
    scores.div_(total.masked_fill(empty, 1))
    lse = (total.log() + top).masked_fill_(empty, float("inf"))
    return scores, lse.squeeze(-1)
