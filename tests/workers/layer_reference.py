"""One layer of DeepSeek-V3.2 in float32, from the formulas, over block-scaled weights dequantised here.

Nothing of the model's or the kernels' code is used but the names and shapes of parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import is_projection, kept_shapes, parameter_shapes, stays_block_scaled

SCALE = "_scale_inv"


def parameters(config: ModelConfig, seed: int, device: str, *, clear_choices: bool = False) -> dict[str, Tensor]:
    """What a rank keeps of an FP8 checkpoint, random, on the device: scales are of any size, not powers of two only.

    clear_choices: the gate's bias decides alone, so that rounding before it cannot change which experts are chosen.
    """
    generator = torch.Generator(device).manual_seed(seed)
    owned = range(config.n_routed_experts)
    scaled = {
        name
        for name, shape in parameter_shapes(config, owned).items()
        if is_projection(name, shape) and stays_block_scaled(name)
    }
    made: dict[str, Tensor] = {}
    shapes = kept_shapes(config, owned, scaled)
    for name, shape in shapes.items():
        if name.endswith(SCALE):
            made[name] = (torch.rand(shape, generator=generator, device=device) + 0.5) * (shape[-1] * 128) ** -0.5
        elif name + SCALE in shapes:
            made[name] = random_e4m3(shape, generator)
        else:
            noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
            spread = 0.1 if len(shape) == 1 else shape[1] ** -0.5
            made[name] = spread * noise + (1 if name.endswith("norm.weight") else 0)
            if clear_choices and name.endswith("correction_bias"):
                made[name] = clear_bias(config, generator)
    return made


def clear_bias(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """[E] bfloat16: no two that compete for the last place, of groups or of experts, are within what scores, of 0 to 1,
    can turn round. Drawn again until that is so; of plain draws one in six is not."""
    while True:
        bias = 100 * torch.randn(config.n_routed_experts, generator=generator, device=generator.device)
        bias = bias.bfloat16()
        groups = bias.float().view(config.n_group, -1)
        sums, order = groups.topk(2).values.sum(-1).sort(descending=True)
        kept = groups[order[: config.topk_group]].flatten().sort(descending=True).values
        places = (sums, config.topk_group, 2.0), (kept, config.num_experts_per_tok, 1.0)
        if all(last == len(values) or values[last - 1] - values[last] > margin for values, last, margin in places):
            return bias


def random_e4m3(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=generator.device)
    for matrix in values if len(shape) == 3 else (values,):
        matrix.copy_(torch.randn(matrix.shape, generator=generator, device=generator.device, dtype=torch.bfloat16))
    return values


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    spread = scales.repeat_interleave(128, 0)[: values.shape[0]].repeat_interleave(128, 1)[:, : values.shape[1]]
    return values.float() * spread


def activations(x: Tensor) -> Tensor:
    """x [T, D] float32 as an FP8 product sees it: e4m3 times a power of two for each 128 channels."""
    blocks = x.view(x.shape[0], -1, 128)
    scale = torch.exp2((blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448).log2().ceil())
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x)


class Reference:
    """One layer in float32. ``rounds``: inputs of block-scaled products pass through ``activations``."""

    def __init__(self, config: ModelConfig, made: dict[str, Tensor], *, rounds: bool) -> None:
        self.config, self.made, self.rounds = config, made, rounds
        self.prefix = "model.layers.0."

    def weight(self, name: str, expert: int | None = None) -> Tensor:
        values = self.made[f"{self.prefix}{name}.weight"]
        scales = self.made.get(f"{self.prefix}{name}.weight{SCALE}")
        if scales is None:
            return values.float()
        return dequantized(values, scales) if expert is None else dequantized(values[expert], scales[expert])

    def product(self, x: Tensor, name: str, expert: int | None = None) -> Tensor:
        return (activations(x) if self.rounds else x) @ self.weight(name, expert).T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.made[name].float()

    def mlp(self, x: Tensor, name: str, expert: int | None = None) -> Tensor:
        gate, up = self.product(x, f"{name}.gate_up_proj", expert).chunk(2, dim=-1)
        return self.product(gate * torch.sigmoid(gate) * up, f"{name}.down_proj", expert)

    def moe(self, x: Tensor) -> Tensor:
        config = self.config
        scores = torch.sigmoid(x @ self.weight("mlp.gate").T)
        choice = scores + self.made[f"{self.prefix}mlp.gate.e_score_correction_bias"].float()
        groups = choice.view(len(x), config.n_group, -1)
        best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, True)
        ids = choice.masked_fill(~kept.repeat_interleave(groups.shape[2], 1), -math.inf)
        ids = ids.topk(config.num_experts_per_tok).indices
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(1, keepdim=True) * config.routed_scaling_factor
        out = self.mlp(x, "mlp.shared_experts")
        for expert in ids.unique().tolist():
            tokens, choices = (ids == expert).nonzero(as_tuple=True)
            out[tokens] += weights[tokens, choices, None] * self.mlp(x[tokens], "mlp.experts", expert)
        return out

    def rope(self, x: Tensor) -> Tensor:
        """x: [T, H, R] at positions 0 .. T - 1, pairs interleaved, yarn's frequencies of factor 40 over 4096."""
        half = x.shape[-1] // 2
        plain = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        ramp = ((torch.arange(half, device=x.device) - 10) / 13).clamp(0, 1)
        angles = torch.arange(len(x), device=x.device)[:, None] * (plain / 40 * ramp + plain * (1 - ramp))
        turned = (
            torch.view_as_complex(x.view(*x.shape[:-1], half, 2))
            * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        return torch.view_as_real(turned).flatten(-2)

    def attention(self, x: Tensor) -> Tensor:
        """Dense and causal: no more tokens than are selected."""
        config, rank, nope = self.config, self.config.kv_lora_rank, self.config.qk_nope_head_dim
        latent = self.norm(self.product(x, "self_attn.q_a_proj"), f"{self.prefix}self_attn.q_a_layernorm.weight")
        q = self.product(latent, "self_attn.q_b_proj").view(len(x), config.num_attention_heads, -1)
        q = torch.cat((q[..., :nope], self.rope(q[..., nope:].contiguous())), -1)
        kv = self.product(x, "self_attn.kv_a_proj_with_mqa")
        cached = self.norm(kv[:, :rank], f"{self.prefix}self_attn.kv_a_layernorm.weight")
        rope_key = self.rope(kv[:, None, rank:].contiguous())
        up = self.weight("self_attn.kv_b_proj").view(config.num_attention_heads, -1, rank)
        keys = torch.einsum("tc,hnc->thn", cached, up[:, :nope])
        keys = torch.cat((keys, rope_key.expand(-1, keys.shape[1], -1)), -1)
        values = torch.einsum("tc,hvc->thv", cached, up[:, nope:])
        scale = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2 if nope == 128 else config.softmax_scale
        hidden = torch.ones((len(x), len(x)), dtype=torch.bool, device=x.device).triu(1)
        out = torch.empty((len(x), values.shape[1], values.shape[2]), device=x.device)
        for head in range(values.shape[1]):
            scores = (q[:, head] @ keys[:, head].T * scale).masked_fill(hidden, -math.inf)
            out[:, head] = scores.softmax(-1) @ values[:, head]
        return self.product(out.flatten(1), "self_attn.o_proj")

    def logits(self, ids: list[int]) -> Tensor:
        embedding = self.made["model.embed_tokens.weight"]
        x = embedding[torch.tensor(ids, device=embedding.device)].float()
        x = x + self.attention(self.norm(x, f"{self.prefix}input_layernorm.weight"))
        x = x + self.moe(self.norm(x, f"{self.prefix}post_attention_layernorm.weight"))
        return self.norm(x, "model.norm.weight") @ self.made["lm_head.weight"].float().T


def relative(actual: Tensor, expected: Tensor) -> float:
    """Error in the Frobenius norm."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
