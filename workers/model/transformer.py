"""The whole model: one step over a batch of tokens and the paged caches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.kernels.norms import rms_norm
from seamount.kernels.quant import wide_dtype
from seamount.kernels.rope import rope_angles, rope_frequencies, yarn_frequencies
from seamount.wire.errors import InvalidArgument
from seamount.workers.experts.dispatch import ExpertParallel
from seamount.workers.model.attention import Attention
from seamount.workers.model.batch import AttentionPlan, ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.linear import exact_bfloat16, project_wide
from seamount.workers.model.moe import FeedForward, MoE, make_mlp
from seamount.workers.model.parameters import SCALE_SUFFIX, kept_shapes, parameter_dtype, parameter_shapes, place_of


class Transformer:
    """DeepSeek-V3.2 with the parameters of one rank.

    layout: of the caches that the steps read and write; its dtype is the compute dtype.
    parameters: by the checkpoint's names, exactly those of ``parameter_shapes`` for the experts that this rank owns.
    They are kept as they are where their dtype is ``parameter_dtype(name, layout.dtype)``, else converted; drop the
    mapping afterwards, or the converted ones exist twice. Projections may be block-scaled instead: float8_e4m3fn with
    their ``*_scale_inv`` beside them, merged as ``parameters.place_of`` says.
    experts: this rank's share of the routed experts; every rank of the gang must step in unison.
    Raises InvalidArgument naming the first parameter that is missing, unknown or misshaped.
    """

    def __init__(
        self, config: ModelConfig, layout: CacheLayout, parameters: Mapping[str, Tensor], experts: ExpertParallel
    ) -> None:
        self.config = config
        self.layout = layout
        self.dtype = layout.dtype
        _check(parameters, config, experts.map.owned(experts.rank))
        kept = {name: _converted(name, value, self.dtype) for name, value in parameters.items()}
        self.expert_bytes = sum(value.nbytes for name, value in kept.items() if ".mlp.experts." in name)
        """Bytes of the routed experts held here, block-scaled ones as stored (a CPU decodes them to float32)."""
        self.device = kept["model.embed_tokens.weight"].device
        """Where the parameters are; batches are moved there, planes must be there."""
        self._embedding = kept["model.embed_tokens.weight"]
        self._layers = [
            DecoderLayer(config, layout, layer, _below(kept, f"model.layers.{layer}."), experts)
            for layer in range(config.num_hidden_layers)
        ]
        self._norm = kept["model.norm.weight"]
        self._lm_head = exact_bfloat16(kept["lm_head.weight"])
        self._frequencies = _frequencies(config, wide_dtype(self.dtype)).to(self._embedding.device)

    @staticmethod
    def parameter_shapes(config: ModelConfig, owned_experts: Collection[int]) -> dict[str, tuple[int, ...]]:
        """See ``parameters.parameter_shapes``."""
        return parameter_shapes(config, owned_experts)

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, planes: CachePlanes, *, on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """Run one step: write the batch's tokens into the caches and return the wanted logits.

        planes: one latent and one index plane a layer, of this model's layout; entries of the context before the batch
        must be there, slots behind it may hold anything.
        on_layer: called with each layer's number, in order, once its cache entries of this batch are written.
        Returns [N, vocab] float32 (float64 for a float64 model). With T = 0 all callbacks and all collectives of the
        MoE layers still happen.
        """
        batch = batch.to(self.device)
        return self.forward_planned(batch, AttentionPlan.create(batch, self.config.index_topk), planes, on_layer)

    @torch.inference_mode()
    def forward_planned(
        self,
        batch: ForwardBatch,
        plan: AttentionPlan,
        planes: CachePlanes,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``forward`` of a batch on this device along a plan of its own; no list of the batch is read."""
        angles = rope_angles(batch.positions, self._frequencies, self.config.rope_amplitude)
        x = embedding(batch.token_ids, self._embedding)
        for number, layer in enumerate(self._layers):

            def written(number: int = number) -> None:
                if on_layer is not None:
                    on_layer(number)

            x = layer.forward(x, planes.latent[number], planes.index[number], batch.slots, angles, plan, written)
        wanted = rms_norm(x[batch.logit_rows], self._norm, self.config.rms_norm_eps)
        return project_wide(wanted, self._lm_head)


class DecoderLayer:
    """x + attention(norm(x)), then x + feed_forward(norm(x)). parameters: by their names within the layer."""

    def __init__(
        self,
        config: ModelConfig,
        layout: CacheLayout,
        number: int,
        parameters: Mapping[str, Tensor],
        experts: ExpertParallel,
    ) -> None:
        self._eps = config.rms_norm_eps
        self._input_norm = parameters["input_layernorm.weight"]
        self._attention = Attention(config, layout, _below(parameters, "self_attn."))
        self._post_attention_norm = parameters["post_attention_layernorm.weight"]
        mlp = _below(parameters, "mlp.")
        self._feed_forward: FeedForward = make_mlp(mlp) if config.is_dense(number) else MoE(config, mlp, experts)

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
        """[T, hidden] to [T, hidden]; see ``Attention.forward``."""
        normed = rms_norm(x, self._input_norm, self._eps)
        x = x + self._attention.forward(normed, latent_plane, index_plane, slots, angles, plan, on_written)
        return x + self._feed_forward.forward(rms_norm(x, self._post_attention_norm, self._eps))


def _frequencies(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    if config.yarn is None:
        return rope_frequencies(config.qk_rope_head_dim, config.rope_theta, dtype)
    return yarn_frequencies(
        config.qk_rope_head_dim,
        theta=config.rope_theta,
        factor=config.yarn.factor,
        original_max_position=config.yarn.original_max_position_embeddings,
        beta_fast=config.yarn.beta_fast,
        beta_slow=config.yarn.beta_slow,
        dtype=dtype,
    )


def _below(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == torch.float8_e4m3fn or name.endswith(SCALE_SUFFIX):
        return value
    return value.to(parameter_dtype(name, dtype))


def _check(parameters: Mapping[str, Tensor], config: ModelConfig, owned_experts: Sequence[int]) -> None:
    shapes = parameter_shapes(config, owned_experts)
    scaled = [n for n, shape in shapes.items() if place_of(n, shape, owned_experts).name + SCALE_SUFFIX in parameters]
    expected = kept_shapes(config, owned_experts, scaled)
    for name, shape in expected.items():
        if name not in parameters:
            raise InvalidArgument(f"the checkpoint lacks {name} of shape {shape}", field=name)
        value = parameters[name]
        if tuple(value.shape) != shape:
            raise InvalidArgument(f"{name} has shape {tuple(value.shape)}; config.json asks for {shape}", field=name)
        if (value.dtype == torch.float8_e4m3fn) != (name + SCALE_SUFFIX in expected):
            raise InvalidArgument(f"{name} is {value.dtype}; float8_e4m3fn and block scales go together", field=name)
    for name in parameters:
        if name not in expected:
            raise InvalidArgument(f"{name} is no parameter of this rank's model", field=name)
