"""The model on a CUDA device: each layer against the CPU's on the same inputs, and one layer of the real sizes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig, YarnConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.figures]

NUM_PAGES = 40
DEMO = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=16,
    q_lora_rank=64,
    kv_lora_rank=512,
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    v_head_dim=32,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=64,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=0,
    rms_norm_eps=1e-6,
    max_position_embeddings=163840,
    rope_theta=10000.0,
    yarn=YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    bos_token_id=0,
    eos_token_id=1,
)
FULL_SIZE = dataclasses.replace(
    DEMO,
    vocab_size=1024,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_attention_heads=128,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    v_head_dim=128,
    index_topk=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
)


@pytest.fixture
def seed() -> int:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    chosen = random.SystemRandom().randrange(1 << 31)
    print(f"seed {chosen}")
    return chosen


def parameters(config: ModelConfig, seed: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config, range(config.n_routed_experts)).items():
        noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        if name.endswith("norm.weight"):
            made[name] = 1 + 0.1 * noise
        else:
            made[name] = 0.1 * noise if len(shape) == 1 else noise * shape[1] ** -0.5
    return made


def transformer(config: ModelConfig, weights: dict[str, Tensor], layout: str, dtype: torch.dtype) -> Transformer:
    made = CacheLayout.create(layout, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=dtype)
    return Transformer(config, made, weights, LocalExperts(config.n_routed_experts))


def moved(planes: CachePlanes, device: str) -> CachePlanes:
    return CachePlanes(
        latent=[plane.to(device) for plane in planes.latent], index=[plane.to(device) for plane in planes.index]
    )


@pytest.mark.parametrize("layout", ["fp8", "bf16"])
def test_a_layer_agrees_with_the_cpu_on_the_same_inputs(seed: int, layout: str) -> None:
    dtype = torch.bfloat16
    weights = parameters(DEMO, seed, "cpu", dtype)
    cpu = transformer(DEMO, weights, layout, dtype)
    gpu = transformer(DEMO, {name: value.to("cuda") for name, value in weights.items()}, layout, dtype)
    planes = cpu.layout.allocate(1, NUM_PAGES)
    rng = random.Random(seed)
    pages = rng.sample(range(NUM_PAGES), NUM_PAGES)
    shares = {"long": pages[:12], "short": pages[12:14], "append": pages[14:24]}
    prompts = {
        name: [rng.randrange(512) for _ in range(length)]
        for name, length in {"long": 700, "short": 33, "append": 600}.items()
    }
    # Contexts first, on the CPU; then one mixed step on both: a decode row, a short decode row, a chunk.
    cpu.forward(ForwardBatch.create([(prompts[name], 0, shares[name]) for name in shares]), planes)
    on_gpu = moved(planes, "cuda")
    step = ForwardBatch.create(
        [
            ([5], 700, shares["long"]),
            ([6], 33, shares["short"]),
            ([rng.randrange(512) for _ in range(30)], 600, shares["append"]),
        ]
    )
    expected = cpu.forward(step, planes)
    got = gpu.forward(step, on_gpu).cpu()
    error = (got - expected).norm() / expected.norm()
    same_bytes = (on_gpu.latent[0].cpu() == planes.latent[0]).float().mean()
    print(f"{layout}: relative error of the logits {error:.2e}, latent bytes equal {same_bytes:.4f}")
    assert error < 0.06
    assert same_bytes > 0.98


def test_a_full_size_layer_prefills_and_decodes(seed: int) -> None:
    dtype = torch.bfloat16
    model = transformer(FULL_SIZE, parameters(FULL_SIZE, seed, "cuda", dtype), "fp8", dtype)
    planes = model.layout.allocate(1, 64, "cuda")
    rng = random.Random(seed)
    ids = [rng.randrange(1024) for _ in range(3000)]
    pages = rng.sample(range(64), 48)
    whole = model.forward(ForwardBatch.create([(ids, 0, pages)]), planes)
    again = model.layout.allocate(1, 64, "cuda")
    for first in range(0, 2999, 1000):
        chunk = ids[first : min(first + 1000, 2999)]
        model.forward(ForwardBatch.create([(chunk, first, pages)], []), again)
    decoded = model.forward(ForwardBatch.create([([ids[-1]], 2999, pages)]), again)
    error = (decoded - whole).norm() / whole.norm()
    print(f"full-size layer, 3,000 tokens: prefill against chunks and a decode step {error:.2e}")
    assert torch.isfinite(decoded).all()
    assert error < 0.06
