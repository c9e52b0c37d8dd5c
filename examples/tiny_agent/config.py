"""The geometry of tiny-agent, its ``config.json`` and its parameter table.

The sizes that the GPU kernels know are those of DeepSeek-V3.2 (latent 512, rope 64, 64 index heads of 128); the others
are chosen so that everything that a training run saves stays under 30 MB in bfloat16:

    python -m examples.tiny_agent.config        prints the table
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes

VOCAB_SIZE = 4096
"""Rows of the embedding; the tokenizer's ids lie below."""
MAX_POSITION = 16384
DENSE_LENGTH = 2048
"""Longest sequence of the dense stage. Yarn stretches from here to ``MAX_POSITION``."""

CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 256,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "max_position_embeddings": MAX_POSITION,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": MAX_POSITION // DENSE_LENGTH,
            "original_max_position_embeddings": DENSE_LENGTH,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
)


def model_config(**overrides: Any) -> ModelConfig:
    """The serving model's view of ``CONFIG``; overrides replace keys of it (tests use smaller sizes)."""
    return ModelConfig.from_mapping({**CONFIG, **overrides})


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its Hugging Face name, the multi-token prediction layer's included.

    That layer is stored behind the last one; its embedding and head are the main model's and are not stored again.
    """
    experts = range(config.n_routed_experts)
    shapes = parameter_shapes(config, experts)
    last = config.num_hidden_layers
    # A MoE layer like the last one of the main model.
    prefix, own = f"model.layers.{last - 1}.", f"model.layers.{last}."
    layer = {own + name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    hidden = config.hidden_size
    return (
        shapes
        | layer
        | {
            f"{own}enorm.weight": (hidden,),
            f"{own}hnorm.weight": (hidden,),
            f"{own}eh_proj.weight": (hidden, 2 * hidden),
            f"{own}shared_head.norm.weight": (hidden,),
        }
    )


def parameter_table(config: ModelConfig) -> list[tuple[str, int]]:
    """(part, parameters), in the order of the model; the last row is the sum."""
    parts: dict[str, int] = {}
    for name, shape in checkpoint_shapes(config).items():
        part = _part(name, config.num_hidden_layers)
        parts[part] = parts.get(part, 0) + math.prod(shape)
    return [*parts.items(), ("total", sum(parts.values()))]


def _part(name: str, num_layers: int) -> str:
    if name.startswith(f"model.layers.{num_layers}."):
        return "multi-token prediction layer"
    for key, part in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        (".indexer.", "indexers"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "routed experts"),
        (".mlp.shared_experts.", "shared experts"),
        (".mlp.gate.", "gates"),
        (".mlp.", "dense MLP"),
    ):
        if key in name:
            return part
    return "norms"


if __name__ == "__main__":
    table = Table("part", "parameters")
    for part, count in parameter_table(model_config()):
        table.add_row(part, f"{count:,}")
    Console().print(table)
