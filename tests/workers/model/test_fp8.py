"""Block-scaled weights on a CPU: the same function as on a GPU, against a float32 layer written from the formulas."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from seamount.kernels.gemm import fp8_gemm
from seamount.kernels.layout import CacheLayout
from seamount.kernels.quant import quantize
from seamount.wire.errors import AlreadyExists, InvalidArgument
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.linear import BlockScaled, Projections, project
from seamount.workers.model.moe import MoE
from seamount.workers.model.quantize_checkpoint import quantize_checkpoint
from seamount.workers.model.random_checkpoint import write_random_checkpoint
from seamount.workers.model.transformer import Transformer
from seamount.workers.model.weights import load_model


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """Every width that FP8 products read is whole blocks; kv_a_proj_with_mqa has 4.5 of them."""
    return dataclasses.replace(
        tiny_config,
        num_hidden_layers=1,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        index_head_dim=128,
        index_topk=64,
        first_k_dense_replace=0,
    )


def transformer(config: ModelConfig, made: dict[str, Tensor], dtype: torch.dtype) -> Transformer:
    layout = CacheLayout.create("exact", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=dtype)
    return Transformer(config, layout, made, LocalExperts(config.n_routed_experts))


def test_a_projection_is_the_product_of_the_kernels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((200, 384), generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand((2, 3), generator=generator)
    x = torch.randn((33, 384), generator=generator)
    plain = torch.randn((5, 384), generator=generator)
    scaled = BlockScaled.create(values, scales)
    expected = fp8_gemm(*quantize(x), values, scales).float()
    assert torch.allclose(project(x, scaled), expected, rtol=2**-7, atol=1e-5)
    other = BlockScaled.create(values[:64], scales[:1])
    for weights in ((scaled, plain), (scaled, other, scaled)):
        parts = Projections(*weights).forward(x)
        assert len(parts) == len(weights)
        for part, weight in zip(parts, weights, strict=True):
            assert torch.allclose(part, project(x, weight), rtol=2**-7, atol=1e-5)
    assert project(x[:0].bfloat16(), scaled).shape == (0, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_formula(
    config: ModelConfig, seed: int, dtype: torch.dtype, layer_reference: ModuleType
) -> None:
    made = layer_reference.parameters(config, seed, "cpu", clear_choices=True)
    model = transformer(config, made, dtype)
    rng = random.Random(seed)
    ids = [rng.randrange(config.vocab_size) for _ in range(60)]
    planes = model.layout.allocate(1, 2)
    logits = model.forward(ForwardBatch.create([(ids, 0, [1, 0])], range(60)), planes)
    for rounds, bound in ((True, 0.15), (False, 0.2)):
        expected = layer_reference.Reference(config, made, rounds=rounds).logits(ids)
        error = layer_reference.relative(logits, expected)
        print(f"{dtype}, activations rounded in the reference: {rounds}: error {error:.2e}")
        assert error < bound


class Halves(LocalExperts):
    """All experts on this rank, reached as if rows had travelled."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.size = 2


@pytest.mark.parametrize("tokens", [1, 50])
def test_routed_experts_are_their_formula(
    config: ModelConfig, seed: int, tokens: int, layer_reference: ModuleType
) -> None:
    made = layer_reference.parameters(config, seed, "cpu")
    below = {name.removeprefix("model.layers.0.mlp."): value for name, value in made.items() if ".mlp." in name}
    x = torch.randn((tokens, config.hidden_size), generator=torch.Generator().manual_seed(seed)).bfloat16()
    out = MoE(config, below, LocalExperts(config.n_routed_experts)).forward(x)
    for rounds, bound in ((True, 0.03), (False, 0.08)):
        expected = layer_reference.Reference(config, made, rounds=rounds).moe(x.float())
        assert layer_reference.relative(out, expected) < bound


@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_rows_that_travel_give_the_same_sums(
    config: ModelConfig, seed: int, tokens: int, layer_reference: ModuleType
) -> None:
    made = layer_reference.parameters(config, seed, "cpu")
    below = {name.removeprefix("model.layers.0.mlp."): value for name, value in made.items() if ".mlp." in name}
    x = torch.randn((tokens, config.hidden_size)).bfloat16()
    here = MoE(config, below, LocalExperts(config.n_routed_experts)).forward(x)
    travelled = MoE(config, below, Halves(config.n_routed_experts)).forward(x)
    assert torch.equal(here, travelled)


def test_a_form_without_its_scales_is_refused(config: ModelConfig, seed: int, layer_reference: ModuleType) -> None:
    made = layer_reference.parameters(config, seed, "cpu")
    name = "model.layers.0.self_attn.o_proj.weight"
    for bad in (made[name].float(), made[name][:128]):
        with pytest.raises(InvalidArgument) as caught:
            transformer(config, made | {name: bad}, torch.bfloat16)
        assert caught.value.field == name
    del made[f"{name}_scale_inv"]
    with pytest.raises(InvalidArgument, match="o_proj"):
        transformer(config, made, torch.bfloat16)


def read_all(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 1 << 20])
def test_quantising_gives_the_fp8_form(tmp_path: Path, seed: int, max_shard_bytes: int) -> None:
    source, target, same = tmp_path / "bf16", tmp_path / "fp8", tmp_path / "same"
    extra = {"tokenizer.json": b"{}"}
    options = {"seed": seed, "geometry": "demo", "vocab_size": 67, "dtype": torch.float32, "extra_files": extra}
    write_random_checkpoint(source, **options, max_shard_bytes=3 << 20)
    write_random_checkpoint(same, **options, fp8=True)
    steps: list[tuple[str, int, int]] = []
    quantize_checkpoint(source, target, max_shard_bytes=max_shard_bytes, progress=lambda *step: steps.append(step))
    got, expected = read_all(target), read_all(same)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name
    assert json.loads((target / "config.json").read_text()) == json.loads((same / "config.json").read_text())
    assert (target / "tokenizer.json").read_bytes() == b"{}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bf16", "fp8", "same"]
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1] == steps[-1][2] == sum(tensor.nbytes for tensor in read_all(source).values())

    exact = load_model(source, dtype=torch.float32, layout_name="exact")
    model = load_model(target, dtype=torch.float32, layout_name="exact")
    batch = ForwardBatch.create([(torch.randint(67, (50,)).tolist(), 0, [0])], range(50))
    logits = [m.forward(batch, m.layout.allocate(m.config.num_hidden_layers, 1)) for m in (exact, model)]
    error = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
    print(f"logits of the FP8 form against the float form: {error:.3f}")
    assert 0 < error < 0.5  # four random layers, and the gate's choices change


def test_what_cannot_be_quantised_is_refused(tmp_path: Path, seed: int) -> None:
    write_random_checkpoint(tmp_path / "fp8", seed=seed, geometry="test", vocab_size=67, fp8=True)
    write_random_checkpoint(tmp_path / "bf16", seed=seed, geometry="test", vocab_size=67)
    with pytest.raises(InvalidArgument, match="quantised already"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "new")
    with pytest.raises(InvalidArgument, match="cannot read"):
        quantize_checkpoint(tmp_path / "none", tmp_path / "new")
    with pytest.raises(AlreadyExists):
        quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bf16", "fp8"]
