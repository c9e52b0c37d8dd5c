"""Kernels that Triton makes while a rank serves: each is one that its warm-up left out, and a stall of a step.

Triton tells of each variant of a kernel that this process has not launched before when it has compiled it, or read it
from ``TRITON_CACHE_DIR``, and again when it is loaded, both on the thread that launches it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

_LOG = logging.getLogger(__name__)


class LateKernels:
    """Of this process: it is the one listener of Triton's compiler.

    Not by ``jit_cache_hook`` and ``jit_post_compile_hook``: for them Triton 3.6 writes a kernel's constants as JSON,
    and fails on Gluon's layouts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._made = threading.local()

    @property
    def count(self) -> int:
        """Variants made since ``watch``; 0 without it."""
        return self._count

    def watch(self) -> None:
        """Count and log from now on. Needs Triton; called once, when the rank is warm."""
        from triton import knobs

        knobs.compilation.listener = self._compiled
        knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def _compiled(self, *, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: object) -> None:
        """A variant is compiled, or read. times.total: microseconds that took."""
        told = {
            "kernel": f"{src.fn.__module__.rpartition('.')[2]}.{src.fn.__name__}",
            "variant": describe(src, metadata["num_warps"]),
            "from_disk": cache_hit,
        }
        self._made.variant = time.monotonic() - times.total / 1e6, told

    def _loaded(self, *_: object) -> None:
        """A variant is ready to be launched; its launcher, which is compiled as well, included."""
        variant: tuple[float, dict[str, Any]] | None = self._made.__dict__.pop("variant", None)
        if variant is None:
            return
        began, told = variant
        with self._lock:
            self._count += 1
        _LOG.warning("kernel_made_late", extra=told | {"took_s": round(time.monotonic() - began, 3)})


def describe(src: Any, num_warps: int) -> str:
    """What sets a variant apart: ``n=1 rows:i32/16 BLOCK=64 num_warps=4``, layouts and functions left out.

    src: Triton's ``ASTSource``. /16: known to be divisible by 16, or a pointer so aligned.
    """
    constants = {path[0]: value for path, value in src.constants.items() if len(path) == 1}
    divisible = {path[0] for path, known in src.attrs.items() if known}
    told = []
    for number, (name, kind) in enumerate(src.signature.items()):
        if number not in constants:
            told.append(f"{name}:{kind}{'/16' if number in divisible else ''}")
        elif isinstance(constants[number], int | float | str | None):
            told.append(f"{name}={constants[number]}")
    return " ".join([*told, f"num_warps={num_warps}"])
