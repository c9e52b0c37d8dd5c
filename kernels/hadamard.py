"""The Hadamard rotation of indexer queries and keys."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from seamount.kernels.quant import wide_dtype


def hadamard_transform(x: Tensor) -> Tensor:
    """Multiply the last dimension by Sylvester's H_D / sqrt(D): orthonormal, symmetric, its own inverse.

    Dot products of two transformed vectors are unchanged; outliers are spread over all channels before quantisation,
    so queries and keys are always transformed both.

    x: [..., D], D a power of two. Computes in at least float32, returns x's dtype.
    Raises ValueError for another D.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"x has {size} channels; the Hadamard transform needs a power of two")
    wide = wide_dtype(x.dtype)
    return (x.to(wide) @ _matrix(size, wide, x.device)).to(x.dtype)


@cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # The first caller may be inside inference mode; the matrix is shared with callers outside.
    with torch.inference_mode(False):
        matrix = torch.ones((1, 1), dtype=dtype)
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        return matrix.mul(size**-0.5).to(device)
