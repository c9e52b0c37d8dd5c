"""The trainer's DeepSeek-V3.2: plain PyTorch over packed rows, the published formulas, nothing cached.

Each layer is three steps, so that the stages of training differ in the middle one alone (``attention.py``):

    projected = layer.project(x, angles)      norm, MLA's queries, keys and values in the plain multi-head form
    context   = attend(layer, projected)      dense or sparse
    x, load   = layer.finish(x, context)      output projection, residual, MLP or experts

Parameters are float32 and cast to the activations' dtype where they are used; norms, the gate and index weights compute
in float32. Names follow the checkpoint; ``export.py`` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.tiny_agent.compiling import compiled
from seamount.kernels.rope import rope_angles, yarn_frequencies
from seamount.workers.model.config import ModelConfig

Angles = tuple[Tensor, Tensor]
"""cos and sin, each [B, T, R / 2] float32."""
INDEX_NORM_EPS = 1e-6


class Projected(NamedTuple):
    """What attention reads: x [B, T, hidden] normalised, q_latent [B, T, q_lora_rank], q, k [B, T, H, N + R] and
    v [B, T, H, V]."""

    x: Tensor
    q_latent: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


Attend = Callable[["Layer", Projected, Angles], Tensor]
"""(layer, projected, angles) to the heads' values [B, T, H, V]."""


class Linear(nn.Module):
    """y = x W^T in x's dtype; weight: [out, in] float32, drawn with variance 1 / in."""

    def __init__(self, out_dim: int, in_dim: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) * (gain / math.sqrt(in_dim)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), (x.shape[-1],), self.weight, self.bias, self.eps).to(x.dtype)


def rope_interleaved(x: Tensor, angles: Angles) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ...: x [B, T, H, R]."""
    cos, sin = (angle.unsqueeze(2) for angle in angles)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rope_half(x: Tensor, angles: Angles) -> Tensor:
    """Rotate the pairs (x_i, x_{i + R/2}): x [B, T, H, R]."""
    cos, sin = (angle.unsqueeze(2) for angle in angles)
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


class Indexer(nn.Module):
    """Lightning indexer: I[t, s] = sum_h w[t, h] ReLU(q[t, h] . k[s])."""

    hadamard: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dim, self.rope_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = Linear(self.heads * self.dim, config.q_lora_rank)
        self.wk = Linear(self.dim, config.hidden_size)
        self.k_norm = LayerNorm(self.dim, INDEX_NORM_EPS)
        self.weights_proj = Linear(self.heads, config.hidden_size)
        self.register_buffer("hadamard", hadamard_matrix(self.dim), persistent=False)

    @compiled
    def queries(self, x: Tensor, q_latent: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """x: [B, R, hidden]; q_latent: [B, R, q_lora_rank]; angles: these rows'. Returns q [B, R, H, D] and the heads'
        weights [B, R, H] float32."""
        q = self._rotate(self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim)), angles)
        return q, self.weights_proj(x.float()) * (self.heads**-0.5 * self.dim**-0.5)

    @compiled
    def keys(self, x: Tensor, angles: Angles) -> Tensor:
        """x: [B, T, hidden]. Returns [B, T, D]."""
        return self._rotate(self.k_norm(self.wk(x)).unsqueeze(2), angles).squeeze(2)

    def _rotate(self, vectors: Tensor, angles: Angles) -> Tensor:
        rotated = rope_half(vectors[..., : self.rope_dim], angles)
        return torch.cat((rotated, vectors[..., self.rope_dim :]), -1) @ self.hadamard.to(vectors.dtype)


class Attention(nn.Module):
    """Multi-head latent attention in its plain form: per head k = [Wk c | rope key], v = Wv c."""

    def __init__(self, config: ModelConfig, residual_gain: float) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.q_a_proj = Linear(config.q_lora_rank, hidden)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = Linear(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = Linear(config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = Linear(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o_proj = Linear(hidden, heads * config.v_head_dim, residual_gain)
        self.indexer = Indexer(config)

    def project(self, x: Tensor, angles: Angles) -> Projected:
        config = self.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (heads, -1))
        q = torch.cat((q[..., :nope], rope_interleaved(q[..., nope:], angles)), -1)
        latent, rope_key = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        rope_key = rope_interleaved(rope_key.unsqueeze(2), angles).expand(-1, -1, heads, -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        return Projected(x, q_latent, q, torch.cat((kv[..., :nope], rope_key), -1), kv[..., nope:])


class MLP(nn.Module):
    """down(silu(gate x) * (up x)), the product in float32."""

    def __init__(self, hidden: int, inner: int, residual_gain: float) -> None:
        super().__init__()
        self.gate_proj = Linear(inner, hidden)
        self.up_proj = Linear(inner, hidden)
        self.down_proj = Linear(hidden, inner, residual_gain)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        inner = functional.silu(self.gate_proj(x).float()) * self.up_proj(x).float()
        return self.down_proj(inner.to(x.dtype)), None


class MoE(nn.Module):
    """Routed experts and the shared one as one wide MLP whose inner units carry the gate's weight, 0 where not chosen.

        y = sum_e w_e Down_e a_e = [w_1 a_1 | ... | w_E a_E | a_shared] [Down_1 | ... | Down_E | Down_shared]^T

    The same result as sending each token to its experts. With so few and so small experts the wasted products cost
    less than sorting the tokens would: large matrix products, static shapes.
    """

    gate_bias: Tensor

    def __init__(self, config: ModelConfig, residual_gain: float) -> None:
        super().__init__()
        self.config = config
        hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        scale = hidden**-0.5
        self.gate = nn.Parameter(torch.randn(count, hidden) * scale)
        self.register_buffer("gate_bias", torch.zeros(count))
        if config.n_shared_experts != 1:
            raise ValueError(f"n_shared_experts is {config.n_shared_experts}; the trainer's layers have 1")
        total = count + 1  # the shared one last
        self.experts_gate = nn.Parameter(torch.randn(total, inner, hidden) * scale)
        self.experts_up = nn.Parameter(torch.randn(total, inner, hidden) * scale)
        self.experts_down = nn.Parameter(torch.randn(total, hidden, inner) * (residual_gain * inner**-0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns [B, T, hidden] and the tokens that chose each expert [E] float32."""
        weights, chosen = self.route(x)
        weights = functional.pad(weights, (0, 1), value=1.0)
        gate = functional.linear(x, self.experts_gate.flatten(0, 1).to(x.dtype))
        up = functional.linear(x, self.experts_up.flatten(0, 1).to(x.dtype))
        inner = (functional.silu(gate.float()) * up.float()).unflatten(-1, (weights.shape[-1], -1))
        inner = (inner * weights.unsqueeze(-1)).flatten(-2).to(x.dtype)
        down = self.experts_down.permute(1, 0, 2).flatten(1)
        return functional.linear(inner, down.to(x.dtype)), chosen.flatten(0, -2).float().sum(0)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Group-limited, bias-corrected sigmoid gate: weights [B, T, E] float32, 0 where not chosen, and the choice."""
        config = self.config
        scores = torch.sigmoid(functional.linear(x.float(), self.gate))
        choice = scores.detach() + self.gate_bias
        groups = choice.unflatten(-1, (config.n_group, -1))
        group_scores = torch.where(_best(groups, 2), groups, 0.0).sum(-1)
        allowed = _best(group_scores, config.topk_group).unsqueeze(-1).expand_as(groups).flatten(-2)
        chosen = _best(choice.masked_fill(~allowed, float("-inf")), config.num_experts_per_tok)
        weights = torch.where(chosen, scores, 0.0)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, chosen


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, *, dense: bool) -> None:
        super().__init__()
        # Each layer adds twice to the residual stream.
        gain = (2 * config.num_hidden_layers) ** -0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, gain)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | MoE = MLP(config.hidden_size, config.intermediate_size, gain) if dense else MoE(config, gain)

    @compiled
    def project(self, x: Tensor, angles: Angles) -> Projected:
        return self.self_attn.project(self.input_layernorm(x), angles)

    @compiled
    def finish(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn.o_proj(context.flatten(-2))
        out, load = self.mlp(self.post_attention_layernorm(x))
        return x + out, load


class MTPLayer(Layer):
    """Predicts the token after the next: h' = eh_proj([enorm(embed(next)) | hnorm(h)]), then a MoE layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, dense=False)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(config.hidden_size, 2 * config.hidden_size)
        self.shared_head_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @compiled
    def merge(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))

    @compiled
    def head_input(self, x: Tensor) -> Tensor:
        return self.shared_head_norm(x)


class Model(nn.Module):
    """dtype: of the activations; parameters are drawn float32 from torch's current generator."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        hidden = config.hidden_size
        self.embed_tokens = nn.Parameter(torch.randn(config.vocab_size, hidden))
        self.layers = nn.ModuleList(
            Layer(config, dense=config.is_dense(number)) for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        # Small: an untrained model then gives every token about the same probability.
        self.lm_head = nn.Parameter(torch.randn(config.vocab_size, hidden) * (0.1 * hidden**-0.5))
        self.mtp = MTPLayer(config)
        self.register_buffer("frequencies", _frequencies(config), persistent=False)

    def angles(self, positions: Tensor) -> Angles:
        """positions: [B, T] int."""
        return rope_angles(positions, self.frequencies, self.config.rope_amplitude)

    def embed(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.embed_tokens).to(self.dtype)

    def forward(self, tokens: Tensor, angles: Angles, attend: Attend) -> tuple[Tensor, list[Tensor]]:
        """tokens: [B, T] int64. Returns the last layer's output [B, T, hidden], not normalised, and each MoE layer's
        load."""
        x = self.embed(tokens)
        loads: list[Tensor] = []
        for layer in self.main_layers():
            x, load = layer.finish(x, attend(layer, layer.project(x, angles), angles))
            if load is not None:
                loads.append(load)
        return x, loads

    def forward_mtp(self, x: Tensor, next_tokens: Tensor, angles: Angles, attend: Attend) -> tuple[Tensor, Tensor]:
        """x: ``forward``'s; next_tokens: [B, T], the token behind each. Returns the input of the head, normalised, and
        the load."""
        layer = self.mtp
        x = layer.merge(self.embed(next_tokens), x)
        x, load = layer.finish(x, attend(layer, layer.project(x, angles), angles))
        assert load is not None, "this layer has experts"
        return layer.head_input(x), load

    @compiled
    def head_input(self, x: Tensor) -> Tensor:
        """``forward``'s hidden states as the head reads them."""
        return self.norm(x)

    def main_layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def all_layers(self) -> Iterator[Layer]:
        yield from self.main_layers()
        yield self.mtp


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's, orthonormal: [size, size] float32."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def _best(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of the last dimension are; among equals the first win. Compares all pairs: the
    dimension is small, and this compiles into its neighbours."""
    own, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    number = torch.arange(scores.shape[-1], device=scores.device)
    before = (other > own) | ((other == own) & (number < number.unsqueeze(-1)))
    return before.sum(-1) < count


def _frequencies(config: ModelConfig) -> Tensor:
    yarn = config.yarn
    if yarn is None:
        raise ValueError("the recipe's configuration has yarn; config.json lacks it")
    return yarn_frequencies(
        config.qk_rope_head_dim,
        theta=config.rope_theta,
        factor=yarn.factor,
        original_max_position=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
    )
