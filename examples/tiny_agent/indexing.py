"""Training the lightning indexer, and attention over what it selects.

The indexer learns to imitate the main model's attention: with p the heads' attention summed and normalised to 1,

    L = mean_t KL(p_t || softmax(I_t))          over all visible tokens in the warm-up, over the selected ones after it

Its input is detached: L moves the indexer alone. So its gradient is formed at once, layer by layer and in blocks of
rows, and no [rows, heads, keys] array outlives its block. L is a mean over rows: one row of ``ROW_STRIDE``, drawn anew
in every step and layer, estimates it without bias at a fraction of the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.tiny_agent.attention import BLOCK, DenseAttention, attend, block_mask
from examples.tiny_agent.compiling import compiled
from examples.tiny_agent.index_scores import index_scores
from examples.tiny_agent.model import Angles, Layer, Projected
from seamount.kernels.topk import topk_indices

ROW_STRIDE = 8
"""Of how many rows one is compared with the main model's attention."""
DIVERGENCE_ELEMENTS = 1 << 21
"""Pairs of rows and keys whose scores, of every head, exist at one time while the indexer learns."""
SELECTION_ROWS = 2048
"""Rows whose scores against all keys exist at one time while tokens are selected."""


class Rows:
    """Packed documents of one batch. document_ids: [B, T] int, negative in padding, which comes last in a row."""

    def __init__(self, document_ids: Tensor, positions: Tensor) -> None:
        length = document_ids.shape[1]
        self.ids = document_ids.masked_fill(document_ids < 0, length)
        self.real = document_ids >= 0
        number = torch.arange(length, device=document_ids.device)
        self.starts = torch.where(self.real, number - positions, number)
        """[B, T]: the first token that each one sees; padding sees itself."""


class IndexerWarmUp:
    """Dense attention of a frozen model; every layer's indexer takes its gradient on the way.

    Call it under ``torch.no_grad``. ``divergence``: sum of L over the layers seen so far.
    """

    def __init__(self, rows: Rows, dense: DenseAttention, scale: float, generator: torch.Generator) -> None:
        self._rows, self._dense, self._scale, self._generator = rows, dense, scale, generator
        self.divergence = torch.zeros((), device=rows.ids.device)

    def __call__(self, layer: Layer, projected: Projected, angles: Angles) -> Tensor:
        drawn = _draw_rows(*self._rows.ids.shape, self._generator)
        self.divergence += learn(layer, projected, angles, self._rows, drawn, None, self._scale)
        return self._dense(layer, projected, angles)


class SelectedAttention:
    """Attention over the ``topk`` tokens that the indexer scores highest, which goes on learning from it.

    With ``generator`` None the indexer takes no gradient.
    """

    def __init__(self, rows: Rows, topk: int, scale: float, generator: torch.Generator | None) -> None:
        self._rows, self._topk, self._scale, self._generator = rows, topk, scale, generator
        self.divergence = torch.zeros((), device=rows.ids.device)

    def __call__(self, layer: Layer, projected: Projected, angles: Angles) -> Tensor:
        with torch.no_grad():
            index, x = layer.self_attn.indexer, projected.x
            q, weights = index.queries(x, projected.q_latent, angles)
            picked = select(q, index.keys(x, angles), weights, self._rows.starts, self._topk)
        if self._generator is not None:
            drawn = _draw_rows(*self._rows.ids.shape, self._generator)
            detached = Projected(*(tensor.detach() for tensor in projected))
            self.divergence += learn(layer, detached, angles, self._rows, drawn, picked, self._scale)
        return attend(projected, selection_mask(picked), self._scale)


def select(q: Tensor, k: Tensor, weights: Tensor, starts: Tensor, topk: int) -> Tensor:
    """The tokens of the ``topk`` largest scores of each row: [B, T, topk] int64, -1 where a row sees fewer.

    q: [B, T, H, D]; k: [B, T, D]; weights: [B, T, H]; starts: [B, T].
    """
    batch, length = starts.shape
    picked = []
    for first in range(0, length, SELECTION_ROWS):
        end = min(first + SELECTION_ROWS, length)
        rows = slice(first, end)
        scores = index_scores(q, k, weights, starts, first, end)
        lengths = torch.arange(first + 1, end + 1, device=q.device).repeat(batch)
        found = topk_indices(scores.flatten(0, 1), topk, lengths).unflatten(0, (batch, end - first))
        # Where a row sees fewer, tokens of other documents fill the rest.
        picked.append(found.masked_fill(found < starts[:, rows].unsqueeze(-1), -1))
    return torch.cat(picked, 1)


def selection_mask(picked: Tensor) -> object:
    """[B, T, topk] to what ``attend`` reads."""
    batch, length, _ = picked.shape
    visible = torch.zeros((batch, length, length + 1), dtype=torch.bool, device=picked.device)
    visible.scatter_(2, picked.masked_fill(picked < 0, length), True)
    visible = visible[:, :, :length]
    if not picked.is_cuda:
        return visible.unsqueeze(1)
    words, blocks = pack_bits(visible)

    def selected(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((words[batch, query, key >> 5] >> (key & 31)) & 1) == 1

    return block_mask(blocks, torch.zeros_like(blocks), selected)


@compiled
def pack_bits(visible: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, T] bool to [B, T, T / 32] int32, key k in bit k % 32 of word k // 32, and the blocks that hold a pair."""
    bits = torch.arange(32, dtype=torch.int32, device=visible.device)
    words = (visible.unflatten(2, (-1, 32)).to(torch.int32) << bits).sum(-1, dtype=torch.int32)
    tiles = words.unflatten(2, (-1, BLOCK // 32)).unflatten(1, (-1, BLOCK))
    return words, (tiles != 0).any(-1).any(2)


def learn(
    layer: Layer, projected: Projected, angles: Angles, rows: Rows, drawn: Tensor, picked: Tensor | None, scale: float
) -> Tensor:
    """Add the gradient of L to the indexer's parameters; returns L.

    drawn: [B, R], the rows that it is a mean over. picked: [B, T, topk] or None for all visible tokens.
    """
    index = layer.self_attn.indexer
    batch, count = drawn.shape
    own = torch.arange(batch, device=drawn.device).unsqueeze(1)
    weight = rows.real[own, drawn].float()
    weight = weight / weight.sum().clamp_min(1.0)
    with torch.enable_grad():
        drawn_angles = (angles[0][own, drawn], angles[1][own, drawn])
        outputs = (
            *index.queries(projected.x[own, drawn], projected.q_latent[own, drawn], drawn_angles),
            index.keys(projected.x, angles),
        )
    inputs = tuple(output.detach().requires_grad_() for output in outputs)
    q, heads, k = inputs
    total = torch.zeros((), device=drawn.device)
    width = rows.ids.shape[1] if picked is None else picked.shape[2]
    size = max(1, DIVERGENCE_ELEMENTS // width)
    for b in range(batch):
        for start in range(0, count, size):
            at = slice(start, start + size)
            chosen = drawn[b, at]
            seen = _all_visible(rows.starts[b], chosen) if picked is None else picked[b, chosen] >= 0
            slots = None if picked is None else picked[b, chosen].clamp_min(0)
            with torch.enable_grad():
                target = attention_mass(projected.q[b, chosen], projected.k[b], seen, slots, scale)
                loss = block_divergence(target, q[b, at], k[b], heads[b, at], seen, slots, weight[b, at])
                loss.backward()
            total += loss.detach()
    torch.autograd.backward(outputs, tuple(leaf.grad for leaf in inputs))
    return total


@torch.no_grad()
@compiled
def attention_mass(q: Tensor, k: Tensor, seen: Tensor, slots: Tensor | None, scale: float) -> Tensor:
    """The heads' attention, summed and normalised to 1: [R, S] float32.

    q: [R, H, D]; k: [T, H, D]; seen: [R, S] bool; slots: [R, S] keys of each row, None where S = T are all of them.
    """
    if slots is None:
        logits = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0)).transpose(0, 1)
    else:
        logits = (q.unsqueeze(2) @ k[slots].permute(0, 2, 3, 1)).squeeze(2)
    logits = (logits.float() * scale).masked_fill(~seen.unsqueeze(1), float("-inf"))
    return logits.softmax(-1).mean(1)


@compiled
def block_divergence(
    target: Tensor, q: Tensor, k: Tensor, heads: Tensor, seen: Tensor, slots: Tensor | None, weight: Tensor
) -> Tensor:
    """sum_r weight_r KL(target_r || softmax(I_r)); q: [R, H, D]; k: [T, D]; heads: [R, H]; others as above."""
    keys = k.T if slots is None else k[slots].transpose(1, 2)
    scores = ((q @ keys).relu().float() * heads.unsqueeze(-1)).sum(1)
    log_share = scores.masked_fill(~seen, float("-inf")).log_softmax(-1).masked_fill(~seen, 0.0)
    return ((torch.special.xlogy(target, target) - target * log_share).sum(-1) * weight).sum()


def _all_visible(starts: Tensor, chosen: Tensor) -> Tensor:
    number = torch.arange(starts.shape[0], device=starts.device)
    return (number >= starts[chosen].unsqueeze(1)) & (number <= chosen.unsqueeze(1))


def _draw_rows(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """One row of every ``ROW_STRIDE``, at random: [B, T / ROW_STRIDE], ascending."""
    firsts = torch.arange(0, length, ROW_STRIDE, device=generator.device)
    shape = (batch, firsts.shape[0])
    return firsts + torch.randint(ROW_STRIDE, shape, generator=generator, device=generator.device)
