import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from seamount.wire.errors import AlreadyExists, InvalidArgument
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.random_checkpoint import GEOMETRIES, write_random_checkpoint


def read_all(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    return value


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES))
def test_names_and_shapes_are_those_of_the_architecture(tmp_path: Path, seed: int, geometry: str) -> None:
    path = tmp_path / "model"
    write_random_checkpoint(path, seed=seed, geometry=geometry, vocab_size=517, bos_token_id=3, eos_token_id=4)
    config = ModelConfig.from_json(path)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (517, 3, 4)
    assert config.softmax_scale != config.qk_head_dim**-0.5  # yarn is on
    tensors = read_all(path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == parameter_shapes(
        config, range(config.n_routed_experts)
    )
    bias = tensors[f"model.layers.{config.num_hidden_layers - 1}.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.abs().min() > 0
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # no draft left


def test_the_demo_has_the_sizes_that_kernels_fix(tmp_path: Path) -> None:
    demo = GEOMETRIES["demo"]
    assert (demo["kv_lora_rank"], demo["qk_rope_head_dim"], demo["index_n_heads"], demo["index_head_dim"]) == (
        512,
        64,
        64,
        128,
    )
    assert demo["num_attention_heads"] == 16
    assert all(geometry["index_n_heads"] >= 32 for geometry in GEOMETRIES.values())


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path, seed: int) -> None:
    one, many, other = tmp_path / "one", tmp_path / "many", tmp_path / "other"
    write_random_checkpoint(one, seed=seed, geometry="test", vocab_size=64, dtype=torch.float32)
    write_random_checkpoint(
        many, seed=seed, geometry="test", vocab_size=64, dtype=torch.float32, max_shard_bytes=300_000
    )
    write_random_checkpoint(other, seed=seed + 1, geometry="test", vocab_size=64, dtype=torch.float32)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    whole, parts, others = read_all(one), read_all(many), read_all(other)
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(torch.equal(whole[name], others[name]) for name in whole)


def test_fp8_stores_the_projections_that_fit(tmp_path: Path, seed: int) -> None:
    write_random_checkpoint(tmp_path / "model", seed=seed, geometry="demo", vocab_size=64, fp8=True)
    tensors = read_all(tmp_path / "model")
    prefix = "model.layers.1."
    for name, fits in {
        "self_attn.kv_a_proj_with_mqa": True,
        "self_attn.kv_b_proj": True,
        "self_attn.q_b_proj": False,  # 64 columns are no whole block
        "self_attn.indexer.weights_proj": False,
        "mlp.gate": False,
        "mlp.experts.3.down_proj": True,
    }.items():
        weight = tensors[f"{prefix}{name}.weight"]
        assert weight.dtype == (torch.float8_e4m3fn if fits else torch.bfloat16), name
        assert (f"{prefix}{name}.weight_scale_inv" in tensors) == fits
    told = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert f"{prefix}self_attn.q_b_proj" in told["modules_to_not_convert"]
    assert f"{prefix}self_attn.kv_b_proj" not in told["modules_to_not_convert"]


def test_nothing_is_left_after_a_failure(tmp_path: Path, seed: int) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(AlreadyExists):
        write_random_checkpoint(tmp_path / "taken", seed=seed, geometry="test", vocab_size=64)
    with pytest.raises(InvalidArgument, match="geometry"):
        write_random_checkpoint(tmp_path / "model", seed=seed, geometry="huge", vocab_size=64)
    with pytest.raises(InvalidArgument, match="vocab_size"):
        write_random_checkpoint(tmp_path / "model", seed=seed, geometry="test", vocab_size=0)
    with pytest.raises(InvalidArgument, match="dtype"):
        write_random_checkpoint(tmp_path / "model", seed=seed, geometry="test", vocab_size=64, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_extra_files_come_with_it(tmp_path: Path, seed: int) -> None:
    write_random_checkpoint(
        tmp_path / "model", seed=seed, geometry="test", vocab_size=64, extra_files={"tokenizer.json": b"{}"}
    )
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b"{}"
