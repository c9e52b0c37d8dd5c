from __future__ import annotations

import pytest
import torch

from seamount.kernels.arguments import check_current, check_plane
from seamount.kernels.layout import CacheLayout


def test_only_the_current_device_is_launched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    check_current(torch.device("cpu"))
    check_current(torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"on cuda:0; the current device is cuda:1: .*torch\.cuda\.device\(0\)"):
        check_current(torch.device("cuda", 0))


def test_planes_are_whole_pages_in_a_row() -> None:
    layout = CacheLayout.create("fp8", kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=torch.float32)
    plane, cpu = layout.allocate(1, 3).latent[0], torch.device("cpu")
    check_plane(plane, layout, "latent", cpu)
    shifted = torch.zeros(plane.numel() + 8, dtype=torch.uint8)[8:].view(plane.shape)
    for bad, which, device, message in (
        (plane, "index", cpu, "plane has shape"),
        (plane[:, :-64], "latent", cpu, "plane has shape"),
        (plane.float(), "latent", cpu, "plane is torch.float32"),
        (plane, "latent", torch.device("meta"), "plane is on cpu"),
        (plane.T.contiguous().T, "latent", cpu, "not contiguous"),
        (shifted, "latent", cpu, "multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            check_plane(bad, layout, which, device)  # type: ignore[arg-type]
