"""Kernels that Triton makes while a rank serves: each is one that its warm-up left out, and a stall of a step.

Triton tells when it is about to make a variant of a kernel that this process has not launched before (compiled, or
read from ``TRITON_CACHE_DIR``), and when that variant is loaded, on the thread that launches it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

_LOG = logging.getLogger(__name__)


class LateKernels:
    """Of this process: its hooks are Triton's, of which there is one each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._begun = threading.local()

    @property
    def count(self) -> int:
        """Variants made since ``watch``; 0 without it."""
        return self._count

    def watch(self) -> None:
        """Count and log from now on. Needs Triton; called once, when the rank is warm."""
        from triton import knobs

        knobs.runtime.jit_cache_hook = self._making
        knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def _making(self, *, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        """Before a variant is made. False: make it."""
        name = f"{fn.module.rpartition('.')[2]}.{fn.name}"
        self._begun.variant = time.monotonic(), name, describe(fn.jit_function.arg_names, compile)
        return False

    def _loaded(self, *_: object) -> None:
        """A variant is ready to be launched; its launcher, which is compiled as well, included."""
        variant: tuple[float, str, str] | None = self._begun.__dict__.pop("variant", None)
        if variant is None:
            return
        began, name, arguments = variant
        with self._lock:
            self._count += 1
        took_s = round(time.monotonic() - began, 3)
        _LOG.warning("kernel_made_late", extra={"kernel": name, "variant": arguments, "took_s": took_s})


def describe(names: list[str], compile: Mapping[str, Any]) -> str:
    """What sets a variant apart: ``n=1 rows:i32/16 BLOCK=64 num_warps=4``, layouts and functions left out.

    compile: as Triton's hook gets it. /16: known to be divisible by 16, or a pointer so aligned.
    """
    constants = {path[0]: value for path, value in compile["constants"].items() if len(path) == 1}
    divisible = {path[0] for attributes in compile["configs"] for path, known in attributes.items() if known}
    told = []
    for number, name in enumerate(names):
        if number not in constants:
            told.append(f"{name}:{compile['signature'][name]}{'/16' if number in divisible else ''}")
        elif isinstance(constants[number], int | float | str | None):
            told.append(f"{name}={constants[number]}")
    return " ".join([*told, f"num_warps={compile['num_warps']}"])
