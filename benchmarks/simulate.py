"""One simulated system: agents' sessions, or a trace, over ranks of given memory, and what their turns cost.

Discrete events in virtual time around the system's own placement, scheduler, caches, retention and leases; see
``simulation/``. ``benchmarks.agents`` compares whole sets of such runs, ``benchmarks.agents_real`` one with the real
system. Nothing is written.

    python -m benchmarks.simulate --sessions 16 --device-gb 40 --host-gb 200
    python -m benchmarks.simulate --trace conversation.jsonl --order lru --json
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from benchmarks._tables import table
from benchmarks.simulation.accounts import summary
from benchmarks.simulation.costs import h100_costs
from benchmarks.simulation.mooncake import read_trace
from benchmarks.simulation.scenario import Order, Scenario, agents, simulate
from seamount.workers.scheduler import EngineLimits


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Made-up sessions that live at a time.")] = 16,
    trace: Annotated[Path | None, typer.Option(help="Mooncake trace (JSON lines) instead of them.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Decode ranks.")] = 1,
    device_gb: Annotated[float, typer.Option(min=1.0, help="For pages, of each rank.")] = 40.0,
    host_gb: Annotated[float, typer.Option(min=0.0, help="Pinned memory for pages, of each rank.")] = 0.0,
    disk_gb: Annotated[float, typer.Option(min=0.0, help="Of each rank.")] = 0.0,
    order: Annotated[
        Order,
        typer.Option(
            help="Of eviction: system, lru, belady (knows the future), distribution (knows how waits are drawn)."
        ),
    ] = "system",
    prefill_gpus: Annotated[int, typer.Option(min=1, help="That compute a prompt's chunk together.")] = 4,
    hours: Annotated[float, typer.Option(min=0.1, help="Virtual; the first third is not counted.")] = 1.0,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens; larger ones simulate faster.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the made-up sessions.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="One JSON line instead of a table.")] = False,
) -> None:
    """Simulate one system at V3.2's sizes, with step times of one H100."""
    costs = h100_costs(prefill_gpus=prefill_gpus)
    page_bytes = page_size * costs.kv_bytes_per_token
    device, host, disk = (int(gb * 1e9 / page_bytes) for gb in (device_gb, host_gb, disk_gb))
    scenario = Scenario(
        costs=costs,
        num_ranks=ranks,
        page_size=page_size,
        device_pages=device,
        host_pages=host,
        disk_pages=disk,
        limits=EngineLimits(max_batch_tokens=8_192, max_running=64, prefill_chunk_tokens=4_096),
        order=order,
        leases=order == "system",
        until_s=3600 * hours,
        warm_s=1200 * hours,
        start_within_s=900 * hours,
    )
    slots = (
        agents(sessions, seed=seed, max_context_tokens=131_072)
        if trace is None
        else [iter([plan]) for plan in read_trace(trace)]
    )
    outcome = simulate(scenario, list(slots))
    row = {"order": order, "pages on device": device, "live pages": outcome.mean_live_pages, **summary(outcome.turns)}
    print(json_module.dumps(row) if json else table([row]))


if __name__ == "__main__":
    typer.run(main)
