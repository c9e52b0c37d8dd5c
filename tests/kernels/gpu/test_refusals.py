"""Wrong shapes, dtypes, strides and devices, of every operation whose own file does not try them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: no GPU kernels here")

from seamount.kernels.layout import CacheLayout
from seamount.kernels.triton import cache_write, elementwise, moe

pytestmark = pytest.mark.gpu

LAYOUT = CacheLayout.create("fp8", kv_lora_rank=128, qk_rope_head_dim=8, index_head_dim=32, dtype=torch.float32)


def operations(on: torch.device) -> dict[str, tuple[Callable[..., Any], dict[str, Tensor]]]:
    """Each with good tensors by name; the other arguments are bound."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=on)

    planes, slots = LAYOUT.allocate(1, 1, on), torch.arange(2, device=on)
    angles = {"cos": ones(2, 4), "sin": ones(2, 4)}
    routed = {"rows": torch.zeros((2, 2), dtype=torch.int32, device=on), "weights": ones(2, 2)}
    tokens = torch.zeros(4, dtype=torch.int32, device=on)
    return {
        "write_latent": (
            lambda plane, slots, latent, rope_key, norm_weight, cos, sin: cache_write.write_latent(
                plane, slots, latent, rope_key, norm_weight, 1e-6, cos, sin, LAYOUT
            ),
            {
                "plane": planes.latent[0], "slots": slots, "latent": ones(2, 128), "rope_key": ones(2, 8),
                "norm_weight": ones(128), **angles,
            },
        ),
        "write_index_key": (
            lambda plane, slots, key, norm_weight, norm_bias, cos, sin: cache_write.write_index_key(
                plane, slots, key, norm_weight, norm_bias, 1e-6, cos, sin, LAYOUT
            ),
            {
                "plane": planes.index[0], "slots": slots, "key": ones(2, 32), "norm_weight": ones(32),
                "norm_bias": ones(32), **angles,
            },
        ),
        "rotate": (cache_write.rotate_index_vectors, {"x": ones(2, 3, 32), **angles}),
        "rotate and quantize": (cache_write.rotate_quantize_index_vectors, {"x": ones(2, 3, 32), **angles}),
        "rope": (
            lambda x, cos, sin: elementwise.apply_rope(x, cos, sin, interleaved=True),
            {"x": ones(2, 3, 8), **angles},
        ),
        "rms_norm": (lambda x, weight: elementwise.rms_norm(x, weight, 1e-6), {"x": ones(2, 40), "weight": ones(40)}),
        "layer_norm": (
            lambda x, weight, bias: elementwise.layer_norm(x, weight, bias, 1e-6),
            {"x": ones(2, 40), "weight": ones(40), "bias": ones(40)},
        ),
        "permute": (moe.permute, {"x": ones(2, 128), "tokens": tokens}),
        "permute_quantize": (moe.permute_quantize, {"x": ones(2, 128), "tokens": tokens}),
        "combine": (moe.combine, {"y": ones(4, 128), **routed, "shared": ones(2, 128)}),
    }  # fmt: skip


def spoiled(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x with one more dimension, of another dtype, with strided rows, on another device."""
    yield "shape", x[None]
    yield "dtype", x.to(torch.float64)
    if x.shape[-1] > 1:
        yield "stride", torch.stack((x, x), dim=-1)[..., 0]
    yield "device", x.to("meta")


OPERATIONS = tuple(operations(torch.device("cpu")))
# What these take and others do not.
TAKEN = {("rms_norm", "x", "shape"), ("layer_norm", "x", "shape"), ("permute", "x", "dtype")}


@pytest.mark.parametrize("name", OPERATIONS)
def test_wrong_tensors_are_refused_before_the_launch(name: str, target: torch.device) -> None:
    call, good = operations(target)[name]
    call(**good)
    tried = 0
    for argument, tensor in good.items():
        for what, bad in spoiled(tensor):
            if (name, argument, what) in TAKEN:
                continue
            with pytest.raises(ValueError, match=r"has|is|must"):
                call(**good | {argument: bad})
            tried += 1
    assert tried >= 3 * len(good)


def test_planes_and_pages_start_where_words_do(target: torch.device) -> None:
    call, good = operations(target)["write_latent"]
    plane = good["plane"]
    shifted = torch.zeros(plane.numel() + 16, dtype=torch.uint8, device=target)[4:][: plane.numel()].view(plane.shape)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        call(**good | {"plane": shifted})
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        cache_write.page_checksum(torch.zeros(17, dtype=torch.uint8, device=target)[1:].view(2, 8))


def test_sizes_beyond_a_kernels_are_refused(target: torch.device) -> None:
    x, weight, bias = (torch.zeros(shape, device=target) for shape in (((1 << 20) + 1, 16), (16, 16), (16,)))
    options = {"num_groups": 4, "num_chosen_groups": 2, "num_chosen": 4, "normalize": True, "scale": 1.0}
    with pytest.raises(ValueError, match="counters for 1048576"):
        moe.gate(x, weight, bias, **options)
    with pytest.raises(ValueError, match="32768"):
        elementwise.rms_norm(torch.zeros((1, 40_000), device=target), torch.zeros(40_000, device=target), 1e-6)
