"""Pages of a CUDA device as images on the host, while the device computes."""

from __future__ import annotations

import random

import pytest
import torch

from seamount.kernels.layout import CacheLayout, CachePlanes
from seamount.workers.tiers.host import HostMemory
from seamount.workers.tiers.images import BATCH_PAGES, PageImages

pytestmark = pytest.mark.gpu
NUM_PAGES = 40


def random_planes(layout_name: str, device: str) -> CachePlanes:
    layout = CacheLayout.create(
        layout_name, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.float32
    )
    planes = layout.allocate(3, NUM_PAGES, device)
    for plane in (*planes.latent, *planes.index):
        plane.random_(256)
    return planes


def to_cpu(planes: CachePlanes) -> CachePlanes:
    return CachePlanes(latent=[one.cpu() for one in planes.latent], index=[one.cpu() for one in planes.index])


@pytest.mark.parametrize("layout", ["fp8", "bf16", "exact"])
@pytest.mark.parametrize("num_pages", [1, 5, BATCH_PAGES])
def test_pages_go_down_and_come_up_unchanged(seed: int, layout: str, num_pages: int) -> None:
    rng, planes = random.Random(seed), random_planes(layout, "cuda")
    before = to_cpu(planes)
    images, reference = PageImages(planes), PageImages(before)
    host = HostMemory(num_pages=num_pages, image_bytes=images.image_bytes, pinned=True)
    expected = HostMemory(num_pages=num_pages, image_bytes=images.image_bytes, pinned=False)
    slots = [host.image(slot) for slot in range(num_pages)]
    pages, others = rng.sample(range(NUM_PAGES), num_pages), rng.sample(range(NUM_PAGES), num_pages)
    images.save(pages, slots)
    reference.save(pages, [expected.image(slot) for slot in range(num_pages)])
    for slot in range(num_pages):
        torch.testing.assert_close(host.image(slot), expected.image(slot), rtol=0, atol=0)
    images.load(slots, others)
    reference.load(slots, others)
    for left, right in zip((*planes.latent, *planes.index), (*before.latent, *before.index), strict=True):
        torch.testing.assert_close(left.cpu(), right, rtol=0, atol=0)


def test_what_was_launched_before_is_read_complete_and_not_overwritten(seed: int) -> None:
    """A copy begins while the device still computes what it reads, and while a step still reads what it writes."""
    planes = random_planes("fp8", "cuda")
    images = PageImages(planes)
    host = HostMemory(num_pages=1, image_bytes=images.image_bytes, pinned=True)
    busy = torch.randn(6000, 6000, device="cuda")
    for _ in range(30):
        busy = busy @ busy / 6000
    for plane in (*planes.latent, *planes.index):
        plane[3] = 7
    images.save([3], [host.image(0)])
    assert (host.image(0) == 7).all()
    for _ in range(30):
        busy = busy @ busy / 6000
    seen = planes.latent[0][3].clone()
    images.load([torch.full((images.image_bytes,), 9, dtype=torch.uint8).pin_memory()], [3])
    assert (seen == 7).all()
    assert (planes.latent[0][3] == 9).all()
