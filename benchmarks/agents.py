"""Agents' sessions in virtual time: what device memory, the tiers below it and the order of eviction are worth.

Sessions are made up after public measurements of coding agents (``simulation/traffic.py``), or read from a trace; think
time is kept. Placement, scheduler, caches, retention and leases are the system's own; a step takes what the kernels of
DeepSeek-V3.2's sizes took on one H100, a page what its bytes take.

    (a) device memory for a quarter of the live sessions, tiers below that hold all of them: against a device that is
        never full, the first token's p99 may be 1.3 times as late, and 1.10 times as much be computed as is new
    (b) all tiers together hold a quarter: recomputed tokens at most 0.8 times those of least-recently-used with the
        same tiers, and at most 1.25 times those of an order that knows the future (Belady). Beside them the best order
        that knows how waits are distributed, not the draw: what lies between it and Belady's is out of reach

recomputed: tokens that were computed before, that the prompt begins with, and that no tier had. amplification: tokens
computed over tokens never seen; what the encoding's own cut of reasoning forces is counted apart (with_forced).

    python -m benchmarks.agents                               the table of docs/performance.md
    python -m benchmarks.agents --sessions 16 --hours 1.5     a quick look
    python -m benchmarks.agents --trace mooncake.jsonl        another trace instead of made-up sessions
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from rich.console import Console

from benchmarks._report import RESULTS, Row, load_average, publish
from benchmarks.simulation.accounts import summary
from benchmarks.simulation.costs import h100_costs
from benchmarks.simulation.mooncake import read_trace
from benchmarks.simulation.scenario import Order, Outcome, Scenario, agents, simulate
from benchmarks.simulation.traffic import Plan
from seamount.workers.scheduler import EngineLimits

MAX_CONTEXT_TOKENS = 131_072
PREFILL_GPUS = 4
"""That compute a prompt's chunk together: one GPU's share of decoding beside four of prefill."""
LIMITS = EngineLimits(max_batch_tokens=8_192, max_running=64, prefill_chunk_tokens=4_096)
BOUNDS = {"first token p99": 1.3, "amplification": 1.10, "of Belady's": 1.25, "of LRU's": 0.8}
Slots = Callable[[], list[Iterable[Plan]]]


def endless(scenario: Scenario) -> Scenario:
    """The same with a device that is never full."""
    return replace(scenario, device_pages=2_000_000_000 // scenario.page_size // 64, host_pages=0, disk_pages=0)


def row(name: str, seed: int, scenario: Scenario, outcome: Outcome) -> Row:
    """One line of the table."""
    pages = {"device": scenario.device_pages, "host": scenario.host_pages, "disk": scenario.disk_pages}
    return {"way": name, "seed": seed, **pages, "live pages": outcome.mean_live_pages, **summary(outcome.turns)}


def measured(seed: int, base: Scenario, slots: Slots, say: Callable[[str], None]) -> list[Row]:
    """Every way through the sessions of a seed."""
    rows: list[Row] = []

    def run(name: str, scenario: Scenario) -> Outcome:
        outcome = simulate(scenario, slots())
        rows.append(row(name, seed, scenario, outcome))
        say(f"seed {seed}, {name}: {rows[-1]['turns']} turns, {rows[-1]['recomputed_tokens']} tokens recomputed")
        return outcome

    live = run("never full", endless(base)).mean_live_pages
    room = 2 * MAX_CONTEXT_TOKENS // base.page_size  # for the largest prompts, however few sessions there are
    quarter = max(math.ceil(live / 4), room)
    below = {"host_pages": 2 * quarter, "disk_pages": 8 * quarter}
    run("a: quarter on device, all below", replace(base, device_pages=quarter, **below))
    least = replace(base, device_pages=max(math.ceil(quarter / 2), room), host_pages=quarter)
    orders: dict[str, tuple[Order, bool]] = {
        "b: quarter in all tiers": ("system", True),
        "b: LRU": ("lru", False),
        "b: distribution": ("distribution", False),
        "b: Belady": ("belady", False),
    }
    for name, (order, leases) in orders.items():
        run(name, replace(least, order=order, leases=leases))
    return rows


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """What is promised, over all seeds: recomputed tokens and latencies of the seeds together."""

    def total(way: str, column: str) -> float:
        return sum(float(one[column]) for one in rows if str(one["way"]).startswith(way))

    amplification = mean(float(one["amplification"]) for one in rows if str(one["way"]).startswith("a:"))
    own = total("b: quarter", "recomputed_tokens")
    return {
        "first token p99": total("a:", "first_ms_p99") / total("never full", "first_ms_p99"),
        "amplification": amplification,
        "of Belady's": own / total("b: Belady", "recomputed_tokens"),
        "of LRU's": own / total("b: LRU", "recomputed_tokens"),
        "of the best order's without foresight": own / total("b: distribution", "recomputed_tokens"),
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Recomputed tokens and first-token times of each way, means over the seeds."""
    from matplotlib.figure import Figure  # slow to import

    ways = list(dict.fromkeys(str(one["way"]) for one in rows))

    def means(column: str) -> list[float]:
        return [mean(float(one[column]) for one in rows if one["way"] == way) for way in ways]

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(ways, [value / 1e6 for value in means("recomputed_tokens")], color="tab:blue")
    left.set(xlabel="recomputed tokens (millions)")
    right.barh(ways, means("first_ms_p99"), color="tab:orange", label="p99")
    right.barh(ways, means("first_ms_p50"), color="tab:green", label="p50")
    right.set(xlabel="first token (ms)", xscale="log", yticks=[])
    right.legend()
    for panel in (left, right):
        panel.invert_yaxis()
        panel.grid(True, axis="x", alpha=0.3)
    figure.suptitle("Sessions of agents in virtual time, one rank, V3.2's sizes on H100 costs")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Sessions that live at a time.")] = 64,
    hours: Annotated[float, typer.Option(min=0.1, help="Virtual time; the first third is not counted.")] = 3.0,
    seeds: Annotated[int, typer.Option(min=1, help="Sets of sessions, seeds from 1 on.")] = 2,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens; larger ones simulate faster.")] = 512,
    trace: Annotated[Path | None, typer.Option(help="Mooncake trace (JSON lines) instead of made-up sessions.")] = None,
    plot_to: Annotated[Path, typer.Option(help="Where the plot goes.")] = RESULTS / "agents.png",
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Device memory, tiers and order of eviction under agents' sessions.

    Examples: python -m benchmarks.agents --seeds 1 --json · python -m benchmarks.agents --trace conversation.jsonl
    """
    load, console = load_average(), Console(stderr=True)
    until_s = 3600 * hours
    base = Scenario(
        costs=h100_costs(prefill_gpus=PREFILL_GPUS),
        page_size=page_size,
        device_pages=1,
        limits=LIMITS,
        until_s=until_s,
        warm_s=until_s / 3,
        start_within_s=until_s / 4,
    )
    rows: list[Row] = []
    for seed in range(1, 1 + (seeds if trace is None else 1)):
        if trace is None:
            slots: Slots = lambda seed=seed: agents(sessions, seed=seed, max_context_tokens=MAX_CONTEXT_TOKENS)  # type: ignore[misc] # noqa: E731
        else:
            read = read_trace(trace)
            slots = lambda read=read: [iter([plan]) for plan in read]  # type: ignore[misc] # noqa: E731
        rows += measured(seed, base, slots, lambda line: console.print(line, highlight=False))
    plot(rows, plot_to)
    publish("agents", rows, as_json=json, load=load, constants={"page_size": float(page_size)})
    for name, ratio in ratios(rows).items():
        bound = BOUNDS.get(name)
        verdict = "" if bound is None else f" (at most {bound}): {'holds' if ratio <= bound else 'DOES NOT HOLD'}"
        console.print(f"{name}: {ratio:.3f}{verdict}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
