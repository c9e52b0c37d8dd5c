"""After its warm-up a rank launches no kernel for the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.figures]
PROGRAM = Path(__file__).with_name("warm_rank.py")
TIMEOUT_S = 280


@pytest.mark.parametrize("size", [1, 2])
def test_a_turn_needs_no_kernel_that_was_not_made_before(size: int, seed: int, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(started(tmp_path, seed, 0, size, 0))
        assert first.stdout is not None
        port = int(first.stdout.readline()) if size > 1 else 0
        ranks = [first, *(stack.enter_context(started(tmp_path, seed, rank, size, port)) for rank in range(1, size))]
        for rank in ranks:
            told, errors = rank.communicate(timeout=TIMEOUT_S)
            assert rank.returncode == 0, errors[-3000:]
            counts = json.loads(told.splitlines()[-1])
            print(f"variants made by the warm-up: {counts['warm']}; later: {counts['late']}")
            assert counts["warm"]
            assert counts["late"] == 0, errors


@contextmanager
def started(cache: Path, seed: int, rank: int, size: int, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(PROGRAM), *map(str, (seed, rank, size, port))]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()
