"""Training the lightning indexer, and attention over what it selects.

The indexer learns to imitate the main model's attention: with p the heads' attention summed and normalised to 1,

    L = mean_t KL(p_t || softmax(I_t))          over all visible tokens in the warm-up, over the selected ones after it

Its input is detached: L moves the indexer alone. So its gradient is formed at once, layer by layer, and nothing of it
is kept for the model's own backward pass. L is a mean over rows: one row of ``ROW_STRIDE``, drawn anew in every step
and layer, estimates it without bias at a fraction of the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from examples.tiny_agent.attention import BLOCK, DenseAttention, attend, block_mask
from examples.tiny_agent.compiling import compiled
from examples.tiny_agent.index_scores import attention_mass, index_scores, visible
from examples.tiny_agent.model import Angles, Layer, Projected
from seamount.kernels.topk import topk_indices

ROW_STRIDE = 16
"""Of how many rows one is compared with the main model's attention. On CUDA lengths are multiples of 128 of it."""
SELECTION_ROWS = 2048
"""Rows whose scores against all keys exist at one time while tokens are selected."""


class Rows:
    """Packed documents of one batch. document_ids: [B, T] int, negative in padding, which comes last in a row.

    num_tokens: of the batch that L is a mean over, where these rows are a part of it; None where they are all of it.
    """

    def __init__(self, document_ids: Tensor, positions: Tensor, num_tokens: float | None = None) -> None:
        batch, length = document_ids.shape
        self.real = document_ids >= 0
        self.numbers = torch.arange(length, device=document_ids.device).expand(batch, -1)
        """[B, T]: of each row in its sequence."""
        self.starts = torch.where(self.real, self.numbers - positions, self.numbers)
        """[B, T]: the first token that each one sees; padding sees itself."""
        self.num_tokens = num_tokens

    def draw(self, generator: torch.Generator) -> Tensor:
        """One row of every ``ROW_STRIDE``, at random: [B, T / ROW_STRIDE] int64, ascending."""
        batch, length = self.real.shape
        firsts = torch.arange(0, length, ROW_STRIDE, device=self.real.device)
        shape = (batch, firsts.shape[0])
        return firsts + torch.randint(ROW_STRIDE, shape, generator=generator, device=self.real.device)


class IndexerWarmUp:
    """Dense attention of a frozen model; every layer's indexer takes its gradient on the way.

    Call it under ``torch.no_grad``. ``divergence``: sum of L over the layers seen so far.
    """

    def __init__(self, rows: Rows, dense: DenseAttention, scale: float, generator: torch.Generator) -> None:
        self._rows, self._dense, self._scale, self._generator = rows, dense, scale, generator
        self.divergence = torch.zeros((), device=rows.real.device)

    def __call__(self, layer: Layer, projected: Projected, angles: Angles) -> Tensor:
        out, lse = self._dense.attend(projected)
        drawn = self._rows.draw(self._generator)
        self.divergence += learn(layer, projected, lse, angles, self._rows, drawn, None, self._scale)
        return out


class SelectedAttention:
    """Attention over the ``topk`` tokens that the indexer scores highest, which goes on learning from it.

    With ``generator`` None the indexer takes no gradient.
    """

    def __init__(self, rows: Rows, topk: int, scale: float, generator: torch.Generator | None) -> None:
        self._rows, self._topk, self._scale, self._generator = rows, topk, scale, generator
        self.divergence = torch.zeros((), device=rows.real.device)

    def __call__(self, layer: Layer, projected: Projected, angles: Angles) -> Tensor:
        with torch.no_grad():
            index, x = layer.self_attn.indexer, projected.x
            q, weights = index.queries(x, projected.q_latent, angles)
            picked = select(q, index.keys(x, angles), weights, self._rows, self._topk)
        out, lse = attend(projected, selection_mask(picked), self._scale)
        if self._generator is not None:
            fixed = Projected(*(tensor.detach() for tensor in projected))
            drawn = self._rows.draw(self._generator)
            self.divergence += learn(layer, fixed, lse.detach(), angles, self._rows, drawn, picked, self._scale)
        return out


def select(q: Tensor, k: Tensor, weights: Tensor, rows: Rows, topk: int) -> Tensor:
    """The tokens of the ``topk`` largest scores of each row: [B, T, topk] int64, -1 where a row sees fewer.

    q: [B, T, H, D]; k: [B, T, D]; weights: [B, T, H].
    """
    batch, length = rows.starts.shape
    picked = []
    for first in range(0, length, SELECTION_ROWS):
        own = slice(first, min(first + SELECTION_ROWS, length))
        starts, numbers = rows.starts[:, own], rows.numbers[:, own]
        scores = index_scores(q[:, own], k[:, : own.stop], weights[:, own], starts, numbers)
        found = topk_indices(scores.flatten(0, 1), topk, (numbers + 1).flatten()).unflatten(0, (batch, -1))
        # Where a row sees fewer, tokens of other documents fill the rest.
        picked.append(found.masked_fill(found < starts.unsqueeze(-1), -1))
    return torch.cat(picked, 1)


def selected_pairs(picked: Tensor, length: int) -> Tensor:
    """[B, R, topk] numbers of keys, -1 for none, to [B, R, length] bool."""
    pairs = torch.zeros((*picked.shape[:2], length + 1), dtype=torch.bool, device=picked.device)
    return pairs.scatter_(2, picked.masked_fill(picked < 0, length), True)[..., :length]


def selection_mask(picked: Tensor) -> BlockMask | Tensor:
    """[B, T, topk] to the mask of ``attend``."""
    if not picked.is_cuda:
        return selected_pairs(picked, picked.shape[1])
    words, blocks = selected_bits(picked)

    def selected(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((words[batch, key >> 5, query] >> (key & 31)) & 1) == 1

    return block_mask(blocks, torch.zeros_like(blocks), selected)


def selected_bits(picked: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, topk] to words [B, T / 32, T] int32, key k of a row in bit k % 32 of word k // 32, and the blocks that
    hold a pair [B, T / 128, T / 128] bool. T is a multiple of 128; Triton runs it."""
    from examples.tiny_agent import selection_kernels

    batch, length, count = picked.shape
    words = torch.zeros((batch, length // 32, length), dtype=torch.int32, device=picked.device)
    blocks = torch.zeros((batch, length // BLOCK, length // BLOCK), dtype=torch.int8, device=picked.device)
    width = 1 << (count - 1).bit_length()
    selection_kernels.selected_bits[(length, batch)](
        picked.contiguous(), words, blocks, length, COUNT=count, WIDTH=width, num_warps=4
    )
    return words, blocks.bool()


def learn(
    layer: Layer,
    projected: Projected,
    lse: Tensor,
    angles: Angles,
    rows: Rows,
    drawn: Tensor,
    picked: Tensor | None,
    scale: float,
) -> Tensor:
    """Add the gradient of L to the indexer's parameters; returns L.

    projected, lse: the attention's, without gradient. drawn: [B, R], the rows that L is a mean over. picked: what was
    selected [B, T, topk], None for all visible tokens.
    """
    index = layer.self_attn.indexer
    own = torch.arange(drawn.shape[0], device=drawn.device).unsqueeze(1)
    starts = rows.starts[own, drawn]
    mass = attention_mass(projected.q[own, drawn], projected.k, _at(lse, drawn), starts, drawn, scale)
    length = mass.shape[2]
    allowed = visible(starts, drawn, length) if picked is None else selected_pairs(picked[own, drawn], length)
    weight = rows.real[own, drawn].float()
    with torch.enable_grad():
        drawn_angles = (angles[0][own, drawn], angles[1][own, drawn])
        q, heads = index.queries(projected.x[own, drawn], projected.q_latent[own, drawn], drawn_angles)
        scores = index_scores(q, index.keys(projected.x, angles), heads, starts, drawn)
        count = weight.sum().clamp_min(1.0) if rows.num_tokens is None else rows.num_tokens / ROW_STRIDE
        loss = divergence(mass, scores, allowed, weight / count)
        loss.backward()
    return loss.detach()


@compiled
def divergence(target: Tensor, scores: Tensor, allowed: Tensor, weight: Tensor) -> Tensor:
    """sum_r weight_r KL(target_r || softmax(scores_r)) over the allowed keys: [B, R, T] each, weight [B, R]."""
    target = target.masked_fill(~allowed, 0.0)
    log_share = scores.masked_fill(~allowed, float("-inf")).log_softmax(-1)
    terms = torch.special.xlogy(target, target) - target * log_share
    return (torch.where(allowed, terms, 0.0).sum(-1) * weight).sum()


def _at(lse: Tensor, drawn: Tensor) -> Tensor:
    """[B, H, T] to [B, H, R]."""
    return lse.gather(2, drawn.unsqueeze(1).expand(-1, lse.shape[1], -1))
