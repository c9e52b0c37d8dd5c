from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from seamount.wire.errors import InvalidArgument
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_dtype, parameter_shapes

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_published_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = ModelConfig.from_json(tmp_path)
    assert config == ModelConfig.from_json(tmp_path / "config.json")
    assert (config.qk_head_dim, config.eos_token_id, config.index_topk) == (192, 1, 2048)
    assert config.softmax_scale == pytest.approx(0.13523378, abs=1e-8)
    assert config.rope_amplitude == 1.0
    assert [config.is_dense(layer) for layer in (0, 2, 3, 60)] == [True, True, False, False]


def test_rope_parameters_of_newer_files_mean_the_same() -> None:
    newer = {key: value for key, value in PUBLISHED.items() if not key.startswith("rope_")}
    newer["rope_parameters"] = {**PUBLISHED["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    assert ModelConfig.from_mapping(newer) == ModelConfig.from_mapping(PUBLISHED)


def test_scale_without_yarn_or_without_mscale() -> None:
    plain = ModelConfig.from_mapping(PUBLISHED | {"rope_scaling": None})
    assert plain.yarn is None
    assert plain.softmax_scale == 192**-0.5
    scaling = {key: value for key, value in PUBLISHED["rope_scaling"].items() if not key.startswith("mscale")}
    without = ModelConfig.from_mapping(PUBLISHED | {"rope_scaling": scaling})
    assert without.softmax_scale == 192**-0.5
    assert without.rope_amplitude == pytest.approx(0.1 * math.log(40) + 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"model_type": "deepseek_v3"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"indexer_rope_interleave": True}, "indexer_rope_interleave"),
        ({"index_topk": None}, "index_topk"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"kv_lora_rank": 512.5}, "kv_lora_rank"),
        ({"vocab_size": True}, "vocab_size"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 256}, "qk_rope_head_dim"),
        ({"index_head_dim": 96}, "index_head_dim"),
        ({"n_group": 7}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
    ],
)
def test_what_is_not_served_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ModelConfig.from_mapping(PUBLISHED | change)
    assert caught.value.field == field


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_unreadable_files_are_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidArgument):
        ModelConfig.from_json(path)


def test_published_parameters_are_all_there() -> None:
    config = ModelConfig.from_mapping(PUBLISHED)
    shapes = parameter_shapes(config, range(256))
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(671.88e9, rel=1e-4)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (7168, 18432)
    assert shapes["model.layers.3.mlp.experts.255.up_proj.weight"] == (2048, 7168)
    assert shapes["model.layers.60.self_attn.kv_b_proj.weight"] == (32768, 512)
    assert shapes["model.layers.60.self_attn.indexer.wq_b.weight"] == (8192, 1536)
    assert not any(name.startswith("model.layers.61.") for name in shapes)
    half = parameter_shapes(config, range(128, 256))
    assert "model.layers.3.mlp.experts.127.up_proj.weight" not in half
    assert len(shapes) - len(half) == 58 * 128 * 3


def test_wide_parameters() -> None:
    wide = {
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.self_attn.q_a_layernorm.weight",
        "model.layers.3.self_attn.indexer.k_norm.bias",
        "model.layers.3.self_attn.indexer.weights_proj.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
    }
    for name in wide:
        assert parameter_dtype(name, torch.bfloat16) == torch.float32
        assert parameter_dtype(name, torch.float64) == torch.float64
    for name in ("model.embed_tokens.weight", "model.layers.3.mlp.experts.1.gate_proj.weight"):
        assert parameter_dtype(name, torch.bfloat16) == torch.bfloat16
