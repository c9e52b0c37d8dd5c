"""Pages in files of the node's disk, found again by the next process.

    <directory>/<first 16 hex digits of the identity>/<number>/
        lock        held (flock) by the one rank that uses the folder
        index.dat   header, then from 4096 on one record for each slot
        pages.dat   images; slot i at i * stride

The identity is a hash of model, cache layout and geometry: pages of another model are never seen. A rank takes the
first folder that nobody holds, the one with the most pages first: the kernel drops the lock of a process that died, so
a gang that starts again on the node finds what it left. Integers are little-endian:

    header  8s magic | u32 version | u32 page_size | u64 image_bytes | 32s identity | u32 CRC32C of what stands before
    record  u32 CRC32C of the rest | u32 CRC32C of the image | u64 order | u32 depth | 32s hash | 32s parent's hash |
            32s root hash | u16 length of session_id | 128s session_id | 4 * page_size token ids (u32)

A page is written in this order: its record is zeroed, the image is written, the record is written. A process that dies
in between leaves a free slot. What is erased is zeroed in both files. Nothing is synced: what a power cut tears does
not match its checksum, in the index when it is adopted, in an image when it is restored. Whoever can read the files can
tell what was said: they are the owner's alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from seamount.wire.errors import DataLoss, InvalidArgument
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.tier_door import StoredPage
from seamount.workers.tiers.checksum import as_bytes, crc32c_of

_LOG = logging.getLogger("seamount.tiers")
_MAGIC, _VERSION = b"SMPAGES\0", 1
_HEADER = struct.Struct("<8sIIQ32s")
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<IQI32s32s32sH128s")
_RECORDS_AT = 4096
_BLOCK = 4096
_READ_RECORDS = 1024
_LIBC = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of Linux's fallocate(2)."""
MAX_FOLDERS = 1024
"""Of one identity: more ranks than a node can hold."""


class DiskFile:
    """One folder, held until ``close`` or the end of the process. One thread writes; any number read.

    num_bytes: what the files may hold together.
    """

    def __init__(
        self, folder: Path, lock: int, *, identity: bytes, image_bytes: int, page_size: int, num_bytes: int
    ) -> None:
        self.folder = folder
        self._image_bytes, self._page_size = image_bytes, page_size
        self._stride = -(-image_bytes // _BLOCK) * _BLOCK
        self._record_bytes = _CRC.size + _RECORD.size + 4 * page_size
        self.num_pages = max(0, (num_bytes - _RECORDS_AT) // (self._stride + self._record_bytes))
        self._order = 0
        header = _HEADER.pack(_MAGIC, _VERSION, page_size, image_bytes, identity)
        self._header = header + _CRC.pack(crc32c_of(header))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._index = os.open(folder / "index.dat", flags, 0o600)
        self._pages = os.open(folder / "pages.dat", flags, 0o600)
        self._open = [lock, self._index, self._pages]
        if os.pread(self._index, len(self._header), 0) != self._header:
            self._begin_anew()
        os.ftruncate(self._index, _RECORDS_AT + self.num_pages * self._record_bytes)
        if os.fstat(self._pages).st_size > self.num_pages * self._stride:
            os.ftruncate(self._pages, self.num_pages * self._stride)

    @staticmethod
    def open(directory: Path, *, identity: bytes, image_bytes: int, page_size: int, num_bytes: int) -> DiskFile:
        """Take a folder that nobody holds. Raises InvalidArgument (DISK_CACHE_UNUSABLE)."""
        base = directory / identity.hex()[:16]
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in _candidates(base):
                folder.mkdir(mode=0o700, exist_ok=True)
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    continue
                return DiskFile(
                    folder,
                    lock,
                    identity=identity,
                    image_bytes=image_bytes,
                    page_size=page_size,
                    num_bytes=num_bytes,
                )
        except OSError as error:
            raise InvalidArgument(
                f"cache.disk_cache_dir: {directory} cannot be used: {error}",
                field="cache.disk_cache_dir",
                reason="DISK_CACHE_UNUSABLE",
            ) from error
        raise InvalidArgument(
            f"cache.disk_cache_dir: all {MAX_FOLDERS} folders in {base} are in use",
            field="cache.disk_cache_dir",
            reason="DISK_CACHE_UNUSABLE",
        )

    def close(self) -> None:
        """Give the folder up. Idempotent; nothing else may follow."""
        while self._open:
            os.close(self._open.pop())

    def stored(self) -> Iterator[StoredPage]:
        """What is there and whole as far as the index tells; images are checked as they are read."""
        size = os.fstat(self._pages).st_size
        for slot, raw in self._records():
            page = self._parse(slot, raw)
            if page is None or slot * self._stride + self._image_bytes > size:
                _LOG.warning("disk_record_damaged", extra={"folder": str(self.folder), "slot": slot})
                self.clear(slot)
                continue
            self._order = max(self._order, page.order)
            yield page

    def write(self, slot: int, node: PageNode, image: Tensor, crc: int) -> None:
        """Raises OSError where the disk is full or broken: the slot is free then."""
        self._order += 1
        session_id = node.owner_id.encode()
        record = _RECORD.pack(
            crc,
            self._order,
            node.depth,
            node.digest,
            node.root if node.parent is None else node.parent.digest,
            node.root,
            len(session_id),
            session_id,
        )
        token_ids = array("I", node.token_ids)
        record += struct.pack(f"<{self._page_size}I", *token_ids)
        self.clear(slot)
        _write(self._pages, as_bytes(image), slot * self._stride)
        _write(self._index, memoryview(_CRC.pack(crc32c_of(record)) + record), self._record_at(slot))

    def read(self, slot: int, image: Tensor) -> None:
        """Raises OSError, DataLoss (TRUNCATED)."""
        into, at = as_bytes(image), slot * self._stride
        while into:
            num_read = os.preadv(self._pages, [into], at)
            if num_read == 0:
                raise DataLoss(f"pages.dat ends before page {slot}", reason="TRUNCATED")
            into, at = into[num_read:], at + num_read

    def clear(self, slot: int) -> None:
        """The slot holds nothing. Raises OSError."""
        _write(self._index, memoryview(bytes(self._record_bytes)), self._record_at(slot))

    def erase(self, slot: int) -> None:
        """``clear``, and the image's bytes are given back to the file system. Raises OSError."""
        self.clear(slot)
        if slot * self._stride < os.fstat(self._pages).st_size:
            _punch_hole(self._pages, slot * self._stride, self._stride)

    def _records(self) -> Iterator[tuple[int, bytes]]:
        size, empty = self._record_bytes, bytes(self._record_bytes)
        for first in range(0, self.num_pages, _READ_RECORDS):
            block = os.pread(self._index, size * _READ_RECORDS, self._record_at(first))
            for place in range(len(block) // size):
                raw = block[place * size : (place + 1) * size]
                if raw != empty:
                    yield first + place, raw

    def _begin_anew(self) -> None:
        if os.fstat(self._index).st_size:
            _LOG.warning("disk_cache_unknown", extra={"folder": str(self.folder)})
        for descriptor in (self._index, self._pages):
            os.ftruncate(descriptor, 0)
        _write(self._index, memoryview(self._header), 0)

    def _parse(self, slot: int, raw: bytes) -> StoredPage | None:
        (checksum,) = _CRC.unpack_from(raw)
        if crc32c_of(raw[_CRC.size :]) != checksum:
            return None
        crc, order, depth, digest, parent, root, length, session = _RECORD.unpack_from(raw, _CRC.size)
        token_ids = struct.unpack_from(f"<{self._page_size}I", raw, _CRC.size + _RECORD.size)
        return StoredPage(
            slot=slot,
            crc=crc,
            digest=digest,
            parent=parent,
            root=root,
            depth=depth,
            token_ids=array("I", token_ids).tobytes(),
            session_id=session[:length].decode(),
            order=order,
        )

    def _record_at(self, slot: int) -> int:
        return _RECORDS_AT + slot * self._record_bytes


def identity_of(*, fingerprint: str, layout: str, num_layers: int, page_size: int) -> bytes:
    """32 bytes: equal exactly where pages mean the same."""
    parts = (fingerprint, layout, str(num_layers), str(page_size))
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _candidates(base: Path) -> Iterator[Path]:
    """Folders with pages, the fullest first, then those that are empty or do not exist yet."""
    folders = [base / str(number) for number in range(MAX_FOLDERS)]
    used = [(_num_blocks(folder / "pages.dat"), folder) for folder in folders if folder.is_dir()]
    full = [folder for blocks, folder in sorted(used, key=lambda one: -one[0]) if blocks]
    yield from full
    yield from (folder for folder in folders if folder not in full)


def _num_blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _punch_hole(descriptor: int, at: int, num_bytes: int) -> None:
    """Zeros, where the file system cannot make holes."""
    if _LIBC.fallocate(descriptor, _PUNCH_HOLE, ctypes.c_int64(at), ctypes.c_int64(num_bytes)) == 0:
        return
    error = ctypes.get_errno()
    if error != errno.EOPNOTSUPP:
        raise OSError(error, os.strerror(error))
    _write(descriptor, memoryview(bytes(num_bytes)), at)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        num_written = os.pwrite(descriptor, data, at)
        data, at = data[num_written:], at + num_written
