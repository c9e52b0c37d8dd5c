"""Multi-head latent attention of one layer over the paged caches, with DeepSeek sparse selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from seamount.kernels.cache_write import write_latent
from seamount.kernels.dense_mla import dense_mha, dense_mla
from seamount.kernels.layout import CacheLayout, gather_slots, unpack_latent
from seamount.kernels.norms import rms_norm
from seamount.kernels.quant import wide_dtype
from seamount.kernels.rope import apply_rope_interleaved
from seamount.kernels.sparse_mla import sparse_mla_decode, sparse_mla_prefill
from seamount.workers.model.batch import AttentionPlan, DecodeRows, PrefillChunk, slots_at
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.indexer import Indexer
from seamount.workers.model.linear import Projections, project, weight_of


class Attention:
    """parameters: those of ``self_attn``, by their names within it. kv_b_proj is used through two views of it."""

    def __init__(self, config: ModelConfig, layout: CacheLayout, parameters: Mapping[str, Tensor]) -> None:
        self._config = config
        self._layout = layout
        self._q_a_norm = parameters["q_a_layernorm.weight"]
        self._q_b_proj = weight_of(parameters, "q_b_proj.weight")
        self._kv_a_norm = parameters["kv_a_layernorm.weight"]
        self._kv_up = parameters["kv_b_proj.weight"]  # [H * (N + V), C]
        per_head = self._kv_up.view(config.num_attention_heads, -1, config.kv_lora_rank)
        self._k_up = per_head[:, : config.qk_nope_head_dim]  # [H, N, C]
        self._v_up = per_head[:, config.qk_nope_head_dim :]  # [H, V, C]
        self._o_proj = weight_of(parameters, "o_proj.weight")
        indexer = {name.removeprefix("indexer."): at for name, at in parameters.items() if name.startswith("indexer.")}
        self._indexer = Indexer(config, layout, indexer)
        q_a_proj, kv_a_proj = (weight_of(parameters, f"{name}.weight") for name in ("q_a_proj", "kv_a_proj_with_mqa"))
        self._of_input = Projections(q_a_proj, self._indexer.key_weight, kv_a_proj)

    def forward(
        self,
        x: Tensor,
        latent_plane: Tensor,
        index_plane: Tensor,
        slots: Tensor,
        angles: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        on_written: Callable[[], None],
    ) -> Tensor:
        """Write the step's tokens into both planes, then attend to what the planes hold, the step's tokens included.

        x: [T, hidden], normalised; slots: [T] int64; angles: cos and sin [T, R / 2]; on_written: called in between.
        Returns [T, hidden]. T may be 0.
        """
        config, (cos, sin) = self._config, angles
        q_latent, index_key, kv = self._of_input.forward(x)
        q_latent = rms_norm(q_latent, self._q_a_norm, config.rms_norm_eps)
        latent, rope_key = kv[:, : config.kv_lora_rank], kv[:, config.kv_lora_rank :]
        eps = config.rms_norm_eps
        write_latent(latent_plane, slots, latent, rope_key, self._kv_a_norm, eps, cos, sin, self._layout)
        self._indexer.write_keys(index_key, index_plane, slots, cos, sin)
        on_written()

        q = project(q_latent, self._q_b_proj).view(-1, config.num_attention_heads, config.qk_head_dim)
        q_rope = apply_rope_interleaved(q[..., config.qk_nope_head_dim :], cos, sin)
        q = torch.cat((q[..., : config.qk_nope_head_dim], q_rope), dim=-1)
        scored = self._scored_queries(x, q_latent, cos, sin, plan.scored_rows)

        out = x.new_empty((x.shape[0], config.num_attention_heads * config.v_head_dim))
        if (decode := plan.decode) is not None:
            picked = decode.slots
            if num_scored := decode.scored.shape[0]:
                own = slice(0, num_scored)
                positions = self._indexer.select_decode(decode, scored[0][own], scored[1][own], index_plane)
                picked = self._with_selected(decode, positions)
            out[decode.rows] = self._attend_slots(q[decode.rows], latent_plane, picked)
        for chunk in plan.chunks:
            selected = None
            if (own_rows := chunk.scored) is not None:
                selected = self._indexer.select_chunk(chunk, scored[0][own_rows], scored[1][own_rows], index_plane)
            out[chunk.rows] = self._attend_chunk(chunk, q[chunk.rows], latent_plane, selected)
        return project(out, self._o_proj)

    def _scored_queries(
        self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        if rows.shape[0] == 0:
            return x[:0], x[:0]
        return self._indexer.queries(x[rows], q_latent[rows], cos[rows], sin[rows])

    @staticmethod
    def _with_selected(decode: DecodeRows, positions: Tensor) -> Tensor:
        selected = slots_at(decode.page_tables[decode.scored], positions)
        if decode.scored.shape[0] == decode.rows.shape[0]:
            return selected
        return decode.slots.index_copy(0, decode.scored, selected)

    def _attend_chunk(self, chunk: PrefillChunk, q: Tensor, plane: Tensor, selected: Tensor | None) -> Tensor:
        num_rows, num_keys = q.shape[0], chunk.slots.shape[0]
        scale = self._config.softmax_scale
        if selected is not None:
            rows = sparse_mla_prefill(self._absorb(q), plane, chunk.slots, selected, self._layout, scale)[0]
            return self._values(rows)
        if self._plain_is_cheaper(num_rows, num_keys):
            return self._attend_plain(chunk, q, plane)
        return self._values(dense_mla(self._absorb(q), plane, chunk.slots, chunk.lengths, self._layout, scale)[0])

    def _attend_slots(self, q: Tensor, plane: Tensor, slots: Tensor) -> Tensor:
        context, _ = sparse_mla_decode(self._absorb(q), plane, slots, self._layout, self._config.softmax_scale)
        return self._values(context)

    def _attend_plain(self, chunk: PrefillChunk, q: Tensor, plane: Tensor) -> Tensor:
        """Expand each head's keys and values from the cached latents: q [n, H, N + R] to [n, H * V]."""
        config = self._config
        kv = unpack_latent(gather_slots(plane, chunk.slots, self._layout, "latent"), self._layout)
        latent, rope_key = torch.split(kv.to(q.dtype), [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        expanded = linear(latent, self._kv_up).view(kv.shape[0], config.num_attention_heads, -1)
        k, v = torch.split(expanded, [config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return dense_mha(q, k, rope_key, v, chunk.lengths, config.softmax_scale)[0].flatten(1)

    def _plain_is_cheaper(self, num_rows: int, num_keys: int) -> bool:
        """By multiplications: the plain form expands every key once, the absorbed one works in the wider latent."""
        config = self._config
        up = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        absorbed = num_rows * (up + num_keys * (self._layout.latent_dim + config.kv_lora_rank))
        plain = num_keys * up + num_rows * num_keys * (config.qk_head_dim + config.v_head_dim)
        return plain < absorbed

    def _absorb(self, q: Tensor) -> Tensor:
        """[n, H, N + R] queries to [n, H, C + R] in at least float32: the keys' up-projection moves into the query.

        On a GPU they stay in the model's dtype, where the attention kernels would round them to bfloat16 anyway.
        """
        wide = q.dtype if q.is_cuda and self._layout.name != "exact" else wide_dtype(q.dtype)
        q_nope = q[..., : self._config.qk_nope_head_dim].transpose(0, 1)
        latent_q = torch.bmm(q_nope, self._k_up).transpose(0, 1)
        return torch.cat((latent_q.to(wide), q[..., self._config.qk_nope_head_dim :].to(wide)), dim=-1)

    def _values(self, context: Tensor) -> Tensor:
        """[n, H, C] weighted latents to [n, H * V] weighted values in the model's dtype."""
        per_head = context.to(self._v_up.dtype).transpose(0, 1)
        return torch.bmm(per_head, self._v_up.transpose(1, 2)).transpose(0, 1).flatten(1)
