"""CRC32C (Castagnoli) of pages in the tiers."""

from __future__ import annotations

import ctypes

import google_crc32c
from google_crc32c import _crc32c
from torch import Tensor

# The package's C function itself: called through the package it would hold the interpreter's lock for a whole page.
_extend = ctypes.CDLL(_crc32c.__file__).crc32c_extend
_extend.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
_extend.restype = ctypes.c_uint32


def as_bytes(image: Tensor) -> memoryview:
    """Contiguous uint8 on the host as its bytes, which the tensor must outlive."""
    assert image.is_contiguous(), "bytes that do not lie together"
    return memoryview((ctypes.c_char * image.numel()).from_address(image.data_ptr())).cast("B")


def crc32c(image: Tensor) -> int:
    """Of contiguous uint8 on the host. Other threads run meanwhile."""
    assert image.is_contiguous(), "a checksum of bytes that do not lie together"
    return int(_extend(0, image.data_ptr(), image.numel()))


def crc32c_of(data: bytes) -> int:
    """Of a few bytes."""
    return int(google_crc32c.value(data))
