from __future__ import annotations

import random

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh randomness in every run; the seed is printed when a test fails."""
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
