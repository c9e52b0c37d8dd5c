"""Checks of what a kernel is launched with: a kernel itself cannot refuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seamount.kernels.layout import CacheLayout, PlaneName

INTEGERS = (torch.int32, torch.int64)


def check_tensor(
    name: str, x: Tensor, shape: Sequence[int], device: torch.device, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """Raises ValueError unless x has this shape, lies on this device and has one of these dtypes (None: any)."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as the other tensors are")
    if dtypes is not None and x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}; it must be {' or '.join(str(dtype) for dtype in dtypes)}")


def check_current(device: torch.device) -> None:
    """Raises ValueError for a CUDA device that is not the current one: Triton launches there, wherever tensors are."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"tensors are on {device}; the current device is cuda:{torch.cuda.current_device()}: "
            f"call within `with torch.cuda.device({device.index})`"
        )


def check_plane(plane: Tensor, layout: CacheLayout, which: PlaneName, device: torch.device) -> None:
    """Raises ValueError unless ``plane`` is a contiguous, 16-byte aligned plane of the layout on the current device."""
    check_current(device)
    check_tensor("plane", plane, (plane.shape[0], layout.page_bytes(which)), device, (torch.uint8,))
    if not plane.is_contiguous():
        raise ValueError("plane is not contiguous; pages must be adjacent")
    if plane.data_ptr() % 16:
        raise ValueError("plane does not start at a multiple of 16 bytes")
