"""Functions that torch.compile turns into fused kernels on CUDA and that run as they are elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# A run goes through several stages; each has its shapes, and each kind of layer its own graph for them.
torch._dynamo.config.recompile_limit = 64

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """One graph for each set of shapes, without breaks. The pieces that are compiled are those of one layer, not the
    whole model: layers of a kind share the code, so a run compiles for seconds rather than minutes."""
    fast = torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (fast if _on_cuda(args) else function)(*args, **kwargs)

    return call  # type: ignore[return-value]


def _on_cuda(args: tuple[Any, ...]) -> bool:
    for arg in args:
        if isinstance(arg, tuple):
            if _on_cuda(arg):
                return True
        elif isinstance(arg, Tensor):
            return arg.is_cuda
    return False
