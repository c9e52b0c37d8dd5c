"""The tiers that a rank was given."""

from __future__ import annotations

from seamount.kernels.layout import CachePlanes
from seamount.wire.hashes import PAGE_SIZE
from seamount.workers.spec import RankSpec
from seamount.workers.tiers.disk import DiskFile, identity_of
from seamount.workers.tiers.host import HostMemory
from seamount.workers.tiers.images import image_bytes


def open_tiers(
    spec: RankSpec, planes: CachePlanes, *, fingerprint: str, layout: str
) -> tuple[HostMemory | None, DiskFile | None]:
    """Host memory and disk, None for what is not there. Raises InvalidArgument (DISK_CACHE_UNUSABLE)."""
    page_bytes = image_bytes(planes)
    host, disk = None, None
    if spec.host_cache_bytes >= page_bytes:
        host = HostMemory(
            num_pages=spec.host_cache_bytes // page_bytes,
            image_bytes=page_bytes,
            pinned=planes.latent[0].device.type == "cuda",
        )
    if spec.disk_cache_dir is not None:
        identity = identity_of(
            fingerprint=fingerprint, layout=layout, num_layers=len(planes.latent), page_size=PAGE_SIZE
        )
        disk = DiskFile.open(
            spec.disk_cache_dir,
            identity=identity,
            image_bytes=page_bytes,
            page_size=PAGE_SIZE,
            num_bytes=spec.disk_cache_bytes,
        )
    return host, disk
