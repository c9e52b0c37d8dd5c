"""The lightning indexer of one layer: writes index keys, scores cached tokens, selects."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seamount.kernels.cache_write import rotate_index_vectors, rotate_quantize_index_vectors, write_index_key
from seamount.kernels.indexer import mqa_topk_indices, multiplies_e4m3, paged_topk_indices
from seamount.kernels.layout import CacheLayout
from seamount.kernels.quant import decode_e4m3, wide_dtype
from seamount.workers.model.batch import DecodeRows, PrefillChunk
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.linear import exact_bfloat16, project, project_wide, weight_of

_KEY_NORM_EPS = 1e-6


class Indexer:
    """parameters: those of ``self_attn.indexer``, by their names within it."""

    def __init__(self, config: ModelConfig, layout: CacheLayout, parameters: Mapping[str, Tensor]) -> None:
        self._layout = layout
        self._heads = config.index_n_heads
        self._head_dim = config.index_head_dim
        self._topk = config.index_topk
        self._wq_b = weight_of(parameters, "wq_b.weight")
        self.key_weight = weight_of(parameters, "wk.weight")
        """wk: its product is the keys that ``write_keys`` takes; it reads what the attention's projections read."""
        self._norm_weight = parameters["k_norm.weight"]
        self._norm_bias = parameters["k_norm.bias"]
        self._weights_proj = exact_bfloat16(parameters["weights_proj.weight"])

    def write_keys(self, key: Tensor, plane: Tensor, slots: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Every token's key [T, D] is written, also where no selection happens yet: later queries will score it."""
        write_index_key(plane, slots, key, self._norm_weight, self._norm_bias, _KEY_NORM_EPS, cos, sin, self._layout)

    def queries(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The scored rows' queries [X, H, D] and head weights [X, H], in at least float32.

        x: [X, hidden], normalised; q_latent: [X, q_lora_rank], what q_b_proj reads too. In layouts with e4m3 keys the
        queries are e4m3 values, decoded where the kernels want that, and their scales are in the weights.
        """
        wide = wide_dtype(x.dtype)
        q = project(q_latent, self._wq_b).view(-1, self._heads, self._head_dim)
        weights = project_wide(x, self._weights_proj) * (self._heads**-0.5 * self._head_dim**-0.5)
        if self._layout.quantizes_index:
            values, scales = rotate_quantize_index_vectors(q, cos, sin)
            if not multiplies_e4m3(values, self._layout):
                values = decode_e4m3(values.view(torch.uint8), wide)
            return values, weights * scales.squeeze(-1)
        return rotate_index_vectors(q.to(wide), cos, sin), weights

    def select_decode(self, decode: DecodeRows, q: Tensor, weights: Tensor, plane: Tensor) -> Tensor:
        """Positions [S, topk] int64 (-1 after the last) for the scored decode rows; q, weights: theirs."""
        lengths = decode.lengths[decode.scored]
        page_tables = decode.page_tables[decode.scored]
        return paged_topk_indices(q, plane, weights, lengths, page_tables, self._layout, self._topk)

    def select_chunk(self, chunk: PrefillChunk, q: Tensor, weights: Tensor, plane: Tensor) -> Tensor:
        """Positions [n, topk] int64 (-1 after the last) for the rows of a chunk; q, weights: theirs."""
        return mqa_topk_indices(q, plane, weights, chunk.lengths, chunk.pages, self._layout, self._topk)
