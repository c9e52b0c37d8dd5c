"""FP8 checkpoints on a CUDA device: the pieces, a whole layer of the real sizes, and a small one through the engine."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.moe import MoE
from seamount.workers.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.figures]


def transformer(config: ModelConfig, made: dict[str, Tensor]) -> Transformer:
    layout = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    return Transformer(config, layout, made, LocalExperts(config.n_routed_experts))


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def ieee() -> Iterator[None]:
    """References multiply in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@torch.inference_mode()
def test_a_full_size_moe_layer_is_its_formula(
    seed: int, full_size: ModelConfig, ieee: None, layer_reference: ModuleType
) -> None:
    made = layer_reference.parameters(full_size, seed, "cuda")
    below = {name.removeprefix("model.layers.0.mlp."): value for name, value in made.items() if ".mlp." in name}
    moe = MoE(full_size, below, LocalExperts(full_size.n_routed_experts))
    for tokens in (0, 1, 37, 700):
        x = torch.randn((tokens, full_size.hidden_size), device="cuda").bfloat16()
        actual = moe.forward(x)
        assert actual.shape == x.shape
        assert torch.equal(actual, moe.forward(x))
        if tokens:
            for rounds, bound in ((True, 0.03), (False, 0.08)):
                expected = layer_reference.Reference(full_size, made, rounds=rounds).moe(x.float())
                error = layer_reference.relative(actual, expected)
                print(f"{tokens} tokens, activations rounded in the reference: {rounds}: error {error:.2e}")
                assert error < bound


@torch.inference_mode()
def test_a_full_size_layer_prefills_and_decodes(
    seed: int, full_size: ModelConfig, ieee: None, layer_reference: ModuleType
) -> None:
    made = layer_reference.parameters(full_size, seed, "cuda", clear_choices=True)
    model = transformer(full_size, made)
    rng = random.Random(seed)
    pages = rng.sample(range(64), 60)
    short = [rng.randrange(full_size.vocab_size) for _ in range(900)]
    planes = model.layout.allocate(1, 64, "cuda")
    prefill = model.forward(ForwardBatch.create([(short[:-1], 0, pages)], range(899)), planes)
    decode = model.forward(ForwardBatch.create([(short[-1:], 899, pages)]), planes)
    expected = layer_reference.Reference(full_size, made, rounds=False).logits(short)
    errors = layer_reference.relative(prefill, expected[:-1]), layer_reference.relative(decode, expected[-1:])
    print(f"900 tokens against float32: prefill {errors[0]:.2e}, decode {errors[1]:.2e}")
    assert max(errors) < 0.2

    long = [rng.randrange(full_size.vocab_size) for _ in range(3000)]
    whole = model.forward(ForwardBatch.create([(long, 0, pages)]), planes)
    again = model.layout.allocate(1, 64, "cuda")
    for first in range(0, 2999, 1000):
        model.forward(ForwardBatch.create([(long[first : min(first + 1000, 2999)], first, pages)], []), again)
    decoded = model.forward(ForwardBatch.create([(long[-1:], 2999, pages)]), again)
    error = layer_reference.relative(decoded, whole)
    print(f"3,000 tokens, beyond top-k: prefill against chunks and a decode step {error:.2e}")
    assert torch.isfinite(decoded).all()
    assert error < 0.15


@torch.inference_mode()
def test_a_small_layer_agrees_with_the_cpu(seed: int, demo: ModelConfig, layer_reference: ModuleType) -> None:
    config = dataclasses.replace(demo, q_lora_rank=128)
    made = layer_reference.parameters(config, seed, "cuda", clear_choices=True)
    gpu, cpu = transformer(config, made), transformer(config, {name: value.cpu() for name, value in made.items()})
    rng = random.Random(seed)
    pages = rng.sample(range(16), 12)
    ids = [rng.randrange(config.vocab_size) for _ in range(60)]
    batch = ForwardBatch.create([(ids, 0, pages)], range(60))
    expected = cpu.forward(batch, cpu.layout.allocate(1, 16))
    error = layer_reference.relative(gpu.forward(batch, gpu.layout.allocate(1, 16, "cuda")).cpu(), expected)
    print(f"60 tokens: the GPU against the CPU {error:.2e}")
    assert error < 0.15


def test_an_fp8_checkpoint_through_the_engine(
    seed: int, tmp_path: Path, make_rank: Callable[..., Any], rng: random.Random
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed: no checkpoint to read")
    from seamount.workers.model.random_checkpoint import write_random_checkpoint
    from seamount.workers.model.weights import load_model
    from seamount.workers.requests import SamplingParams

    write_random_checkpoint(tmp_path / "model", seed=seed, geometry="demo", vocab_size=300, fp8=True)
    model = load_model(tmp_path / "model", dtype=torch.bfloat16, layout_name="fp8", device="cuda")
    stored = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert model.expert_bytes < stored
    rank = make_rank(model=model, num_pages=200)
    greedy = SamplingParams(seed=1, max_output_tokens=12, temperature=0.0)
    prompts = [[rng.randrange(300) for _ in range(rng.choice([1, 63, 65, 200]))] for _ in range(6)]
    alone = [rank.generate(ids, greedy) for ids in prompts]
    assert alone == [rank.generate(ids, greedy) for ids in prompts]
    together = [rank.ask(ids, greedy) for ids in prompts]
    for client in together:
        assert client.finished().reason == "length"
        assert len(client.token_ids) == 12
    assert len({tuple(ids) for ids in alone}) == len(prompts)
