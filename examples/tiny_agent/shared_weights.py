"""Weights that one process trains and others sample with, in memory that they share."""

from __future__ import annotations

import math
import multiprocessing

import numpy as np
import torch
from torch import Tensor

from examples.tiny_agent.captured import EveryExpert
from examples.tiny_agent.export import checkpoint_views, stored_dtype
from examples.tiny_agent.model import Model
from seamount.kernels.layout import CacheLayout
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_dtype, parameter_shapes
from seamount.workers.model.transformer import Transformer

_SPAWN = multiprocessing.get_context("spawn")


class SharedWeights:
    """The parameters that serving needs: float32 numbers, rounded as a checkpoint of the model would be.

    dtype: in which the model computes. Made by the process that trains; others get it when they are started.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._shapes = parameter_shapes(config, range(config.n_routed_experts))
        self._values = _SPAWN.RawArray("f", sum(math.prod(shape) for shape in self._shapes.values()))
        self._lock = _SPAWN.Lock()
        self._version = _SPAWN.RawValue("q", 0)

    @property
    def version(self) -> int:
        """How often they were written."""
        return int(self._version.value)

    def write(self, model: Model) -> None:
        views = checkpoint_views(model)
        rounded = [views[name].to(self._rounding(name)).float().flatten() for name in self._shapes]
        flat = torch.cat(rounded).cpu()
        with self._lock:
            self._tensor().copy_(flat)
            self._version.value += 1

    def served(self, device: torch.device) -> tuple[Transformer, int]:
        """The serving engine's model of these weights, for captured steps; and their version."""
        config = self.config
        layout = CacheLayout.create(
            "bf16" if self.dtype == torch.bfloat16 else "exact",
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            index_head_dim=config.index_head_dim,
            dtype=self.dtype,
        )
        parameters, version = self._read(device)
        return Transformer(config, layout, parameters, EveryExpert(config.n_routed_experts)), version

    def _read(self, device: torch.device) -> tuple[dict[str, Tensor], int]:
        with self._lock:
            flat, version = self._tensor().to(device, copy=True), self.version
        parts = flat.split([math.prod(shape) for shape in self._shapes.values()])
        return {
            name: part.view(shape).to(parameter_dtype(name, self.dtype))
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }, version

    def _rounding(self, name: str) -> torch.dtype:
        return self.dtype if self.dtype != torch.bfloat16 else stored_dtype(name)

    def _tensor(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self._values, np.float32))
