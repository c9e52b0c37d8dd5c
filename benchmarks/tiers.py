"""How fast pages come back from host memory and from disk, against computing them again.

A session of ``--tokens`` is left in the caches, copied down, evicted from the device and reserved again: the time from
Reserve until the last page is in place and verified, by the same threads that a rank uses. For the disk its files are
written out and dropped from the page cache before each restore. ``copy``: the way down.

    python -m benchmarks.tiers                    demo sizes, with the tokens/s that a rank of this machine prefills
    python -m benchmarks.tiers --sizes v3.2       61 layers of the fp8 layout: bytes a second alone
    python -m benchmarks.tiers --sizes v3.2 --device cuda
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks._report import Row, load_average, publish
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, CachePlanes
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Tier
from seamount.workers.engine import Engine
from seamount.workers.events import EngineEvent, Failed, Finished
from seamount.workers.gang import Gang
from seamount.workers.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from seamount.workers.model.weights import load_model
from seamount.workers.requests import EngineRequest
from seamount.workers.scheduler import EngineLimits
from seamount.workers.tiers.disk import DiskFile, identity_of
from seamount.workers.tiers.host import HostMemory
from seamount.workers.tiers.images import image_bytes
from seamount.workers.tiers.mover import Mover

VOCAB_SIZE = 512
WAIT_S = 600.0
POLL_S = 0.0005
V32_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
V32_LAYERS = 61


@dataclass(slots=True, kw_only=True)
class Caches:
    """A rank's caches with one tier below, and no engine."""

    tier: Tier
    planes: CachePlanes
    reservations: Reservations
    mover: Mover
    folder: Path
    num_turns: int = 0

    @staticmethod
    def make(tier: Tier, planes: CachePlanes, folder: Path) -> Caches:
        num_pages, size = planes.latent[0].shape[0], image_bytes(planes)
        host = disk = None
        if tier is Tier.HOST:
            host = HostMemory(num_pages=num_pages, image_bytes=size, pinned=planes.latent[0].is_cuda)
        else:
            identity = identity_of(fingerprint="f", layout="l", num_layers=len(planes.latent), page_size=PAGE_SIZE)
            disk = DiskFile.open(
                folder, identity=identity, image_bytes=size, page_size=PAGE_SIZE, num_bytes=2 * num_pages * size
            )
        num_below = {tier: num_pages}
        reservations = Reservations(num_pages=num_pages, fingerprint="f", layout="l", num_below=num_below)
        mover = Mover(reservations.tiers, planes, host=host, disk=disk)
        mover.start()
        return Caches(tier=tier, planes=planes, reservations=reservations, mover=mover, folder=folder)

    def reserve(self, token_ids: list[int]) -> Reservation:
        self.num_turns += 1
        return self.reservations.reserve(
            session_id="",
            turn_id=str(self.num_turns),
            epoch=1,
            attempt=1,
            salt=bytes(32),
            token_ids=token_ids,
            time_to_live_s=60.0,
        )

    def leave(self, num_tokens: int) -> float:
        """Entries of a session appear at once; seconds until all have a copy."""
        reservation = self.reserve(list(range(num_tokens + 1)))
        self.reservations.advance(reservation.id, num_tokens)
        self.reservations.release(reservation.id)
        began = time.perf_counter()
        while self.reservations.tiers.is_busy:
            time.sleep(POLL_S)
        return time.perf_counter() - began

    def restore(self, num_tokens: int) -> float:
        """Seconds until a session that has left the device is back."""
        others = [1 << 20] * (self.reservations.num_pages * PAGE_SIZE - 1)
        self.reservations.release(self.reserve(others).id, 0)
        if self.tier is Tier.DISK:
            self._drop_page_cache()
        began = time.perf_counter()
        reservation = self.reserve(list(range(num_tokens + 1)))
        assert reservation.num_tokens_from(self.tier) == num_tokens, "the session is not where it should be"
        assert reservation.restored is not None
        reservation.restored.result(WAIT_S)
        took_s = time.perf_counter() - began
        assert reservation.computed_len == num_tokens
        self.reservations.release(reservation.id)
        return took_s

    def _drop_page_cache(self) -> None:
        for path in self.folder.rglob("pages.dat"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def planes_of(sizes: str, num_pages: int, device: str) -> CachePlanes:
    """Random bytes: as v3.2's fp8 layout, or as the demo model's bf16 one."""
    geometry = V32_SIZES if sizes == "v3.2" else {name: GEOMETRIES["demo"][name] for name in V32_SIZES}
    layout = CacheLayout.create("fp8" if sizes == "v3.2" else "bf16", dtype=torch.bfloat16, **geometry)
    num_layers = V32_LAYERS if sizes == "v3.2" else GEOMETRIES["demo"]["num_hidden_layers"]
    planes = layout.allocate(num_layers, num_pages, device)
    for plane in (*planes.latent, *planes.index):
        plane.random_(256)
    return planes


def prefill_tokens_per_s(num_tokens: int) -> float:
    """Of the demo model on one thread, the whole prompt in chunks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        write_random_checkpoint(path, seed=1, geometry="demo", vocab_size=VOCAB_SIZE)
        model = load_model(path, dtype=torch.float32, layout_name="bf16")
    num_pages = num_tokens // PAGE_SIZE + 2
    planes = model.layout.allocate(model.config.num_hidden_layers, num_pages)
    reservations = Reservations(num_pages=num_pages, fingerprint="f", layout="l")
    engine = Engine(
        model=model,
        planes=planes,
        reservations=reservations,
        gang=Gang.alone(),
        eos_token_id=1,
        vocab_limit=VOCAB_SIZE,
        limits=EngineLimits(max_batch_tokens=512, max_running=1, prefill_chunk_tokens=256),
    )
    engine.start()
    reservation = reservations.reserve(
        session_id="",
        turn_id="t",
        epoch=1,
        attempt=1,
        salt=bytes(32),
        token_ids=[2 + position % (VOCAB_SIZE - 2) for position in range(num_tokens)],
        time_to_live_s=60.0,
    )
    ended, events = threading.Event(), list[EngineEvent]()

    def sink(event: EngineEvent) -> None:
        events.append(event)
        if isinstance(event, Finished | Failed):
            ended.set()

    began = time.perf_counter()
    engine.submit(EngineRequest(id=reservation.id, reservation=reservation, sampling=None, sink=sink))
    assert ended.wait(WAIT_S), "the prompt is not computed"
    took_s = time.perf_counter() - began
    assert isinstance(events[-1], Finished)
    engine.stop()
    return num_tokens / took_s


def measured(tier: Tier, sizes: str, num_tokens: int, device: str, repeats: int, computed_per_s: float) -> Row:
    planes = planes_of(sizes, num_tokens // PAGE_SIZE + 2, device)
    num_bytes = num_tokens // PAGE_SIZE * image_bytes(planes)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        caches = Caches.make(tier, planes, Path(folder))
        try:
            copy_s = caches.leave(num_tokens)
            restore_s = median(caches.restore(num_tokens) for _ in range(repeats))
        finally:
            caches.mover.stop()
    row: Row = {
        "sizes": sizes,
        "device": device,
        "tier": tier.value,
        "tokens": num_tokens,
        "MB": num_bytes / 1e6,
        "copy MB/s": num_bytes / 1e6 / copy_s,
        "restore ms": restore_s * 1e3,
        "restore MB/s": num_bytes / 1e6 / restore_s,
        "restore tokens/s": num_tokens / restore_s,
    }
    if computed_per_s:
        row |= {"compute tokens/s": computed_per_s, "ratio": num_tokens / restore_s / computed_per_s}
    return row


def main(
    sizes: Annotated[str, typer.Option(help="demo, or v3.2")] = "demo",
    tokens: Annotated[int, typer.Option(help="of the session; a multiple of 64")] = 4096,
    repeats: Annotated[int, typer.Option(help="restores of which the median counts")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="print JSON Lines")] = False,
) -> None:
    """Restore rates of host memory and disk."""
    load = load_average()
    computed_per_s = prefill_tokens_per_s(tokens) if sizes == "demo" else 0.0
    tiers = (Tier.HOST, Tier.DISK)
    rows = [measured(tier, sizes, tokens, device, repeats, computed_per_s) for tier in tiers]
    name = "tiers" if sizes == "demo" else "tiers_v32" + ("_cuda" if device == "cuda" else "")
    publish(name, rows, as_json=json, load=load)


if __name__ == "__main__":
    typer.run(main)
