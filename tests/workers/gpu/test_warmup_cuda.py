"""After its warm-up a rank launches no kernel for the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.figures]
PROGRAM = Path(__file__).with_name("warm_rank.py")


def test_a_turn_needs_no_kernel_that_was_not_made_before(seed: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    made = sum(counts["warm"].values())
    late = [name for name, count in counts["after"].items() if count > counts["warm"].get(name, 0)]
    print(f"variants made by the warm-up: {made}; kernels with more later: {late}")
    assert counts["warm"]
    assert counts["after"].keys() == counts["warm"].keys()
