"""Floating-point operations that a training step must do, for its model FLOP utilisation.

Two for each multiplication with an addition; a backward pass counts twice its forward pass. What a faster formula could
leave out is not counted: experts that were not chosen, pairs of tokens that do not see each other, recomputation.
"""

from __future__ import annotations

import math

from examples.tiny_agent.feeding import Fed
from examples.tiny_agent.indexing import ROW_STRIDE
from examples.tiny_agent.stages import Kind
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes

H100_BF16_FLOPS = 989e12
"""Dense bfloat16, from the data sheet."""


def training_flops(config: ModelConfig, kind: Kind, batch: Fed) -> float:
    """Of one step of a stage of a kind."""
    layers = config.num_hidden_layers + 1
    tokens, context = batch.num_tokens, batch.mean_context
    head = 2 * config.vocab_size * config.hidden_size * (batch.next_tokens.count + batch.after_next.count)
    main = tokens * 2 * _active_weights(config)
    pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    if kind is Kind.DENSE:
        return 3 * (main + head + tokens * layers * pair * context)
    scored = 2 * config.index_n_heads * config.index_head_dim
    index = tokens * 2 * layers * _index_weights(config)
    learnt = tokens / ROW_STRIDE * layers
    mass = 2 * config.num_attention_heads * config.qk_head_dim
    if kind is Kind.INDEXER:
        return main + tokens * layers * pair * context + 3 * index + learnt * context * (3 * scored + mass)
    width = min(context, config.index_topk)
    selection = tokens * layers * context * scored
    attention = 3 * tokens * layers * pair * width
    return 3 * (main + head + index) + selection + attention + learnt * width * (3 * scored + mass)


def _active_weights(config: ModelConfig) -> int:
    """Multiplications with weights for one token in all layers, the indexers and the head left out."""
    chosen = config.num_experts_per_tok
    shapes = parameter_shapes(config, range(chosen))
    sizes = {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and ".indexer." not in name and "embed_tokens" not in name and "lm_head" not in name
    }
    last = f"model.layers.{config.num_hidden_layers - 1}."
    mtp = sum(size for name, size in sizes.items() if name.startswith(last)) + 2 * config.hidden_size**2
    return sum(sizes.values()) + mtp


def _index_weights(config: ModelConfig) -> int:
    """Of one indexer."""
    prefix = "model.layers.0.self_attn.indexer."
    shapes = parameter_shapes(config, ())
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix) and len(shape) == 2)
