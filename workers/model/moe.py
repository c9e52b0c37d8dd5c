"""The feed-forward halves of the layers: one plain MLP, or routed experts beside a shared one.

Each comes in two forms, by what the checkpoint stores: floats, or e4m3 with block scales and merged gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from seamount.kernels.gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_gemm_swiglu, swiglu_quantize
from seamount.kernels.moe import combine, gate, group_by_expert, permute_quantize
from seamount.kernels.quant import quantize, wide_dtype
from seamount.workers.experts.dispatch import Dispatched, ExpertParallel
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.linear import BlockScaled, exact_bfloat16
from seamount.workers.model.parameters import SCALE_SUFFIX


class FeedForward(Protocol):
    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], the same dtype; T may be 0."""
        ...


def make_mlp(parameters: Mapping[str, Tensor], prefix: str = "") -> FeedForward:
    """An MLP in the form of its parameters. parameters: by their names within it, after ``prefix``."""
    if f"{prefix}gate_up_proj.weight" in parameters:
        return BlockScaledMLP(parameters, prefix)
    return MLP(parameters, prefix)


class MLP:
    """down(silu(gate x) * (up x)); the product in at least float32."""

    def __init__(self, parameters: Mapping[str, Tensor], prefix: str = "") -> None:
        self._gate = parameters[f"{prefix}gate_proj.weight"]
        self._up = parameters[f"{prefix}up_proj.weight"]
        self._down = parameters[f"{prefix}down_proj.weight"]

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], the same dtype; T may be 0."""
        wide = wide_dtype(x.dtype)
        inner = silu(linear(x, self._gate).to(wide)) * linear(x, self._up).to(wide)
        return linear(inner.to(x.dtype), self._down)


class BlockScaledMLP:
    """The same from block-scaled weights, gate and up in one product; the inner activation is quantised too."""

    def __init__(self, parameters: Mapping[str, Tensor], prefix: str = "") -> None:
        self._gate_up = _block_scaled(parameters, f"{prefix}gate_up_proj.weight")
        self._down = _block_scaled(parameters, f"{prefix}down_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], the same dtype; T may be 0."""
        inner = fp8_gemm(*quantize(x), self._gate_up.values, self._gate_up.scales)
        return fp8_gemm(*swiglu_quantize(inner), self._down.values, self._down.scales).to(x.dtype)


class RoutedExperts(Protocol):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, shared: Tensor | None) -> Tensor:
        """Each token's chosen experts, weighted and summed in the order of its choices, over ``shared``.

        x: [T, hidden]; weights, ids: [T, K], the gate's; shared: [T, hidden] or None. Returns [T, hidden] in x's dtype.
        """
        ...


class PlainExperts:
    """The routed experts of this rank as one MLP each. parameters: those of ``mlp``, by their names within it."""

    def __init__(self, parameters: Mapping[str, Tensor], experts: ExpertParallel) -> None:
        self._experts = experts
        self._local = [MLP(parameters, f"experts.{expert}.") for expert in experts.map.owned(experts.rank)]

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, shared: Tensor | None) -> Tensor:
        """See ``RoutedExperts``."""
        dispatched = self._experts.dispatch(x, ids)
        out = self._experts.combine(self._run_local(dispatched), dispatched, weights)
        return (out if shared is None else out + shared).to(x.dtype)

    def _run_local(self, dispatched: Dispatched) -> Tensor:
        out = torch.empty_like(dispatched.x)
        start = 0
        for expert, count in zip(self._local, dispatched.rows_per_expert, strict=True):
            if count:
                out[start : start + count] = expert.forward(dispatched.x[start : start + count])
                start += count
        return out


class BlockScaledExperts:
    """The routed experts of this rank as two grouped products, SwiGLU and quantisation between them.

    parameters: ``experts.gate_up_proj`` [E, 2 I, hidden] and ``experts.down_proj`` [E, hidden, I], block-scaled.
    """

    def __init__(self, parameters: Mapping[str, Tensor], experts: ExpertParallel) -> None:
        self._experts = experts
        self._gate_up = _block_scaled(parameters, "experts.gate_up_proj.weight")
        self._down = _block_scaled(parameters, "experts.down_proj.weight")

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, shared: Tensor | None) -> Tensor:
        """See ``RoutedExperts``. With all experts here nothing travels and nothing waits for the device."""
        if self._experts.size == 1:
            order = group_by_expert(ids, self._experts.map.num_experts)
            rows = self._products(permute_quantize(x, order), order.offsets)
            return combine(rows.to(x.dtype), order, weights, shared)
        dispatched = self._experts.dispatch(x, ids)
        bounds = list(accumulate(dispatched.rows_per_expert, initial=0))
        offsets = torch.tensor(bounds, dtype=torch.int32, device=x.device)
        rows = self._products(quantize(dispatched.x), offsets).to(x.dtype)
        out = self._experts.combine(rows, dispatched, weights)
        return (out if shared is None else out + shared).to(x.dtype)

    def _products(self, quantized: tuple[Tensor, Tensor], offsets: Tensor) -> Tensor:
        inner = grouped_fp8_gemm_swiglu(*quantized, self._gate_up.values, self._gate_up.scales, offsets)
        return grouped_fp8_gemm(*inner, self._down.values, self._down.scales, offsets)


class MoE:
    """Routed experts, spread over the ranks of ``experts``, plus the shared expert.

    parameters: those of ``mlp``, by their names within it; of the routed experts only those that this rank owns.
    """

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor], experts: ExpertParallel) -> None:
        self._config = config
        self._gate_weight = exact_bfloat16(parameters["gate.weight"])
        self._gate_bias = parameters["gate.e_score_correction_bias"]
        merged = "experts.gate_up_proj.weight" in parameters
        self._routed: RoutedExperts = (BlockScaledExperts if merged else PlainExperts)(parameters, experts)
        self._shared = make_mlp(parameters, "shared_experts.") if config.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], the same dtype.

        Joins the gang's collectives whatever T is: with T = 0 this rank's experts still serve the other ranks' tokens.
        """
        config = self._config
        weights, ids = gate(
            x,
            self._gate_weight,
            self._gate_bias,
            num_groups=config.n_group,
            num_chosen_groups=config.topk_group,
            num_chosen=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        shared = None if self._shared is None else self._shared.forward(x)
        return self._routed.forward(x, weights, ids, shared)


def _block_scaled(parameters: Mapping[str, Tensor], name: str) -> BlockScaled:
    return BlockScaled.create(parameters[name], parameters[name + SCALE_SUFFIX])
