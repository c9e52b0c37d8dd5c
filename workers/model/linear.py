"""Projections in the two forms a checkpoint stores them: floats, or e4m3 with one scale a block of 128 x 128.

A block-scaled projection quantises its input (one power-of-two scale a token and 128 channels) and returns bfloat16
numbers, on every device: what DeepSeek-V3.2 was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from seamount.kernels.gemm import decode_weight, fp8_gemm
from seamount.kernels.quant import BLOCK_SIZE, quantize
from seamount.workers.model.parameters import SCALE_SUFFIX, block_counts


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
    if isinstance(weight, Tensor):
        return linear(x, weight)
    return fp8_gemm(*quantize(x), weight.values, weight.scales).to(x.dtype)


class Projections:
    """Several projections of one input. If all are block-scaled they are one product: the input is quantised once.

    The joined weight is a copy, each part's rows filled up with zeros to whole blocks; other forms are kept as given.
    """

    def __init__(self, *weights: Weight) -> None:
        self._weights = weights
        self._joined: BlockScaled | None = None
        scaled = [weight for weight in weights if isinstance(weight, BlockScaled)]
        if len(scaled) == len(weights):
            self._slices = _slices_of([weight.values.shape[0] for weight in scaled])
            self._joined = _join(scaled)
            self._weights = ()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, K] to one [T, N] for each weight, in x's dtype; of a joined product they are slices."""
        if self._joined is None:
            return tuple(project(x, weight) for weight in self._weights)
        out = project(x, self._joined)
        return tuple(out[:, columns] for columns in self._slices)


def _slices_of(rows: Sequence[int]) -> list[slice]:
    slices, first = [], 0
    for count in rows:
        slices.append(slice(first, first + count))
        first += block_counts((count, 0))[0] * BLOCK_SIZE
    return slices


def _join(weights: Sequence[BlockScaled]) -> BlockScaled:
    # As bytes: not every operation knows float8.
    rows = [pad(weight.values.view(torch.uint8), (0, 0, 0, -weight.values.shape[0] % BLOCK_SIZE)) for weight in weights]
    scales = [weight.scales for weight in weights if weight.scales is not None]
    values = torch.cat(rows).view(weights[0].values.dtype)
    return BlockScaled(values=values, scales=torch.cat(scales) if scales else None)


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
