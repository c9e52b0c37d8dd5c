"""Rotary position embedding: yarn frequencies and the two layouts of rotated pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(dim: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Plain frequencies ``theta^(-2i / dim)``, i < dim / 2: [dim / 2] in ``dtype``."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)


def yarn_frequencies(
    dim: int,
    *,
    theta: float,
    factor: float,
    original_max_position: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Yarn's frequencies: slow pairs are stretched by ``factor``, fast ones kept, a ramp between.

        d(b) = dim ln(original_max_position / (2 pi b)) / (2 ln theta)
        r_i = clamp((i - floor(d(beta_fast))) / (ceil(d(beta_slow)) - floor(d(beta_fast))), 0, 1)
        f_i = r_i f / factor + (1 - r_i) f,  f = theta^(-2i / dim)

    dim: rotary channels, even. Returns [dim / 2] in ``dtype``; they hold at every length.
    Source: yarn (arXiv 2309.00071) as in DeepSeek-V3's ``precompute_freqs_cis``.
    """

    def pair_with_rotations(rotations: float) -> float:
        return dim * math.log(original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_rotations(beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(beta_slow)), dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=dtype) - low) / width).clamp(0, 1)
    frequencies = rope_frequencies(dim, theta, dtype)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def rope_angles(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, times ``amplitude``: each [T, dim / 2] in the frequencies' dtype.

    positions: [T] int64. The product is rounded in that dtype too, as training did.
    """
    angles = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


def apply_rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of MLA's queries and shared key; the layout stays interleaved.

        y_2i = x_2i cos_i - x_2i+1 sin_i,  y_2i+1 = x_2i sin_i + x_2i+1 cos_i

    x: [T, dim] or [T, H, dim]; cos, sin: [T, dim / 2]. Computes in the wider of both
    dtypes, returns x's shape and dtype.
    """
    if x.is_cuda and torch.float64 not in (x.dtype, cos.dtype):
        from seamount.kernels.triton import elementwise

        return elementwise.apply_rope(x, cos, sin, interleaved=True)
    cos, sin = _over_heads(x, cos), _over_heads(x, sin)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def apply_rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + dim/2}) of the indexer's queries and key.

        y_i = x_i cos_i - x_{i+dim/2} sin_i,  y_{i+dim/2} = x_i sin_i + x_{i+dim/2} cos_i

    Shapes and dtypes as in ``apply_rope_interleaved``. The two are not interchangeable: each model part was trained
    with its own.
    """
    if x.is_cuda and torch.float64 not in (x.dtype, cos.dtype):
        from seamount.kernels.triton import elementwise

        return elementwise.apply_rope(x, cos, sin, interleaved=False)
    cos, sin = _over_heads(x, cos), _over_heads(x, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def _over_heads(x: Tensor, angles: Tensor) -> Tensor:
    return angles.unsqueeze(1) if x.dim() == angles.dim() + 1 else angles
