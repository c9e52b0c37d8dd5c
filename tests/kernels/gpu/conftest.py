from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def formulas() -> ModuleType:
    """The references of ``formulas.py`` beside this file."""
    spec = importlib.util.spec_from_file_location("kernel_formulas", Path(__file__).with_name("formulas.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def device() -> torch.device:
    """A CUDA device, its generator freshly seeded; the seed is printed when a test fails."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return torch.device("cuda")


@pytest.fixture(scope="session")
def target() -> torch.device:
    """The GPU, or the CPU under Triton's interpreter, which tests indexing but rounds fp8 and bf16 wrongly."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("no CUDA device here, and TRITON_INTERPRET is not 1")


@contextmanager
def _poison() -> Iterator[None]:
    # Of what this switches on, the tests want that torch.empty fills what it returns.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def poison() -> Callable[[], AbstractContextManager[None]]:
    """Within it new memory is NaN, or the largest integer: an output that nobody writes cannot pass for a result."""
    return _poison


@pytest.fixture
def poisoned(target: torch.device) -> Iterator[torch.device]:
    """``target``, with ``poison`` for the whole test."""
    with _poison():
        yield target
