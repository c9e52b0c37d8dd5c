"""Which tokens a query attends to during training: its document up to itself, or the indexer's choice of it.

Rows hold several documents; attention stays inside one. On CUDA both forms run in FlexAttention, which skips blocks of
128 x 128 that hold no visible pair; elsewhere a boolean mask says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from examples.tiny_agent.compiling import compiled
from examples.tiny_agent.model import Angles, Layer, Projected

BLOCK = 128
"""Rows and keys of a block of FlexAttention's mask; sequence lengths are multiples of it on CUDA."""
_TILES: Any = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 8}


class DenseAttention:
    """Every token of the document up to the query.

    document_ids: [B, T] int, not decreasing within a row apart from a negative id for padding at its end.
    """

    def __init__(self, document_ids: Tensor, scale: float) -> None:
        self._scale = scale
        ids = document_ids.masked_fill(document_ids < 0, document_ids.shape[1])
        self._mask = document_mask(ids) if ids.is_cuda else visible_pairs(ids)

    def __call__(self, layer: Layer, projected: Projected, angles: Angles) -> Tensor:
        return self.attend(projected)[0]

    def attend(self, projected: Projected) -> tuple[Tensor, Tensor]:
        """See ``attend``."""
        return attend(projected, self._mask, self._scale)


@compiled
def attend(projected: Projected, mask: BlockMask | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v over the visible pairs; mask: a BlockMask, or [B, T, T] bool.

    Returns the heads' values [B, T, H, V] and the logarithms of the softmaxes' denominators [B, H, T] float32.
    """
    q, k, v = (heads.transpose(1, 2) for heads in (projected.q, projected.k, projected.v))
    if isinstance(mask, BlockMask):
        aux = AuxRequest(lse=True)
        out, extra = flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=aux, kernel_options=_TILES)
        assert extra.lse is not None
        return out.transpose(1, 2), extra.lse
    logits = ((q @ k.mT).float() * scale).masked_fill(~mask.unsqueeze(1), float("-inf"))
    lse = logits.logsumexp(-1)
    share = (logits - lse.unsqueeze(-1)).exp().to(v.dtype)
    return (share @ v).transpose(1, 2), lse


def visible_pairs(document_ids: Tensor) -> Tensor:
    """[B, T] to [B, T, T] bool: the same document, not later."""
    number = torch.arange(document_ids.shape[1], device=document_ids.device)
    return (document_ids.unsqueeze(2) == document_ids.unsqueeze(1)) & (number <= number.unsqueeze(1))


def document_mask(document_ids: Tensor) -> BlockMask:
    """The blocks of ``visible_pairs`` from the documents at their edges: nothing of size T x T is ever made.

    document_ids: [B, T] int, T a multiple of 128, not decreasing within a row.
    """
    first, last = document_ids[:, ::BLOCK], document_ids[:, BLOCK - 1 :: BLOCK]
    number = torch.arange(first.shape[1], device=first.device)
    earlier = number < number.unsqueeze(1)
    # [B, query blocks, key blocks]; ids do not decrease, so documents overlap where the edges do.
    full = earlier & (first.unsqueeze(1) == last.unsqueeze(2))
    partial = (number <= number.unsqueeze(1)) & (last.unsqueeze(1) >= first.unsqueeze(2)) & ~full

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document_ids[batch, query] == document_ids[batch, key])

    return block_mask(partial, full, visible)


def block_mask(partial: Tensor, full: Tensor, visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> BlockMask:
    """partial, full: [B, query blocks, key blocks] bool: blocks that ``visible`` decides, and those it need not."""
    length = partial.shape[1] * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has and their numbers, those first: [B, 1, rows] and [B, 1, rows, columns] int32."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
