"""Host memory for pages: slots of one size, pinned where a CUDA device copies from and to it."""

from __future__ import annotations

import torch
from torch import Tensor

_SEGMENT_BYTES = 1 << 30
"""PyTorch rounds pinned allocations up to powers of two: one of this size wastes nothing."""


class HostMemory:
    """``num_pages`` slots of ``image_bytes``. What is not pinned is taken from the system as it is first used."""

    def __init__(self, *, num_pages: int, image_bytes: int, pinned: bool) -> None:
        self.num_pages = num_pages
        self._image_bytes = image_bytes
        self._per_segment = max(1, _SEGMENT_BYTES // image_bytes)
        full, rest = divmod(num_pages, self._per_segment)
        sizes = [self._per_segment] * full + ([rest] if rest else [])
        self._segments = [torch.empty(size * image_bytes, dtype=torch.uint8, pin_memory=pinned) for size in sizes]

    def image(self, slot: int) -> Tensor:
        """[image_bytes] uint8: the slot itself, no copy."""
        segment, place = divmod(slot, self._per_segment)
        return self._segments[segment][place * self._image_bytes : (place + 1) * self._image_bytes]
