"""The arithmetic of docs/deploy.md and of the profiles, once more from the shapes of the real model."""

from __future__ import annotations

import math
import re

import pytest
import torch
import yaml

from rendered_chart import CHART, ROOT
from seamount.kernels.layout import CacheLayout

DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
GB = 1e9
LAYERS, DENSE_LAYERS, EXPERTS, TOP_K = 61, 3, 256, 2048
HIDDEN, VOCABULARY = 7168, 129_280
WORK_SPACE_GB = {85.5: 8, 150.7: 10}
DEVICES = {"h200x8": 150.7, "h100-2x8": 85.5}


def fp8(*shapes: tuple[int, int]) -> int:
    """Bytes of e4m3 matrices with a float32 scale for each block of 128 x 128."""
    return sum(rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in shapes)


EXPERT = fp8((2048, HIDDEN), (2048, HIDDEN), (HIDDEN, 2048))
ATTENTION = fp8((1536, HIDDEN), (24_576, 1536), (576, HIDDEN), (32_768, 512), (HIDDEN, 16_384))
INDEXER = fp8((8192, 1536), (128, HIDDEN)) + 2 * 64 * HIDDEN
GATE = 2 * EXPERTS * HIDDEN
MOE_REST = ATTENTION + INDEXER + EXPERT + GATE
DENSE = fp8((18_432, HIDDEN), (18_432, HIDDEN), (HIDDEN, 18_432)) + ATTENTION + INDEXER
EMBEDDING = 2 * VOCABULARY * HIDDEN
KV_B_IN_BFLOAT16 = LAYERS * 32_768 * 512  # a byte more for each element
ROUTED = (LAYERS - DENSE_LAYERS) * EXPERTS * EXPERT
SHARED = (LAYERS - DENSE_LAYERS) * MOE_REST + DENSE_LAYERS * DENSE + 2 * EMBEDDING


def rank_gb(expert_parallel: int) -> float:
    return (ROUTED / expert_parallel + SHARED + KV_B_IN_BFLOAT16) / GB


def token_bytes() -> int:
    layout = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
    return LAYERS * layout.bytes_per_token


def left_gb(device_gb: float, expert_parallel: int) -> float:
    return device_gb - rank_gb(expert_parallel) - WORK_SPACE_GB[device_gb]


def gib(quantity: str) -> int:
    """Bytes of a quantity such as 8Gi."""
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) << 30


def table(header: str) -> list[list[str]]:
    """The cells of the one table of docs/deploy.md that begins so."""
    (_, after) = DEPLOY.split(header)
    rows = after.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace(",", "") for cell in row.strip("|").split("|")] for row in rows]


def test_the_parts_add_up() -> None:
    assert token_bytes() == 48_068
    assert f"{EXPERT / 1e6:.2f} MB | {ROUTED / GB:.1f} GB" in DEPLOY
    assert f"× {MOE_REST / 1e6:.1f} MB" in DEPLOY
    assert f"× {DENSE / 1e6:.1f} MB" in DEPLOY
    assert f"2 × {EMBEDDING / GB:.3f} GB" in DEPLOY
    assert f"| all weights | {(ROUTED + SHARED) / GB:.1f} GB" in DEPLOY
    assert f"{131_072 * token_bytes() / GB:.2f} GB" in DEPLOY


def test_the_table_of_devices() -> None:
    rows = table("| device | EP |")
    assert len(rows) == 5
    for device, ranks, weights, left, tokens, long, short in rows:
        device_gb, expert_parallel = float(device.split()[-2]), int(ranks)
        assert float(weights) == round(rank_gb(expert_parallel), 1)
        room = left_gb(device_gb, expert_parallel)
        if room < 0:
            assert left == "does not fit"
            continue
        num_tokens = int(room * GB / (64 * token_bytes())) // 100 * 100 * 64
        assert float(left) == round(room, 1)
        assert int(tokens) == num_tokens
        assert [int(long), int(short)] == [num_tokens // length * expert_parallel for length in (131_072, 32_768)]


def test_the_table_of_contexts() -> None:
    rows = table("| context |")
    assert len(rows) == 3
    for context, keys, latents, gflop, h200, h100 in rows:
        length = int(context)
        selected = min(length, TOP_K)
        key_bytes, latent_bytes = 132 * length * LAYERS, 656 * selected * LAYERS
        assert [int(keys), int(latents)] == [round(key_bytes / 1e6), round(latent_bytes / 1e6)]
        flop = LAYERS * (2 * 64 * 128 * length + 2 * 128 * (576 + 512) * selected)
        assert float(gflop) == round(flop / 1e9, 1)
        assert int(h200) == round((key_bytes + latent_bytes) / 4.8e12 * 1e6)
        assert int(h100) == round((key_bytes + latent_bytes) / 3.35e12 * 1e6)


@pytest.mark.parametrize("name", DEVICES)
def test_the_profile_fits_its_devices_and_its_pods(name: str) -> None:
    text = (CHART / "profiles" / f"{name}.yaml").read_text()
    profile = yaml.safe_load(text)
    decode, cache = profile["pools"]["decode"], profile["serving"]["cache"]
    room = left_gb(DEVICES[name], decode["expertParallel"])
    pages_gb = cache["num_pages"] * 64 * token_bytes() / GB
    assert 0.9 * room < pages_gb < room
    assert cache["num_pages"] * 64 >= 2 * profile["serving"]["engine"]["max_context_tokens"]
    assert float(re.search(r"left for pages +([\d.]+)", text)[1]) == round(room, 1)
    assert float(re.search(r"# +weights.* ([\d.]+)\n", text)[1]) == round(rank_gb(decode["expertParallel"]), 1)

    memory = gib(decode["resources"]["limits"]["memory"])
    assert decode["ranksPerPod"] * cache["host_cache_bytes"] + gib(decode["sharedMemory"]) < 0.85 * memory
    if profile.get("diskCache", {}).get("enabled"):
        disk = gib(profile["diskCache"]["sizeLimit"])
        assert decode["ranksPerPod"] * cache["disk_cache_bytes"] < disk
        assert disk + gib(decode["scratch"]) < gib(decode["resources"]["limits"]["ephemeral-storage"])
