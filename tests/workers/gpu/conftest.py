"""Models for a CUDA device: a small one, one layer of the real sizes, and a seed for fresh random inputs."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from seamount.workers.model.config import ModelConfig, YarnConfig

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


@pytest.fixture
def demo() -> ModelConfig:
    return DEMO


@pytest.fixture
def full_size() -> ModelConfig:
    """Every size that DeepSeek-V3.2 has, but one layer and a small vocabulary."""
    return FULL_SIZE
