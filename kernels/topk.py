"""Exact top-k with a defined choice among equals."""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.arguments import INTEGERS, check_current, check_tensor

MAX_CUDA_K = 4096
"""The most that the CUDA kernel selects: its candidates are in one program's registers."""


def topk_indices(logits: Tensor, k: int, lengths: Tensor) -> Tensor:
    """The k largest of each row's first ``lengths[t]`` scores.

    Among equal scores the lowest indices are taken: ReLU makes plateaus of exact zeros, and every rank and every
    chunking must choose the same set. NaN counts as -inf.

    logits: [T, L] float, whatever beyond ``lengths[t]``; lengths: [T] int64, 0 <= lengths[t] <= L; k >= 1.
    Returns [T, k] int64: min(k, lengths[t]) distinct indices in ascending order, then -1.
    On CUDA: logits float32 with adjacent columns, lengths int32 or int64, 0 <= L < 2^31; ValueError for anything else.
    A k above ``MAX_CUDA_K`` takes torch's operations there too.
    """
    if logits.is_cuda:
        _check(logits, k, lengths)
    if logits.is_cuda and k <= MAX_CUDA_K:
        from seamount.kernels.triton import topk

        return topk.topk_indices(logits, k, lengths)
    num_rows, num_keys = logits.shape
    out = torch.full((num_rows, k), -1, dtype=torch.int64, device=logits.device)
    if num_rows == 0 or num_keys == 0:
        return out
    legal = torch.arange(num_keys, device=logits.device) < lengths.unsqueeze(1)
    scores = torch.where(legal & ~logits.isnan(), logits, float("-inf"))
    counts = lengths.clamp(max=k)
    kth = scores.topk(min(k, num_keys), dim=1).values[:, -1:]
    chosen = scores > kth
    equal = (scores == kth) & legal
    wanted = (counts - chosen.sum(dim=1)).unsqueeze(1)
    if bool((equal.sum(dim=1, keepdim=True) > wanted).any()):
        equal &= equal.cumsum(dim=1) <= wanted
    chosen |= equal
    # Row-major order of nonzero and of the boolean assignment agree, and each row has exactly its count.
    out[torch.arange(k, device=logits.device) < counts.unsqueeze(1)] = chosen.nonzero()[:, 1]
    return out


def _check(logits: Tensor, k: int, lengths: Tensor) -> None:
    check_current(logits.device)
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits is {logits.dtype} {tuple(logits.shape)}; it must be float32 [T, L]")
    if logits.shape[1] >= 1 << 31:
        raise ValueError(f"logits has {logits.shape[1]} columns; there must be fewer than 2^31")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError("logits has strided columns; the scores of a row must be adjacent")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    check_tensor("lengths", lengths, (logits.shape[0],), logits.device, INTEGERS)
