"""What the GPU benchmarks share: times of captured launches over rotating inputs, and rows in a JSON Lines file.

Compiling can go ahead of timing, in many processes at once (``compile_ahead``): DeepGEMM takes seconds for a shape.
Imports torch alone: GPU machines need no other package of this project.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | int | float | None]
_timing = True


def copies(input_bytes: float) -> int:
    """How many sets of inputs exceed this GPU's L2 more than twice, within reason for small ones."""
    if not _timing:
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(2, min(64, int(2.2 * cache / max(input_bytes, 1)) + 1))


def compile_ahead(tasks: Sequence[Callable[[], object]], processes: int) -> None:
    """Run picklable tasks in processes that time nothing: what their launches compile stays on disk for this one."""
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_stop_timing)
    with pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def _stop_timing() -> None:
    global _timing
    _timing = False


def time_us(launches: Sequence[Callable[[], object]], *, repeats: int = 7, min_launches: int = 24) -> float:
    """Median time of one launch in microseconds, from replays of a graph that walks through all of ``launches``.

    launches: the same operation on different inputs; together they should exceed the L2 twice. In a process of
    ``compile_ahead`` the first is launched once and the result is NaN.
    """
    if not _timing:
        launches[0]()
        torch.cuda.synchronize()
        return math.nan
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


def times_in_turn(
    ways: Sequence[Sequence[Callable[[], object]]], *, repeats: int = 5, min_launches: int = 24
) -> list[float]:
    """``time_us`` of each way, the median of three turns: at its power limit the chip slows as it warms."""
    turns = [[time_us(way, repeats=repeats, min_launches=min_launches) for way in ways] for _ in range(3)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


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
    """Print rows as they come and write each, with date and device, to ``results/<name>_<h100, h200, ..>.jsonl``.

    A row takes the place of the one that stands there for the same kernel and shape, or part and position.
    """
    device = torch.cuda.get_device_name()
    stamp: Row = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{device}, torch {torch.__version__}",
    }
    path = RESULTS / f"{name}_{short_name(device)}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = {_identity(row): row for row in map(json.loads, lines)}
    for row in rows:
        kept[_identity(row)] = stamp | row
        path.write_text("".join(json.dumps(line) + "\n" for line in kept.values()), encoding="utf-8")
        shown = (f"{key} {value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print("  ".join(shown), flush=True)


def short_name(device: str) -> str:
    """``h200`` for "NVIDIA H200", ``h100`` for "NVIDIA H100 80GB HBM3"."""
    return device.removeprefix("NVIDIA ").split()[0].lower()


def _identity(row: Row) -> tuple[object, ...]:
    """What tells a row from the others of its file; the rest is what was measured."""
    return tuple(row.get(key) for key in ("kernel", "shape", "phase", "tokens", "part", "position"))
