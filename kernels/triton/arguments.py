"""Checks of arguments before a launch: a kernel never sees a shape, dtype, stride or device it was not written for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seamount.kernels.arguments import check_current


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    contiguous: bool = False,
) -> None:
    """Raise ValueError unless x has the shape (None: any size), one of the dtypes, ``like``'s device and dense rows.

    Dense rows: the last dimension has stride 1; the others may be strided unless ``contiguous``. ``like`` itself must
    be on the current device.
    """
    if x is like:
        check_current(x.device)
    fits = x.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{wanted}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}; it must be {' or '.join(str(dtype) for dtype in dtypes)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; the other arguments are on {like.device}")
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; it must be 1")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {list(x.stride())}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the elementwise kernels read and write; float64 stays with the references."""
