"""A tiny model of the real architecture, random weights, and a paged cache to run it on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig, YarnConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer

torch.set_num_threads(1)


def _tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=160,
        hidden_size=96,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=128,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=20,
        index_n_heads=32,
        index_head_dim=32,
        index_topk=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        rms_norm_eps=1e-6,
        max_position_embeddings=163840,
        rope_theta=10000.0,
        yarn=YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
        bos_token_id=0,
        eos_token_id=1,
    )


def _random_parameters(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config, range(config.n_routed_experts)).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            parameters[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            parameters[name] = 0.1 * noise
        else:
            parameters[name] = noise * shape[1] ** -0.5
    return parameters


@dataclass
class PagedRun:
    """A model with its own planes. Pages are handed out in random order; unused slots hold NaN bit patterns."""

    model: Transformer
    num_pages: int
    seed: int
    planes: CachePlanes = field(init=False)

    def __post_init__(self) -> None:
        self.planes = self.model.layout.allocate(self.model.config.num_hidden_layers, self.num_pages)
        for plane in (*self.planes.latent, *self.planes.index):
            plane.fill_(0xFF)  # NaN as e4m3, bfloat16, float32 and float64
        self._free = list(range(self.num_pages))
        random.Random(self.seed).shuffle(self._free)

    def new_pages(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // 64))]

    def step(
        self,
        sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]],
        *,
        all_rows: bool = False,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        rows = range(sum(len(ids) for ids, _, _ in sequences)) if all_rows else None
        return self.model.forward(ForwardBatch.create(sequences, rows), self.planes, on_layer=on_layer)

    def logits_in_chunks(self, token_ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        """Logits of every position of one new sequence, computed in steps of the given sizes."""
        assert sum(chunks) == len(token_ids)
        pages = self.new_pages(len(token_ids))
        parts, first = [], 0
        for size in chunks:
            parts.append(self.step([(token_ids[first : first + size], first, pages)], all_rows=True))
            first += size
        return torch.cat(parts)


@pytest.fixture
def tiny_config() -> ModelConfig:
    return _tiny_config()


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(1 << 31)
    print(f"seed {value}")
    return value


@pytest.fixture
def random_parameters() -> Callable[[ModelConfig, int], dict[str, Tensor]]:
    return _random_parameters


@pytest.fixture
def paged_run() -> Callable[..., PagedRun]:
    """Makes a PagedRun of a config, parameters, layout name and dtype."""

    def make(
        config: ModelConfig,
        parameters: dict[str, Tensor],
        *,
        layout: str = "exact",
        dtype: torch.dtype = torch.float64,
        num_pages: int = 24,
        seed: int = 0,
    ) -> PagedRun:
        cache_layout = CacheLayout.create(
            layout,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            index_head_dim=config.index_head_dim,
            dtype=dtype,
        )
        model = Transformer(config, cache_layout, parameters, LocalExperts(config.n_routed_experts))
        return PagedRun(model=model, num_pages=num_pages, seed=seed)

    return make
