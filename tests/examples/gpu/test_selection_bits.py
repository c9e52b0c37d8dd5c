"""Lists of selected tokens as the bits and blocks that attention reads; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os
import random

import pytest
import torch

from examples.tiny_agent.indexing import selected_bits, selected_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="no CUDA device, no interpreter"),
]


@pytest.mark.parametrize("count", [24, 64])
def test_bits_and_blocks_of_the_plain_pairs(count: int) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    length = 384
    picked = torch.full((2, length, count), -1)
    for b in range(2):
        for row in range(length):
            # Up to ``count`` of what a row sees; some rows have none, as in padding.
            some = torch.randperm(row + 1)[: int(torch.randint(count + 1, ()))].sort().values
            picked[b, row, : some.numel()] = some
    picked[:, 128:256][picked[:, 128:256] < 128] = -1  # a block below the diagonal without a pair
    device = torch.device("cpu" if INTERPRETED else "cuda")
    words, blocks = (tensor.cpu() for tensor in selected_bits(picked.to(device)))
    pairs = selected_pairs(picked, length)
    key = torch.arange(length)
    bits = (words[:, key // 32] >> (key % 32).unsqueeze(1)) & 1  # [B, keys, rows]
    assert torch.equal(bits.mT == 1, pairs)
    assert torch.equal(blocks, pairs.view(2, 3, 128, 3, 128).any(4).any(2))
    assert not blocks[:, 1, 0].any()
