"""The warm-up launches every variant of a kernel that a step can need, at the sizes of the demo and of DeepSeek-V3.2.

Without a GPU, but with Triton: ``make test-interpreter`` has it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("launches.py")


@pytest.mark.parametrize(("sizes", "num_ranks"), [("demo", 2), ("full", 1), ("full", 2)])
def test_a_step_needs_no_variant_that_the_warm_up_left_out(sizes: str, num_ranks: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no launches to note")
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    path = os.pathsep.join([str(PROGRAM.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed), sizes, str(num_ranks)],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"{told['warm']} variants")
    assert told["warm"] > 40
    assert not told["late"]
