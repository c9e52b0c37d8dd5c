"""Projections in the two forms a checkpoint stores them: floats, or e4m3 with one scale a block of 128 x 128.

A block-scaled projection quantises its input (one power-of-two scale a token and 128 channels) and returns bfloat16
numbers, on every device: what DeepSeek-V3.2 was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from seamount.kernels.gemm import decode_weight, fp8_gemm
from seamount.kernels.quant import quantize
from seamount.workers.model.parameters import SCALE_SUFFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaled:
    """One weight [N, K], or a stack of experts' [E, N, K], as the products of ``seamount.kernels.gemm`` take it.

    On a GPU values are float8_e4m3fn beside their scales. On a CPU they are decoded once, float32, and scales is None:
    four times the bytes, but no decoding in each step.
    """

    values: Tensor
    scales: Tensor | None

    @staticmethod
    def create(values: Tensor, scales: Tensor) -> BlockScaled:
        """values: float8_e4m3fn; scales: float32, one a block."""
        if values.is_cuda:
            return BlockScaled(values=values, scales=scales)
        return BlockScaled(values=decode_weight(values, scales), scales=None)


Weight = Tensor | BlockScaled


def weight_of(parameters: Mapping[str, Tensor], name: str) -> Weight:
    """The weight of this name, block-scaled where the mapping has scales beside it."""
    scales = parameters.get(name + SCALE_SUFFIX)
    return parameters[name] if scales is None else BlockScaled.create(parameters[name], scales)


def project(x: Tensor, weight: Weight) -> Tensor:
    """x W^T: [T, K] and [N, K] to [T, N] in x's dtype."""
    return project_all(x, weight)[0]


def project_all(x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
    """``project`` of one input by several weights; what is block-scaled shares one quantised input."""
    quantized = quantize(x) if any(isinstance(weight, BlockScaled) for weight in weights) else None
    return tuple(_project(x, quantized, weight) for weight in weights)


def _project(x: Tensor, quantized: tuple[Tensor, Tensor] | None, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return linear(x, weight)
    assert quantized is not None
    return fp8_gemm(*quantized, weight.values, weight.scales).to(x.dtype)


def project_wide(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in at least float32, unrounded. weight: [N, K], as ``exact_bfloat16`` or the loader gave it."""
    if weight.dtype == x.dtype == torch.bfloat16:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return linear(x.to(weight.dtype), weight)


def exact_bfloat16(weight: Tensor) -> Tensor:
    """On a GPU: a float32 weight as bfloat16 where that loses nothing, else as it is.

    Products of bfloat16 numbers are exact in float32, so tensor cores then give the float32 result.
    """
    if weight.is_cuda and torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight):
        return weight.to(torch.bfloat16)
    return weight
