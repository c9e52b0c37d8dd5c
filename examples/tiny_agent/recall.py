"""How much of the true attention falls on the tokens that the indexer selects.

For a query, p is the heads' dense attention, summed and normalised to 1; recall is the p of the selected tokens. The
best that any selection of so many tokens can reach is the sum of the largest p, and stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.tiny_agent.attention import BLOCK, DenseAttention
from examples.tiny_agent.export import load_checkpoint
from examples.tiny_agent.index_scores import attention_mass, index_scores
from examples.tiny_agent.indexing import Rows
from examples.tiny_agent.model import Angles, Layer, Model, Projected
from seamount.kernels.topk import topk_indices
from seamount.workers.model.config import ModelConfig

NUM_QUERIES = 128
"""Of a prompt: its last ones, where the question and the answer are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecall:
    """Means over queries. best: of the best selection of the same size."""

    layer: int
    recall: float
    best: float
    num_queries: int


def load_model(checkpoint: Path, *, device: str, dtype: torch.dtype = torch.bfloat16) -> Model:
    """The trainer's model with a checkpoint's parameters."""
    model = Model(ModelConfig.from_json(checkpoint), dtype)
    load_checkpoint(model, checkpoint)
    return model.to(device).eval()


@torch.no_grad()
def indexer_recall(model: Model, prompts: Sequence[Sequence[int]], *, length: int = 0) -> list[LayerRecall]:
    """Per layer, over the last ``NUM_QUERIES`` tokens of each prompt; prompts shorter than the selection are left out.

    prompts: token ids, each longer than ``NUM_QUERIES``. length: prompts are filled up to so many tokens, or to their
    own; on CUDA every length that occurs is compiled anew.
    """
    device, topk = model.embed_tokens.device, model.config.index_topk
    sums = np.zeros((model.config.num_hidden_layers, 2))
    num_queries = 0
    for prompt in prompts:
        if len(prompt) <= topk + NUM_QUERIES:
            continue
        padded = -(-max(len(prompt), length) // BLOCK) * BLOCK
        tokens = torch.zeros((1, padded), dtype=torch.int64, device=device)
        tokens[0, : len(prompt)] = torch.tensor(prompt, device=device)
        ids = torch.full((1, padded), -1, dtype=torch.int32, device=device)
        ids[0, : len(prompt)] = 0
        positions = torch.arange(padded, device=device).unsqueeze(0)
        queries = torch.arange(len(prompt) - NUM_QUERIES, len(prompt), device=device).unsqueeze(0)
        meter = _Meter(Rows(ids, positions), DenseAttention(ids, model.config.softmax_scale), queries, model)
        model(tokens, model.angles(positions), meter)
        sums += np.array(meter.sums[: len(sums)])
        num_queries += NUM_QUERIES
    return [
        LayerRecall(layer=i, recall=row[0] / num_queries, best=row[1] / num_queries, num_queries=num_queries)
        for i, row in enumerate(sums.tolist())
        if num_queries
    ]


class _Meter:
    """Dense attention that measures, layer by layer, what a selection would have kept. sums: of recall and best."""

    def __init__(self, rows: Rows, dense: DenseAttention, queries: Tensor, model: Model) -> None:
        self._rows, self._dense, self._queries = rows, dense, queries
        self._topk, self._scale = model.config.index_topk, model.config.softmax_scale
        self.sums: list[tuple[float, float]] = []

    def __call__(self, layer: Layer, projected: Projected, angles: Angles) -> Tensor:
        out, lse = self._dense.attend(projected)
        rows, index = self._queries, layer.self_attn.indexer
        own = torch.zeros_like(rows)
        starts = self._rows.starts[own, rows]
        at_rows = lse.gather(2, rows.unsqueeze(1).expand(-1, lse.shape[1], -1))
        mass = attention_mass(projected.q[own, rows], projected.k, at_rows, starts, rows, self._scale)
        row_angles = (angles[0][own, rows], angles[1][own, rows])
        q, weights = index.queries(projected.x[own, rows], projected.q_latent[own, rows], row_angles)
        scores = index_scores(q, index.keys(projected.x, angles), weights, starts, rows)
        picked = topk_indices(scores.flatten(0, 1), self._topk, (rows + 1).flatten())
        kept = mass.flatten(0, 1).gather(1, picked.clamp(min=0)).masked_fill(picked < 0, 0.0)
        best = mass.flatten(0, 1).topk(self._topk, dim=1).values
        total = mass.sum()
        share = NUM_QUERIES / total
        self.sums.append((float(kept.sum() * share), float(best.sum() * share)))
        return out
