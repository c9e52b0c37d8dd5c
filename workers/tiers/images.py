"""A page as one run of bytes: all its planes, layer by layer, between the device's caches and host memory.

image:  latent of layer 0 | index of layer 0 | latent of layer 1 | …   (``kernels.layout`` has the bytes of each)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seamount.kernels.layout import CachePlanes

BATCH_PAGES = 16
"""Pages that go at once; a CUDA device keeps a buffer of so many for each direction."""


class PageImages:
    """Copies pages between planes and images; one thread uses an instance. Calls return when all is copied.

    On CUDA copies run on a stream of their own, behind what the engine has launched until then: entries that a step
    computed are read complete, and no page is written that a step still reads. Many small planes go through one buffer
    on the device, so that the bus sees whole pages.
    """

    def __init__(self, planes: CachePlanes) -> None:
        self._planes = [plane for pair in zip(planes.latent, planes.index, strict=True) for plane in pair]
        self.image_bytes = image_bytes(planes)
        self._device = self._planes[0].device
        self._stream: torch.cuda.Stream | None = None
        self._buffer: Tensor | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._buffer = torch.empty((BATCH_PAGES, self.image_bytes), dtype=torch.uint8, device=self._device)

    def save(self, pages: Sequence[int], images: Sequence[Tensor]) -> None:
        """Pages of the device into images, [image_bytes] uint8 on the host each; at most BATCH_PAGES."""
        if self._stream is None or self._buffer is None:
            for page, image in zip(pages, images, strict=True):
                for plane, part in self._parts(image):
                    part.copy_(plane[page])
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            rows = torch.tensor(pages, dtype=torch.int64, device=self._device)
            buffer = self._buffer[: len(pages)]
            for plane, part in self._parts(buffer):
                part.view(torch.int64).copy_(plane.view(torch.int64).index_select(0, rows))
            for row, image in zip(buffer, images, strict=True):
                image.copy_(row, non_blocking=True)
        self._stream.synchronize()

    def load(self, images: Sequence[Tensor], pages: Sequence[int]) -> None:
        """The inverse."""
        if self._stream is None or self._buffer is None:
            for page, image in zip(pages, images, strict=True):
                for plane, part in self._parts(image):
                    plane[page].copy_(part)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            rows = torch.tensor(pages, dtype=torch.int64, device=self._device)
            buffer = self._buffer[: len(pages)]
            for row, image in zip(buffer, images, strict=True):
                row.copy_(image, non_blocking=True)
            for plane, part in self._parts(buffer):
                plane.view(torch.int64).index_copy_(0, rows, part.view(torch.int64))
        self._stream.synchronize()

    def _parts(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each plane with its part of images [..., image_bytes]. All begin and end at multiples of 64 bytes."""
        first = 0
        for plane in self._planes:
            end = first + plane.shape[1]
            yield plane, images[..., first:end]
            first = end


def image_bytes(planes: CachePlanes) -> int:
    """Of one page."""
    return sum(plane.shape[1] for plane in (*planes.latent, *planes.index))
