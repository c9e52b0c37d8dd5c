"""The receiving end of one transfer: verified rows go into the planes, and how far they reach is known at any time."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from seamount.kernels.layout import CacheLayout, CachePlanes, scatter_slots

_log = logging.getLogger("seamount.transfer")


class Receive:
    """Token positions [first, end) into ``slots`` [end - first] int64.

    Rows of a layer must come in order. Behind a damaged frame nothing of that layer is taken: ``verified_len`` stops
    before it, and what lacks is computed again.
    on_progress: called with ``verified_len`` whenever it grew, on the link's thread; must not raise.
    """

    def __init__(
        self,
        *,
        planes: CachePlanes,
        layout: CacheLayout,
        slots: Tensor,
        first: int,
        end: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.verified_len = first
        """Positions from ``first`` to before this one are present and verified in every plane of every layer."""
        self._planes, self._layout = planes, layout
        self._slots = slots.to(planes.latent[0].device)
        self._first, self._end = first, end
        self._on_progress = on_progress
        self._layer_ends = [first] * len(planes.latent)

    def accept(self, layer: int, first: int, latent: Tensor, index: Tensor) -> None:
        end = first + latent.shape[0]
        if first != self._layer_ends[layer] or end > self._end:
            return
        slots = self._slots[first - self._first : end - self._first]
        device = slots.device
        scatter_slots(self._planes.latent[layer], slots, latent.to(device), self._layout, "latent")
        scatter_slots(self._planes.index[layer], slots, index.to(device), self._layout, "index")
        self._layer_ends[layer] = end
        verified_len = min(self._layer_ends)
        if verified_len > self.verified_len:
            self.verified_len = verified_len
            self._on_progress(verified_len)

    def damaged(self, layer: int, first: int, count: int) -> None:
        _log.warning("frame_damaged", extra={"layer": layer, "first": first, "count": count})
