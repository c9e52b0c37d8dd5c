"""A rank in a process of its own: it warms up and steps, and prints how many variants of kernels were made for each.

    TRITON_CACHE_DIR=<empty folder> python warm_rank.py SEED RANK SIZE PORT

SIZE 1: bfloat16 weights. Else a gang with block-scaled ones; rank 0 opens its store and prints the port first. What is
made after the warm-up is told on stderr.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import random
import sys
from pathlib import Path

import torch
from conftest import DEMO
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE, CacheLayout
from seamount.workers.experts.dispatch import GangExperts, LocalExperts
from seamount.workers.gang import Gang
from seamount.workers.late_kernels import LateKernels
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer
from seamount.workers.scheduler import EngineLimits
from seamount.workers.warmup import warm_up

DEVICE = "cuda"
NUM_PAGES = 160
LIMITS = EngineLimits(max_batch_tokens=512, max_running=16, prefill_chunk_tokens=256, max_context_tokens=9216)
NUM_STEPS = 80
Part = tuple[int, int]
"""New tokens of one sequence and the position of the first."""
TURN: list[list[Part]] = [[part] for part in ((256, 0), (198, 256), (1, 453), (32, 548), (1, 579), (5, 0), (1, 5))]


def main(seed: int, rank: int, size: int, port: int) -> None:
    gang = Gang.alone()
    if size > 1:
        gang = Gang.join(
            store_host="127.0.0.1",
            store_port=port,
            gang_id="g",
            rank=rank,
            size=size,
            timeout_s=60.0,
            host_store=rank == 0,
            on_listening=lambda opened: print(opened, flush=True),
        )
    model = make_model(gang, seed)
    planes = model.layout.allocate(model.config.num_hidden_layers, NUM_PAGES, DEVICE)
    kernels = LateKernels()
    kernels.watch()
    logging.disable(logging.WARNING)
    warm_up(model, planes, gang, LIMITS, topk=model.config.index_topk, num_pages=NUM_PAGES)
    logging.disable(logging.NOTSET)
    num_warm = kernels.count
    rng, own = random.Random(seed), random.Random(seed + rank)
    for parts in [*TURN, *(draw_step(rng) for _ in range(NUM_STEPS))]:
        others = [draw_step(rng) if rng.random() < 0.3 else [] for _ in range(size - 1)]
        with torch.inference_mode():
            model.forward(lay_out([parts, *others][rank], own), planes).cpu()
    gang.close()
    print(json.dumps({"warm": num_warm, "late": kernels.count - num_warm}))


def make_model(gang: Gang, seed: int) -> Transformer:
    layout = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    if gang.group is None:
        return Transformer(DEMO, layout, plain_weights(DEMO, seed), LocalExperts(DEMO.n_routed_experts))
    config = dataclasses.replace(DEMO, q_lora_rank=128)
    experts = GangExperts(gang.group, config.n_routed_experts)
    owned = experts.map.owned(gang.rank)
    weights = layer_parameters(config, seed)
    for name, value in weights.items():
        if ".mlp.experts." in name:
            weights[name] = value[owned.start : owned.stop].contiguous()
    return Transformer(config, layout, weights, experts)


def plain_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        * (shape[1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in parameter_shapes(config, range(config.n_routed_experts)).items()
    }


def layer_parameters(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    path = Path(__file__).parents[1] / "layer_reference.py"
    spec = importlib.util.spec_from_file_location("layer_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Tensor] = module.parameters(config, seed, DEVICE)
    return made


def draw_step(rng: random.Random) -> list[Part]:
    """A step that the scheduler could make: sequences that decode, then chunks of prompts."""

    def position(length: int) -> int:
        most = rng.choice([2 * DEMO.index_topk, 1024, LIMITS.max_context_tokens])
        return rng.randrange(max(1, most - length))

    parts = [(1, position(1)) for _ in range(rng.choice([0, 1, 2, rng.randrange(LIMITS.max_running + 1)]))]
    room = LIMITS.prefill_chunk_tokens if parts else LIMITS.max_batch_tokens
    for _ in range(rng.randrange(3)):
        length = min(room, rng.choice([rng.randrange(2, 40), rng.randrange(2, LIMITS.prefill_chunk_tokens + 1)]))
        if length > 1:
            parts.append((length, position(length)))
            room -= length
    return parts


def lay_out(parts: list[Part], rng: random.Random) -> ForwardBatch:
    """Each sequence writes to pages of its own, behind any others."""
    free = rng.sample(range(NUM_PAGES), NUM_PAGES)
    sequences = []
    for length, first in parts:
        before = [rng.randrange(NUM_PAGES) for _ in range(first // PAGE_SIZE)]
        own = [free.pop() for _ in range(-(-(first + length) // PAGE_SIZE) - len(before))]
        sequences.append(([rng.randrange(DEMO.vocab_size) for _ in range(length)], first, before + own))
    return ForwardBatch.create(sequences)


if __name__ == "__main__":
    logging.basicConfig()
    logging.root.handlers[0].setFormatter(
        logging.Formatter("%(message)s %(kernel)s %(variant)s", defaults={"kernel": "", "variant": ""})
    )
    main(*map(int, sys.argv[1:]))
