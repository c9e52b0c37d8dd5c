"""The variants of kernels that a rank would launch on an H100, found without one.

    python launches.py SEED demo|full RANKS

Needs Triton, compiles nothing. Tensors have no data and say that they are on CUDA; what Triton would compile is noted
instead. Rows from other ranks come in any number. Prints the numbers of variants of the warm-up and of 100 random
steps that it lacked, and those.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from gpu.conftest import DEMO, FULL_SIZE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from seamount.kernels.layout import PAGE_SIZE, CacheLayout
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.experts.mapping import ExpertMap
from seamount.workers.late_kernels import describe
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import (
    SCALE_SUFFIX,
    is_projection,
    kept_shapes,
    parameter_dtype,
    parameter_shapes,
    stays_block_scaled,
)
from seamount.workers.model.transformer import Transformer
from seamount.workers.scheduler import EngineLimits
from seamount.workers.warmup import batches

CUDA, NOWHERE = torch.device("cuda", 0), torch.device("meta")
NUM_STEPS = 100
Sizes = tuple[ModelConfig, EngineLimits, int]
SIZES: dict[str, Sizes] = {
    "demo": (
        dataclasses.replace(DEMO, q_lora_rank=128, index_topk=256, num_hidden_layers=2, first_k_dense_replace=1),
        EngineLimits(max_batch_tokens=512, max_running=64, prefill_chunk_tokens=256, max_context_tokens=16384),
        512,
    ),
    "full": (
        dataclasses.replace(FULL_SIZE, num_hidden_layers=2, first_k_dense_replace=1, vocab_size=129280),
        EngineLimits(max_batch_tokens=8192, max_running=128, prefill_chunk_tokens=2048, max_context_tokens=131072),
        4096,
    ),
}
"""Model, limits and pages."""


class Hopper(TorchFunctionMode):
    """Meta tensors as if they lay on an H100, each storage on 16 bytes."""

    def __torch_function__(
        self, func: Callable[..., Any], _: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.data_ptr:
            return args[0].storage_offset() * args[0].element_size()
        if func is torch.equal:  # whether float32 weights are bfloat16 numbers: they are
            return True
        there = [NOWHERE if value == CUDA else value for value in args]
        named = {name: NOWHERE if value == CUDA else value for name, value in (kwargs or {}).items()}
        result = func(*there, **named)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        return CUDA if result == NOWHERE else result


class Driver:
    """What Triton asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class Arrivals:
    """The experts of a gang's first rank, to which as many rows come as ``share`` draws of all that could."""

    def __init__(self, num_experts: int, num_ranks: int, share: Callable[[], float]) -> None:
        self.rank, self.size, self._share = 0, num_ranks, share
        self.map = ExpertMap(num_experts=num_experts, size=num_ranks)

    def dispatch(self, x: Tensor, expert_ids: Tensor) -> SimpleNamespace:
        num_rows = round(expert_ids.numel() * self.size * self._share())
        counts = [num_rows // self.map.num_local] * self.map.num_local
        counts[0] += num_rows - sum(counts)
        return SimpleNamespace(x=x.new_empty((num_rows, x.shape[1])), rows_per_expert=tuple(counts))

    def combine(self, y: Tensor, _: object, weights: Tensor) -> Tensor:
        return y.new_empty((weights.shape[0], y.shape[1]), dtype=torch.float32)


def main(seed: int, name: str, num_ranks: int) -> None:
    config, limits, num_pages = SIZES[name]
    rng = random.Random(seed)
    launched: dict[str, str] = {}

    def note(kernel: Any, key: str, signature: Any, _: int, constants: Any, options: Any, attrs: Any, __: bool) -> None:
        """In place of the compiler: a launch of nothing is none."""
        source = SimpleNamespace(signature=signature, constants=constants, attrs=attrs)
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        launched[name + key] = f"{name} {describe(source, options.num_warps)}"

    JITFunction._do_compile = note
    driver.set_active(Driver())
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment, return-value]
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment, return-value]
    torch.cuda.is_current_stream_capturing = lambda: False
    share = 0.0
    with Hopper(), torch.inference_mode():
        model = make_model(config, num_ranks, lambda: share)
        planes = model.layout.allocate(config.num_hidden_layers, num_pages, CUDA)
        for batch in batches(limits, topk=config.index_topk, num_pages=num_pages):
            is_uniform = len(batch.token_ids) > 1 and not batch.token_ids.any()  # all rows go to the same experts
            share = 0.75 if is_uniform else 1 / num_ranks
            model.forward(batch, planes)
        warm = dict(launched)
        for _ in range(NUM_STEPS):
            share = rng.choice([0.0, rng.random(), 1 / num_ranks])
            model.forward(draw_batch(rng, config, limits), planes)
    late = sorted(told for key, told in launched.items() if key not in warm)
    print(json.dumps({"warm": len(warm), "late": late}))


def make_model(config: ModelConfig, num_ranks: int, share: Callable[[], float]) -> Transformer:
    layout = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    num_experts = config.n_routed_experts
    experts = LocalExperts(num_experts) if num_ranks == 1 else Arrivals(num_experts, num_ranks, share)
    owned = experts.map.owned(0)
    shapes = parameter_shapes(config, owned)
    scaled = {name for name, shape in shapes.items() if is_projection(name, shape) and stays_block_scaled(name)}
    kept = kept_shapes(config, owned, scaled)
    weights: dict[str, Tensor] = {}
    for name, shape in kept.items():
        is_values = name + SCALE_SUFFIX in kept
        other = torch.float32 if name.endswith(SCALE_SUFFIX) else parameter_dtype(name, torch.bfloat16)
        weights[name] = torch.empty(shape, dtype=torch.float8_e4m3fn if is_values else other, device=CUDA)
    return Transformer(config, layout, weights, experts)  # type: ignore[arg-type]


def draw_batch(rng: random.Random, config: ModelConfig, limits: EngineLimits) -> ForwardBatch:
    """A step that the scheduler could make; pages do not matter."""

    def position(length: int) -> int:
        return rng.randrange(rng.choice([2 * config.index_topk, 8192, limits.max_context_tokens]) - length)

    chunk = limits.prefill_chunk_tokens
    num_decoding = rng.choice([0, 1, 2, rng.randrange(limits.max_running + 1)])
    parts = [(1, position(1)) for _ in range(num_decoding)]
    room = chunk if parts else limits.max_batch_tokens
    for _ in range(rng.choice([0, 1, 1, 2, 20])):
        length = min(room, rng.choice([chunk, rng.randrange(2, chunk + 1), rng.randrange(2, 40)]))
        if length > 1:
            parts.append((length, rng.choice([0, position(length)])))
            room -= length
    return ForwardBatch.create([([0] * n, first, range(-(-(first + n) // PAGE_SIZE))) for n, first in parts])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
