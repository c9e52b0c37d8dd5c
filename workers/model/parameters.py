"""The parameters of a DeepSeek-V3.2 model: their Hugging Face names, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from seamount.kernels.quant import BLOCK_SIZE
from seamount.workers.model.config import ModelConfig

Shape = tuple[int, ...]
SCALE_SUFFIX: Final = "_scale_inv"
"""Appended to a weight's name: its float32 scales, one a block of 128 x 128. Despite the name they are multiplied."""

_NEVER_SCALED: Final = (
    "embed_tokens.weight",
    "lm_head.weight",
    "mlp.gate.weight",
    "indexer.weights_proj.weight",
    "eh_proj.weight",  # of multi-token prediction, as is the next
    "shared_head.head.weight",
)


def parameter_shapes(config: ModelConfig, owned_experts: Collection[int]) -> dict[str, Shape]:
    """Every parameter of a rank by its exact checkpoint name, [out, in] for projections, in layer order.

    owned_experts: global ids of the routed experts this rank holds (the same in every MoE layer); empty for none.
    FP8 block scales (``*.weight_scale_inv``) are left out, and so are MTP layers.
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
    ``lm_head`` (logits are float32); ``dtype`` for the rest. Block-scaled weights stay float8_e4m3fn instead.
    """
    wide = ("norm.weight", "norm.bias", "mlp.gate.weight", "e_score_correction_bias", "weights_proj.weight")
    if name.endswith(wide) or name == "lm_head.weight":
        return torch.promote_types(dtype, torch.float32)
    return dtype


def is_projection(name: str, shape: Shape) -> bool:
    """Whether DeepSeek's FP8 form block-scales this parameter: matrices but embedding, head, gate, weights_proj."""
    return len(shape) == 2 and not name.endswith(_NEVER_SCALED)


def fits_blocks(name: str, shape: Shape) -> bool:
    """Whether FP8 products take a projection of this shape [out, in].

    ``in`` must be whole blocks of 128; in MLPs ``out`` too, for gate and up are merged and what is between them and
    down is quantised by blocks. kv_b_proj is used as floats, through its two halves: any shape will do.
    """
    if _is_used_as_floats(name):
        return True
    return shape[1] % BLOCK_SIZE == 0 and (".mlp." not in name or shape[0] % BLOCK_SIZE == 0)


def stays_block_scaled(name: str) -> bool:
    """Whether a projection that is stored with block scales keeps them; kv_b_proj is dequantised when it is read."""
    return not _is_used_as_floats(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a block-scaled checkpoint tensor lies in the parameter that a rank keeps of it.

    name: the parameter's; expert: the index of its first dimension, None where it has no experts; first_row: the row
    where the tensor begins.
    """

    name: str
    expert: int | None
    first_row: int


def place_of(name: str, shape: Shape, owned_experts: Sequence[int]) -> Place:
    """Gate above up in ``gate_up_proj``, the owned experts stacked in ``experts.*``; all others lie alone.

    The merged names are those of transformers' ``DeepseekV3`` experts.
    """
    first_row = shape[0] if ".up_proj." in name else 0
    merged = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
    expert = re.search(r"\.experts\.(\d+)\.", merged)
    if expert is None:
        return Place(name=merged, expert=None, first_row=first_row)
    stacked = merged.replace(expert[0], ".experts.")
    return Place(name=stacked, expert=owned_experts.index(int(expert[1])), first_row=first_row)


def kept_shapes(config: ModelConfig, owned_experts: Sequence[int], block_scaled: Collection[str]) -> dict[str, Shape]:
    """Shapes of what a rank keeps when the checkpoint's tensors ``block_scaled`` keep their block scales.

    The others as in ``parameter_shapes``; those merged as ``place_of`` says, each with ``*_scale_inv`` beside it.
    """
    kept: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config, owned_experts).items():
        if name not in block_scaled:
            kept[name] = shape
            continue
        place = place_of(name, shape, owned_experts)
        stack = () if place.expert is None else (len(owned_experts),)
        rows = place.first_row + shape[0]
        kept[place.name] = (*stack, rows, shape[1])
        kept[place.name + SCALE_SUFFIX] = (*stack, *block_counts((rows, shape[1])))
    return kept


def block_counts(shape: Shape) -> Shape:
    """Blocks of 128 x 128 along both sides of a matrix [out, in], the last ones partly filled."""
    return -(-shape[0] // BLOCK_SIZE), -(-shape[1] // BLOCK_SIZE)


def _is_used_as_floats(name: str) -> bool:
    return name.endswith("kv_b_proj.weight")


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
