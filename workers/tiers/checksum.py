"""CRC32C (Castagnoli) of pages in the tiers."""

from __future__ import annotations

import ctypes

import google_crc32c
from torch import Tensor

_PIECE_BYTES = 1 << 20


def as_bytes(image: Tensor) -> memoryview:
    """Contiguous uint8 on the host as its bytes, which the tensor must outlive."""
    assert image.is_contiguous(), "bytes that do not lie together"
    return memoryview((ctypes.c_char * image.numel()).from_address(image.data_ptr())).cast("B")


def crc32c(image: Tensor) -> int:
    """Of contiguous uint8 on the host."""
    assert image.is_contiguous(), "a checksum of bytes that do not lie together"
    crc, address, left = 0, image.data_ptr(), image.numel()
    while left > 0:  # in pieces: the interpreter's lock may be held meanwhile
        size = min(left, _PIECE_BYTES)
        crc = google_crc32c.extend(crc, (ctypes.c_char * size).from_address(address))
        address, left = address + size, left - size
    return int(crc)
