"""The feed-forward halves of the layers: one plain MLP, or routed experts beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from seamount.kernels.moe import gate
from seamount.kernels.quant import wide_dtype
from seamount.workers.experts.dispatch import Dispatched, ExpertParallel
from seamount.workers.model.config import ModelConfig


class MLP:
    """down(silu(gate x) * (up x)); the product in at least float32. parameters: by their names within the MLP."""

    def __init__(self, parameters: Mapping[str, Tensor], prefix: str = "") -> None:
        self._gate = parameters[f"{prefix}gate_proj.weight"]
        self._up = parameters[f"{prefix}up_proj.weight"]
        self._down = parameters[f"{prefix}down_proj.weight"]

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden], the same dtype; T may be 0."""
        wide = wide_dtype(x.dtype)
        inner = silu(linear(x, self._gate).to(wide)) * linear(x, self._up).to(wide)
        return linear(inner.to(x.dtype), self._down)


class MoE:
    """Routed experts, spread over the ranks of ``experts``, plus the shared expert.

    parameters: those of ``mlp``, by their names within it; of the routed experts only those that this rank owns.
    """

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor], experts: ExpertParallel) -> None:
        self._config = config
        self._experts = experts
        self._gate_weight = parameters["gate.weight"]
        self._gate_bias = parameters["gate.e_score_correction_bias"]
        self._local = [MLP(parameters, f"experts.{expert}.") for expert in experts.map.owned(experts.rank)]
        self._shared = MLP(parameters, "shared_experts.") if config.n_shared_experts else None

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
        dispatched = self._experts.dispatch(x, ids)
        out = self._experts.combine(self._run_local(dispatched), dispatched, weights)
        if self._shared is not None:
            out = out + self._shared.forward(x)
        return out.to(x.dtype)

    def _run_local(self, dispatched: Dispatched) -> Tensor:
        out = torch.empty_like(dispatched.x)
        start = 0
        for expert, count in zip(self._local, dispatched.rows_per_expert, strict=True):
            if count:
                out[start : start + count] = expert.forward(dispatched.x[start : start + count])
                start += count
        return out
