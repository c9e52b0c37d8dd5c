"""The parameters of a DeepSeek-V3.2 model: their Hugging Face names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from seamount.workers.model.config import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig, owned_experts: Collection[int]) -> dict[str, Shape]:
    """Every parameter of a rank by its exact checkpoint name, [out, in] for projections, in layer order.

    owned_experts: global ids of the routed experts this rank holds (the same in every MoE layer); empty for none.
    FP8 block scales (``*.weight_scale_inv``) are no parameters: the loader folds them in. MTP layers are left out.
    """
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (config.hidden_size,)
        for name, shape in _attention_shapes(config).items():
            shapes[f"{prefix}.self_attn.{name}"] = shape
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (config.hidden_size,)
        if config.is_dense(layer):
            shapes |= _mlp_shapes(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)
        else:
            shapes |= _moe_shapes(f"{prefix}.mlp", config, owned_experts)
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``Transformer`` keeps a parameter when it computes in ``dtype``.

    At least float32 for all norms, the gate and its bias, ``indexer.weights_proj`` (rounding it makes ties) and
    ``lm_head`` (logits are float32); ``dtype`` for the rest.
    """
    wide = ("norm.weight", "norm.bias", "mlp.gate.weight", "e_score_correction_bias", "weights_proj.weight")
    if name.endswith(wide) or name == "lm_head.weight":
        return torch.promote_types(dtype, torch.float32)
    return dtype


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    return {
        "q_a_proj.weight": (config.q_lora_rank, hidden),
        "q_a_layernorm.weight": (config.q_lora_rank,),
        "q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj.weight": (hidden, heads * config.v_head_dim),
        "indexer.wq_b.weight": (config.index_n_heads * config.index_head_dim, config.q_lora_rank),
        "indexer.wk.weight": (config.index_head_dim, hidden),
        "indexer.k_norm.weight": (config.index_head_dim,),
        "indexer.k_norm.bias": (config.index_head_dim,),
        "indexer.weights_proj.weight": (config.index_n_heads, hidden),
    }


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _moe_shapes(prefix: str, config: ModelConfig, owned_experts: Collection[int]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{prefix}.gate.weight": (config.n_routed_experts, config.hidden_size),
        f"{prefix}.gate.e_score_correction_bias": (config.n_routed_experts,),
    }
    for expert in owned_experts:
        shapes |= _mlp_shapes(f"{prefix}.experts.{expert}", config.hidden_size, config.moe_intermediate_size)
    if config.n_shared_experts:
        inner = config.moe_intermediate_size * config.n_shared_experts
        shapes |= _mlp_shapes(f"{prefix}.shared_experts", config.hidden_size, inner)
    return shapes
