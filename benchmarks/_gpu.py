"""What the GPU benchmarks share: times of captured launches over rotating inputs, and rows in a JSON Lines file.

Imports torch alone: GPU machines need no other package of this project.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
L2_BYTES = 50e6
Row = dict[str, str | int | float | None]


def copies(input_bytes: float) -> int:
    """How many sets of inputs exceed the L2 more than twice, within reason for small ones."""
    return max(2, min(48, int(2.2 * L2_BYTES / max(input_bytes, 1)) + 1))


def time_us(launches: Sequence[Callable[[], object]], *, repeats: int = 7, min_launches: int = 24) -> float:
    """Median time of one launch in microseconds, from replays of a graph that walks through all of ``launches``.

    launches: the same operation on different inputs; together they should exceed the L2 twice.
    """
    rounds = -(-min_launches // len(launches))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(launches)))
    return statistics.median(times)


def compared(
    kernel: str, shape: str, ours: float, peer: float | None, bound: float | None, *, num_bytes: float, flop: float = 0
) -> Row:
    """One row: both times in microseconds, their ratio and what it should be at most, and the rates of ours."""
    return {
        "kernel": kernel,
        "shape": shape,
        "ours_us": round(ours, 2),
        "peer_us": None if peer is None else round(peer, 2),
        "ratio": None if peer is None else round(ours / peer, 3),
        "bound": bound,
        "gb_per_s": round(num_bytes / ours / 1e3, 1),
        "tflop_per_s": round(flop / ours / 1e6, 1) if flop else None,
    }


def deep_gemm_module() -> Any:
    """DeepGEMM (sgl-deep-gemm with apache-tvm-ffi), or None where it is not installed. It compiles at first use."""
    os.environ.setdefault("DG_JIT_CACHE_DIR", "/tmp/deep_gemm_cache")
    os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    try:
        return importlib.import_module("deep_gemm")
    except ImportError:
        return None


def random_fp8(*shape: int) -> torch.Tensor:
    """Random normal float8_e4m3fn on the GPU, made in parts: no second copy in a wider type."""
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    rows = out.view(-1, shape[-1])
    step = max(1, (1 << 26) // shape[-1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    return out


def publish_gpu(name: str, rows: Iterable[Row]) -> None:
    """Print rows as they come and write each, with date and device, to ``results/<name>.jsonl``."""
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    stamp: Row = {"benchmark": name, "date": datetime.now(UTC).date().isoformat(), "machine": device}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("w", encoding="utf-8") as results:
        for row in rows:
            results.write(json.dumps(stamp | row) + "\n")
            results.flush()
            shown = (f"{key} {value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items())
            print("  ".join(shown), flush=True)
