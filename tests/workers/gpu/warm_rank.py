"""A process of its own, whose kernels nobody has compiled: prints what a warm-up compiles, then what a turn still does.

TRITON_CACHE_DIR=<empty folder> python warm_rank.py SEED
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch
from conftest import DEMO

from seamount.kernels.layout import CacheLayout
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.gang import Gang
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.transformer import Transformer
from seamount.workers.scheduler import EngineLimits
from seamount.workers.warmup import warm_up

NUM_PAGES = 40
LIMITS = EngineLimits(max_batch_tokens=512, max_running=16, prefill_chunk_tokens=256, max_context_tokens=2048)


def compiled() -> dict[str, int]:
    """Variants of each kernel in the cache's folder, by the kernel's name."""
    counts: dict[str, int] = {}
    for path in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.json"):
        if not path.name.startswith("__grp__"):
            counts[path.stem] = counts.get(path.stem, 0) + 1
    return counts


def main(seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        * (shape[1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in parameter_shapes(DEMO, range(DEMO.n_routed_experts)).items()
    }
    layout = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    model = Transformer(DEMO, layout, weights, LocalExperts(DEMO.n_routed_experts))
    planes = layout.allocate(1, NUM_PAGES, "cuda")
    warm_up(model, planes, Gang.alone(), LIMITS, topk=DEMO.index_topk, num_pages=NUM_PAGES)
    warm = compiled()
    rng = random.Random(seed)
    at, pages = 0, rng.sample(range(NUM_PAGES), 16)
    for length in (100, 256, rng.randrange(2, 256), 1, 1, 1):
        model.forward(ForwardBatch.create([([5] * length, at, pages)]), planes).cpu()
        at += length
    other = next(page for page in range(NUM_PAGES) if page not in pages)
    model.forward(ForwardBatch.create([([7], at, pages), ([8], 3, [other])]), planes).cpu()
    print(json.dumps({"warm": warm, "after": compiled()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
