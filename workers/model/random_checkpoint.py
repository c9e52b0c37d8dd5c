"""Writes small random models in the real checkpoint format: for demos and tests until a trained one exists.

The scales keep a random model lively: every projection keeps the variance of its input, logits spread over several
nats, index scores differ from token to token, and the gate's bias moves some choices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from seamount.wire.errors import InvalidArgument
from seamount.workers.model.checkpoint_files import new_checkpoint, write_json, write_tensors
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.quantize_checkpoint import in_blocks, is_stored_in_blocks, quantization_config

_ARCHITECTURE: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 163840,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "use_cache": True,
    }
)
GEOMETRIES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        # The real sizes wherever a GPU kernel depends on them (latent, rope, index heads), small elsewhere.
        "demo": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 64,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 64,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
        # Awkward widths: hardly a projection is a whole number of FP8 blocks.
        "test": {
            "hidden_size": 96,
            "intermediate_size": 160,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 24,
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    }
)


def random_config(
    geometry: str, *, vocab_size: int, bos_token_id: int, eos_token_id: int, dtype: torch.dtype, fp8: bool = False
) -> dict[str, object]:
    """The ``config.json`` of a geometry in ``GEOMETRIES``. Raises ``InvalidArgument`` for a name that is not there."""
    if geometry not in GEOMETRIES:
        raise InvalidArgument(f"geometry {geometry!r} is unknown; choose one of {sorted(GEOMETRIES)}", field="geometry")
    config = dict(_ARCHITECTURE) | dict(GEOMETRIES[geometry])
    config |= {"vocab_size": vocab_size, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if fp8:
        config["quantization_config"] = quantization_config(ModelConfig.from_mapping(config))
    return dict(sorted(config.items()))


def write_random_checkpoint(
    path: Path,
    *,
    seed: int,
    geometry: str,
    vocab_size: int,
    bos_token_id: int = 0,
    eos_token_id: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    max_shard_bytes: int = 1 << 30,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``config.json``, ``generation_config.json`` and safetensors to a new folder, all or nothing.

    seed: every tensor depends on it and on its own name only. geometry: a key of ``GEOMETRIES``.
    dtype: bfloat16 or float32, of all but the gate's bias and the indexer's LayerNorm, which are float32.
    fp8: projections become e4m3 with one float32 ``weight_scale_inv`` a 128x128 block, those that do not fit excepted.
    max_shard_bytes: beyond it the tensors are spread over shards with an index.
    extra_files: name to content, written beside them (the tokenizer's).
    Raises ``InvalidArgument`` (geometry, dtype, a malformed size) and ``AlreadyExists`` if ``path`` exists.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise InvalidArgument(f"dtype is {dtype}; it must be bfloat16 or float32", field="dtype")
    raw = random_config(
        geometry, vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id, dtype=dtype, fp8=fp8
    )
    generation = {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
    }
    with new_checkpoint(path) as draft:
        write_json(draft / "config.json", raw)
        write_json(draft / "generation_config.json", generation)
        for name, content in (extra_files or {}).items():
            (draft / name).write_bytes(content)
        config = ModelConfig.from_mapping(raw)
        shapes = parameter_shapes(config, range(config.n_routed_experts))
        num_bytes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}

        def tensors_of(name: str) -> Mapping[str, Tensor]:
            tensor = _random_tensor(name, shapes[name], seed)
            if fp8 and is_stored_in_blocks(name, shapes[name]):
                return in_blocks(name, tensor)
            keeps_float32 = name.endswith("e_score_correction_bias") or ".k_norm." in name
            return {name: tensor if keeps_float32 else tensor.to(dtype)}

        write_tensors(draft, num_bytes, tensors_of, max_shard_bytes)


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("norm.weight", "layernorm.weight")):
        return 1.0 + 0.1 * noise
    if name.endswith(("norm.bias", "e_score_correction_bias")):
        return 0.1 * noise
    if name == "model.embed_tokens.weight":
        return noise
    scale = 3.0 if name == "lm_head.weight" else 1.0  # logits of about three nats: neither flat nor settled
    return noise * (scale / math.sqrt(shape[-1]))
