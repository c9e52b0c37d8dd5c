"""Batches on the device, with the rows whose next tokens are learnt picked out on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.tiny_agent.data import PADDING, Batch
from examples.tiny_agent.objectives import HEAD_ROWS


@dataclass(frozen=True, slots=True)
class Targets:
    """The rows of [B T] that predict a learnt token, padded with rows of weight 0 to whole blocks of logits.

    rows, tokens: [n] int64; weights: [n] float32; count: of weight 1.
    """

    rows: Tensor
    tokens: Tensor
    weights: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Fed:
    """tokens: [B, T] int64; document_ids, positions: [B, T] int32; next_tokens, after_next: what the head of the model
    and that of multi-token prediction learn; num_tokens: without padding; mean_context: tokens that a token sees."""

    tokens: Tensor
    document_ids: Tensor
    positions: Tensor
    next_tokens: Targets
    after_next: Targets
    num_tokens: int
    mean_context: float


def feed(batch: Batch, device: torch.device) -> Fed:
    real = batch.document_ids != PADDING
    return Fed(
        tokens=_sent(batch.tokens.astype(np.int64), device),
        document_ids=_sent(batch.document_ids, device),
        positions=_sent(batch.positions, device),
        next_tokens=_targets(batch, 1, device),
        after_next=_targets(batch, 2, device),
        num_tokens=int(real.sum()),
        mean_context=float((batch.positions[real] + 1.0).mean()) if real.any() else 0.0,
    )


def _targets(batch: Batch, ahead: int, device: torch.device) -> Targets:
    """The learnt tokens whose row, ``ahead`` before them, is of the same document."""
    learnt = batch.loss_mask & (batch.positions >= ahead)
    at = np.flatnonzero(learnt)
    padded = max(1, -(-len(at) // HEAD_ROWS)) * HEAD_ROWS
    return Targets(
        rows=_sent(_padded(at - ahead, padded), device),
        tokens=_sent(_padded(batch.tokens.reshape(-1)[at].astype(np.int64), padded), device),
        weights=_sent(_padded(np.ones(len(at), np.float32), padded), device),
        count=len(at),
    )


def _padded(values: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.generic]:
    return np.concatenate((values, np.zeros(length - len(values), values.dtype)))


def _sent(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
