"""Moves pages between the device, host memory and disk, on threads of its own.

Three of them, so that none waits for another: restores, copies to the host, copies to disk. A few more read and verify
the pages of a restore. What is to be done, and what counts of it, is decided behind ``TierDoor``. A page that does not
match its checksum is reported and not used.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.kernels.layout import CachePlanes
from seamount.wire.errors import DataLoss
from seamount.workers.cache.copies import Copy
from seamount.workers.cache.restores import Fetch
from seamount.workers.cache.retention import Tier
from seamount.workers.cache.tier_door import TierDoor
from seamount.workers.tiers.checksum import crc32c
from seamount.workers.tiers.disk import DiskFile
from seamount.workers.tiers.host import HostMemory
from seamount.workers.tiers.images import BATCH_PAGES, PageImages

_LOG = logging.getLogger("seamount.tiers")
_IDLE_S = 1.0
_DRAIN_POLL_S = 0.01
_MAX_READERS = 8
_RATE_WEIGHT = 0.2
"""Of the last batch, in a smoothed rate."""


@dataclass(slots=True, kw_only=True)
class RestoreRates:
    """Bytes per second from each tier to the device, checksums included; smoothed, 0 = not measured yet."""

    host: float = 0.0
    disk: float = 0.0

    def note(self, tier: Tier, num_bytes: int, seconds: float) -> None:
        rate, name = num_bytes / max(seconds, 1e-9), tier.value
        before = getattr(self, name)
        setattr(self, name, rate if before == 0 else (1 - _RATE_WEIGHT) * before + _RATE_WEIGHT * rate)


class Mover:
    """Of one rank. host, disk: None where that tier is not there. ``start`` once, ``stop`` in the end."""

    def __init__(self, door: TierDoor, planes: CachePlanes, *, host: HostMemory | None, disk: DiskFile | None) -> None:
        self.rates = RestoreRates()
        self._door, self._host, self._disk = door, host, disk
        self._device = planes.latent[0].device
        pinned = self._device.type == "cuda"
        work: dict[str, Callable[[PageImages, Sequence[Tensor]], bool]] = {"tiers-restore": self._restore}
        if host is not None:
            work["tiers-host"] = self._copy_to_host
        if disk is not None:
            work["tiers-disk"] = self._copy_to_disk
        self._readers = ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1), thread_name_prefix="tiers-read")
        self._is_stopping = False
        self._wakes = [threading.Event() for _ in work]
        self._threads: list[threading.Thread] = []
        for (name, do), wake in zip(work.items(), self._wakes, strict=True):
            images = PageImages(planes)
            num_buffers = 0 if disk is None or name == "tiers-host" else BATCH_PAGES  # between disk and device
            memory = HostMemory(num_pages=num_buffers, image_bytes=images.image_bytes, pinned=pinned)
            arguments = (do, images, [memory.image(place) for place in range(num_buffers)], wake)
            self._threads.append(threading.Thread(target=self._loop, args=arguments, name=name, daemon=True))

    def start(self, deleted: Iterable[str] = ()) -> None:
        """Take over what the disk holds from an earlier process, then move pages. deleted: sessions that are no
        more."""
        if self._disk is not None:
            for slot in self._door.adopt(Tier.DISK, self._disk.stored(), deleted=deleted):
                self._disk.erase(slot)
        self._door.on_work = self._wake
        for thread in self._threads:
            thread.start()
        self._wake()

    def stop(self, grace_s: float = 0.0) -> None:
        """Finish what is under way, and what waits for at most ``grace_s``. Idempotent."""
        until = time.monotonic() + grace_s
        while self._door.is_busy and time.monotonic() < until:
            time.sleep(_DRAIN_POLL_S)
        self._is_stopping = True
        self._wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._readers.shutdown()
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    def _loop(
        self,
        do: Callable[[PageImages, Sequence[Tensor]], bool],
        images: PageImages,
        buffers: Sequence[Tensor],
        wake: threading.Event,
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while not self._is_stopping:
            wake.clear()
            try:
                is_done = do(images, buffers)
            except Exception:
                _LOG.exception("tiers_failed")  # a defect: pages that were on their way stay where they were
                is_done = False
            if not is_done:
                wake.wait(_IDLE_S)

    # ---- one batch of each; False: there was nothing to do

    def _restore(self, images: PageImages, buffers: Sequence[Tensor]) -> bool:
        restore = self._door.next_restore(BATCH_PAGES)
        if restore is None:
            return False
        began = time.monotonic()
        good: list[Tensor] = []
        damaged: Fetch | None = None
        try:
            places = [buffers[place] if buffers else None for place in range(len(restore.fetches))]
            fetched = self._readers.map(self._fetch, restore.fetches, places)
            for fetch, image in zip(restore.fetches, fetched, strict=True):
                if image is None:
                    damaged = fetch
                    break
                good.append(image)
            images.load(good, [fetch.page for fetch in restore.fetches[: len(good)]])
        except Exception:  # of the device: what lacks is computed, if that still works
            _LOG.exception("restore_failed")
            self._door.restored(restore, 0)
            return True
        self._door.restored(restore, len(good), damaged)
        tiers = {fetch.tier for fetch in restore.fetches}
        if good and len(tiers) == 1:
            self.rates.note(tiers.pop(), len(good) * images.image_bytes, time.monotonic() - began)
        return True

    def _fetch(self, fetch: Fetch, buffer: Tensor | None) -> Tensor | None:
        """The page's image, verified; None where it is damaged or cannot be read. buffer: for one from disk."""
        try:
            if fetch.tier is Tier.HOST:
                assert self._host is not None
                image = self._host.image(fetch.copy.slot)
            else:
                assert self._disk is not None
                assert buffer is not None
                image = buffer
                self._disk.read(fetch.copy.slot, image)
            if crc32c(image) == fetch.copy.crc:
                return image
            _LOG.warning("page_damaged", extra={"tier": fetch.tier.value, "slot": fetch.copy.slot})
        except (OSError, DataLoss) as error:
            extra = {"tier": fetch.tier.value, "slot": fetch.copy.slot, "error": str(error)}
            _LOG.warning("page_unreadable", extra=extra)
        return None

    def _copy_to_host(self, images: PageImages, buffers: Sequence[Tensor]) -> bool:
        assert self._host is not None
        copies = self._door.next_copies(Tier.HOST, BATCH_PAGES)
        targets = [self._host.image(copy.slot) for copy in copies]
        self._save(images, copies, targets)
        for copy, target in zip(copies, targets, strict=True):
            self._door.copied(copy, crc32c(target))
        return bool(copies)

    def _copy_to_disk(self, images: PageImages, buffers: Sequence[Tensor]) -> bool:
        assert self._disk is not None
        has_erased = self._erase_from_disk(self._disk)
        copies = self._door.next_copies(Tier.DISK, BATCH_PAGES)
        from_device = [copy for copy in copies if copy.source is None]
        direct = dict(zip(from_device, buffers, strict=False))
        self._save(images, from_device, list(direct.values()))
        for copy in copies:
            if copy.source is None:
                image = direct[copy]
                crc = crc32c(image)
            else:
                assert self._host is not None
                image, crc = self._host.image(copy.source.slot), copy.source.crc
            try:
                self._disk.write(copy.slot, copy.node, image, crc)
            except OSError as error:
                _LOG.warning("disk_write_failed", extra={"slot": copy.slot, "error": str(error)})
                self._door.copied(copy, None)
            else:
                self._door.copied(copy, crc)
        return has_erased or bool(copies)

    def _erase_from_disk(self, disk: DiskFile) -> bool:
        slots = self._door.next_erasures(Tier.DISK, BATCH_PAGES)
        for slot in slots:
            try:
                disk.erase(slot)
            except OSError as error:
                _LOG.warning("disk_erase_failed", extra={"slot": slot, "error": str(error)})
                self._door.erased(Tier.DISK, slot, is_done=False)
            else:
                self._door.erased(Tier.DISK, slot, is_done=True)
        return bool(slots)

    def _save(self, images: PageImages, copies: list[Copy], targets: list[Tensor]) -> None:
        pages = [copy.page for copy in copies if copy.page is not None]
        if pages:
            images.save(pages, targets)
