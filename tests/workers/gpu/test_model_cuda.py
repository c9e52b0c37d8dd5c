"""The model on a CUDA device: each layer against the CPU's on the same inputs, and one layer of the real sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.indexer import Indexer
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.figures]

NUM_PAGES = 40


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
def test_a_layer_agrees_with_the_cpu_on_the_same_inputs(seed: int, demo: ModelConfig, layout: str) -> None:
    dtype = torch.bfloat16
    weights = parameters(demo, seed, "cpu", dtype)
    cpu = transformer(demo, weights, layout, dtype)
    gpu = transformer(demo, {name: value.to("cuda") for name, value in weights.items()}, layout, dtype)
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


def selections(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Where the positions that the indexer selects for the last row of each step are kept from now on."""
    kept: list[Tensor] = []

    def keeping(select: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def selected(*arguments: Any) -> Tensor:
            positions = select(*arguments)
            kept.append(positions[-1])
            return positions

        return selected

    monkeypatch.setattr(Indexer, "select_chunk", keeping(Indexer.select_chunk))
    monkeypatch.setattr(Indexer, "select_decode", keeping(Indexer.select_decode))
    return kept


def test_a_full_size_layer_prefills_and_decodes(
    seed: int, full_size: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    made = parameters(full_size, seed, "cuda", dtype)
    # The bias decides alone: one expert chosen otherwise, by rounding before the gate, would be a third of a row.
    made["model.layers.0.mlp.gate.e_score_correction_bias"] *= 1000
    model = transformer(full_size, made, "fp8", dtype)
    planes = model.layout.allocate(1, 64, "cuda")
    rng = random.Random(seed)
    ids = [rng.randrange(1024) for _ in range(3000)]
    pages = rng.sample(range(64), 48)
    selected = selections(monkeypatch)
    whole = model.forward(ForwardBatch.create([(ids, 0, pages)]), planes)
    by_prefill = set(selected[-1].tolist())
    again = model.layout.allocate(1, 64, "cuda")
    for first in range(0, 2999, 1000):
        chunk = ids[first : min(first + 1000, 2999)]
        model.forward(ForwardBatch.create([(chunk, first, pages)], []), again)
    decoded = model.forward(ForwardBatch.create([([ids[-1]], 2999, pages)]), again)
    exchanged = len(by_prefill - set(selected[-1].tolist()))
    error = (decoded - whole).norm() / whole.norm()
    print(f"full-size layer, 3,000 tokens: prefill against chunks and a decode step {error:.2e}, exchanged {exchanged}")
    assert torch.isfinite(decoded).all()
    # Rounded anew to bfloat16 and e4m3, queries and keys move scores by up to 0.04 of their spread; of 3,000 normal
    # scores 430 x 0.04 then change sides of the 2,048th.
    assert exchanged <= 20
    # A token exchanged is two of 2,048 random terms of the attention's sum. What follows takes 0.5 to 1.2 of that into
    # the logits (single tokens may weigh more); rounding to bfloat16 on the way, 0.01 to 0.02.
    assert error < 0.03 + 2 * (2 * exchanged / full_size.index_topk) ** 0.5
