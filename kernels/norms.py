"""Normalisations, computed in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.kernels.quant import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x: [..., D]; weight: [D]. Computes in float32 (float64 for float64 x), weight included; returns x's shape and dtype.
    """
    if x.is_cuda and x.dtype != torch.float64:
        from seamount.kernels.triton import elementwise

        return elementwise.rms_norm(x, weight, eps)
    wide = wide_dtype(x.dtype)
    values = x.to(wide)
    scale = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * scale * weight.to(wide)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; dtypes as in ``rms_norm``."""
    if x.is_cuda and x.dtype != torch.float64:
        from seamount.kernels.triton import elementwise

        return elementwise.layer_norm(x, weight, bias, eps)
    wide = wide_dtype(x.dtype)
    return torch.nn.functional.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)
