"""Frames: what travels over a pair link. A fixed header, then, for DATA, both planes' rows of one layer.

    offset  0  magic      4 bytes "SMKV"
            4  version    uint16
            6  kind       uint16      1 DATA, 2 END (of this transfer), 3 ALIVE (the sender has nothing yet)
            8  transfer   uint64      0 for ALIVE
           16  layer      uint32
           20  first      uint32      token position of the first row
           24  count      uint32      rows, 1..MAX_FRAME_TOKENS; 0 for END and ALIVE
           28  latent     uint32      bytes of a latent row
           32  index      uint32      bytes of an index row
           36  zero       uint32
           40  checksum   uint64      over header (checksum 0) and payload

Little-endian. Payload: ``count`` latent rows, ``count`` index rows, zeros up to a multiple of 8. What a header claims
is checked against what this rank knows before a byte of payload is awaited; buffers have their size from the layout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from seamount.wire.errors import DataLoss

PROTOCOL_VERSION: Final = 1
MAX_FRAME_TOKENS: Final = 1024
HEADER_BYTES: Final = 48

_MAGIC: Final = b"SMKV"
_HEADER: Final = struct.Struct("<4sHHQIIIIIIQ")
_WORDS: Final = struct.Struct("<6Q")
_MASK: Final = (1 << 64) - 1
assert _HEADER.size == _WORDS.size == HEADER_BYTES


class FrameKind(IntEnum):
    DATA = 1
    END = 2
    ALIVE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameShape:
    """What both ranks agreed on: layers, and bytes of a token's row in each plane."""

    num_layers: int
    latent_bytes: int
    index_bytes: int

    @property
    def token_bytes(self) -> int:
        return self.latent_bytes + self.index_bytes

    def payload_bytes(self, count: int) -> int:
        """Bytes of a DATA frame's payload, padding included; 0 for 0 rows."""
        return -(-count * self.token_bytes // 8) * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    kind: FrameKind
    transfer_id: int = 0
    layer: int = 0
    first: int = 0
    count: int = 0
    latent_bytes: int = 0
    index_bytes: int = 0
    checksum: int = 0

    def pack(self) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            PROTOCOL_VERSION,
            self.kind,
            self.transfer_id,
            self.layer,
            self.first,
            self.count,
            self.latent_bytes,
            self.index_bytes,
            0,
            self.checksum,
        )

    @staticmethod
    def unpack(raw: bytes, shape: FrameShape) -> FrameHeader:
        """Raises ``DataLoss`` (BAD_FRAME) unless every field is one that a rank of the same layout could have sent."""
        magic, version, kind, transfer_id, layer, first, count, latent, index, zero, checksum = _HEADER.unpack(raw)
        if magic != _MAGIC or version != PROTOCOL_VERSION or zero != 0:
            raise _bad("it does not begin as a frame of this protocol does")
        if kind not in FrameKind.__members__.values():
            raise _bad(f"its kind is {kind}")
        if kind == FrameKind.DATA:
            if (latent, index) != (shape.latent_bytes, shape.index_bytes):
                raise _bad(
                    f"its rows have {latent} and {index} bytes, not {shape.latent_bytes} and {shape.index_bytes}"
                )
            if layer >= shape.num_layers or not 1 <= count <= MAX_FRAME_TOKENS:
                raise _bad(f"layer {layer} of {shape.num_layers}, {count} of at most {MAX_FRAME_TOKENS} rows")
        elif (layer, first, count, latent, index) != (0, 0, 0, 0, 0):
            raise _bad("it carries no rows but describes some")
        return FrameHeader(
            kind=FrameKind(kind),
            transfer_id=transfer_id,
            layer=layer,
            first=first,
            count=count,
            latent_bytes=latent,
            index_bytes=index,
            checksum=checksum,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame ready to send. header: [48] uint8; payload: [payload_bytes] uint8, None unless DATA."""

    header: Tensor
    payload: Tensor | None

    @property
    def num_bytes(self) -> int:
        return HEADER_BYTES + (0 if self.payload is None else self.payload.numel())


def data_frame(transfer_id: int, layer: int, first: int, latent: Tensor, index: Tensor) -> Frame:
    """A DATA frame of rows [n, latent_bytes] and [n, index_bytes] uint8, 1 <= n <= MAX_FRAME_TOKENS."""
    count, latent_bytes, index_bytes = latent.shape[0], latent.shape[1], index.shape[1]
    shape = FrameShape(num_layers=layer + 1, latent_bytes=latent_bytes, index_bytes=index_bytes)
    payload = torch.empty(shape.payload_bytes(count), dtype=torch.uint8)
    split, end = count * latent_bytes, count * shape.token_bytes
    payload[:split] = latent.reshape(-1)
    payload[split:end] = index.reshape(-1)
    payload[end:] = 0
    header = FrameHeader(
        kind=FrameKind.DATA,
        transfer_id=transfer_id,
        layer=layer,
        first=first,
        count=count,
        latent_bytes=latent_bytes,
        index_bytes=index_bytes,
    )
    return Frame(header=_sealed(header, payload), payload=payload)


def end_frame(transfer_id: int) -> Frame:
    return Frame(header=_sealed(FrameHeader(kind=FrameKind.END, transfer_id=transfer_id), None), payload=None)


def alive_frame() -> Frame:
    return Frame(header=_sealed(FrameHeader(kind=FrameKind.ALIVE), None), payload=None)


def is_intact(header: FrameHeader, payload: Tensor | None) -> bool:
    """Whether the header's checksum is that of the frame as it arrived."""
    return checksum(replace(header, checksum=0), payload) == header.checksum


def checksum(header: FrameHeader, payload: Tensor | None) -> int:
    """sum over i of word[i] * (2 i + 1) mod 2^64, of the frame's little-endian 64-bit words; header first.

    Odd factors: any change within one word is seen, and so are words that changed places. payload: uint8, a multiple
    of 8 bytes long, None for none.
    """
    words = _WORDS.unpack(header.pack())
    total = sum(word * (2 * i + 1) for i, word in enumerate(words))
    if payload is not None and payload.numel():
        total += int(torch.dot(payload.view(torch.int64), _factors(payload.numel() // 8)))
    return int(total & _MASK)


@lru_cache(maxsize=8)  # frames of one transfer have the same few sizes
def _factors(num_words: int) -> Tensor:
    before = HEADER_BYTES // 8
    return torch.arange(before, before + num_words) * 2 + 1


def split_payload(header: FrameHeader, payload: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a DATA frame: [count, latent_bytes] and [count, index_bytes] uint8, views of ``payload``."""
    split = header.count * header.latent_bytes
    end = split + header.count * header.index_bytes
    return payload[:split].view(header.count, -1), payload[split:end].view(header.count, -1)


def _sealed(header: FrameHeader, payload: Tensor | None) -> Tensor:
    sealed = replace(header, checksum=checksum(header, payload))
    return torch.frombuffer(bytearray(sealed.pack()), dtype=torch.uint8)


def _bad(why: str) -> DataLoss:
    return DataLoss(f"a frame on the link is damaged or foreign: {why}", reason="BAD_FRAME")
