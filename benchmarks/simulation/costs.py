"""How long a step takes and a page travels, from measurements. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._report import RESULTS
from benchmarks.cost_curve import DENSE_LAYERS, LAYERS, at

Points = tuple[tuple[float, float], ...]
"""(position in tokens, seconds), ascending; linear between, constant outside."""
V32_KV_BYTES_PER_TOKEN = 61 * (656 + 132)
"""Latent and index key of every layer in the fp8 layout."""
HOST_BYTES_PER_S, DISK_BYTES_PER_S = 50e9, 5e9
"""Pinned memory over PCIe 5 x16, one NVMe disk: taken from data sheets, not measured here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """A step's seconds are sums:

        step = base + [decode_base, if any sequence decodes] + sum over these of decode(context)
                    + sum over the prompt tokens of prefill(position)

    turn_s: of a turn outside the steps (router, reservation, commit), before its first token. host_tokens_per_s,
    disk_tokens_per_s: brought back from a tier; restore_s: of each restore besides.
    """

    base_s: float
    decode_base_s: float
    decode: Points
    prefill: Points
    kv_bytes_per_token: int
    turn_s: float = 0.0
    host_tokens_per_s: float = float("inf")
    disk_tokens_per_s: float = float("inf")
    restore_s: float = 0.0

    def step_s(self, decode_contexts: Iterable[int], prefill_spans: Iterable[tuple[int, int]]) -> float:
        """prefill_spans: [first, end) of each prompt's chunk."""
        decode = [at(self.decode, context) for context in decode_contexts]
        prefill = [(end - first) * at(self.prefill, (first + end) / 2) for first, end in prefill_spans]
        return self.base_s + (self.decode_base_s if decode else 0.0) + sum(decode) + sum(prefill)

    @property
    def prefill_tokens_per_s(self) -> float:
        """At an empty context."""
        return 1 / self.prefill[0][1]


def h100_costs(*, prefill_gpus: int = 1, path: Path = RESULTS / "cost_parts_h100.jsonl") -> StepCosts:
    """DeepSeek-V3.2's sizes, one GPU's share: sums over the layers of the kernels that ``cost_parts`` timed.

    prefill_gpus: that share the tokens of each chunk.

    A decode step reads its weights whatever its batch, so what was timed at 128 tokens is taken for every batch;
    attention is counted by sequence. Communication is taken to hide behind computation.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def fixed(phase: str) -> dict[str, float]:
        return {row["part"]: row["us"] / 1e6 for row in rows if row["phase"] == phase and row["position"] is None}

    def attention(phase: str) -> Points:
        """Seconds a token of all layers, by position."""
        return tuple(
            (float(row["position"]), LAYERS * row["us"] / row["tokens_timed"] / 1e6)
            for row in sorted(rows, key=lambda row: row["position"] or 0)
            if row["phase"] == phase and row["part"] == "sparse"
        )

    def layers(part: dict[str, float]) -> float:
        rest = DENSE_LAYERS * part["dense_mlp"] + (LAYERS - DENSE_LAYERS) * part["experts"]
        return LAYERS * (part["projections"] + part["index_projections"]) + rest

    decode, prefill = fixed("decode"), fixed("prefill")
    num_prefill = next(row["tokens_timed"] for row in rows if row["phase"] == "prefill" and row["part"] == "experts")
    return StepCosts(
        base_s=0.0,
        decode_base_s=layers(decode) + decode["head"],
        decode=attention("decode"),
        prefill=tuple((x, (layers(prefill) / num_prefill + y) / prefill_gpus) for x, y in attention("prefill")),
        kv_bytes_per_token=V32_KV_BYTES_PER_TOKEN,
        turn_s=0.002,
        host_tokens_per_s=HOST_BYTES_PER_S / V32_KV_BYTES_PER_TOKEN,
        disk_tokens_per_s=DISK_BYTES_PER_S / V32_KV_BYTES_PER_TOKEN,
        restore_s=0.001,
    )


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(offset, slope) of the least-squares line y = offset + slope x; two points at least."""
    mean_x, mean_y = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope
