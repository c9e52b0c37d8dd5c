"""A day of bursty agents' traffic on hundreds of GPUs, second by second: what scaling saves, and what it costs turns.

Turns of agents (``simulation/demand.py``): millions of them, bursts of ten times the median minute within ten minutes.
Gangs of eight GPUs with V3.2's weights and step times of one H100 take over two minutes to start
(``simulation/pools.py``). Who says how many there are (``simulation/scalers.py``):

    static   the smallest fleet that never changes and has the first-token target in 99% of the minutes
    own      ``seamount.cluster.scaling.decide``, with the defaults of ``serving.yaml``
    Serve    Ray Serve's default policy for each pool, over a grid of its settings

target: the p99 of the first tokens of a minute's turns; ``--target`` is what it may be. A long prompt alone takes ten
seconds on one GPU, so no fleet makes the p99 of ordinary minutes less than that. GPUs are paid from the wish for a
gang on until it has left.

    python -m benchmarks.scaling --seeds 4                the table of docs/performance.md: two minutes a day
    python -m benchmarks.scaling --no-grid                the own policy beside static fleets, less than one
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks._report import RESULTS, Row, load_average, publish
from benchmarks.simulation.costs import StepCosts, h100_costs
from benchmarks.simulation.demand import DAY_S, Demand, day_of_agents
from benchmarks.simulation.pools import GANG_RANKS, LOAD_BYTES_PER_S, Day, Plant, Scaler, Wanted, run_day
from benchmarks.simulation.scalers import Fixed, Own, ServeDefault
from seamount.cluster.load import Limits, Slo

MET = 0.99
"""Share of the minutes that must have the target."""
MAX_GANGS = 100
"""Of each pool."""
MORE_DECODE = 8
"""Decode gangs beyond the least that are tried in search of the smallest static fleet: they append prompts, too."""
BEGINS_WITH = Wanted(prefill=2, decode=6)
PREFILL_TARGETS, DECODE_TARGETS = (0.25, 0.5, 1.0), (4.0, 6.0, 8.0, 12.0)
UPSCALE_DELAYS_S, DOWNSCALE_DELAYS_S = (0.0, 30.0), (60.0, 300.0, 600.0)
DEFAULT_DELAYS = "up 30 s, down 600 s"
BOUND = 0.7
"""Of the GPU-hours of the smallest static fleet."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """One day's demand, run as often as wanted. step: told what is run next; dollars: of a GPU-hour."""

    seed: int
    demand: Demand
    plant: Plant
    target_s: float
    dollars: float
    step: Callable[[str], None]

    def run(self, name: str, scaler: Scaler) -> Day:
        self.step(name)
        return run_day(self.demand, self.plant, scaler)

    def meets(self, prefill: int, decode: int) -> bool:
        day = self.run(f"static {prefill} + {decode}", Fixed(prefill=prefill, decode=decode))
        return day.met(self.target_s) >= MET

    def row(self, way: str, settings: str, day: Day) -> Row:
        gpus = GANG_RANKS * day.series["gangs"]
        return {
            "way": way,
            "seed": self.seed,
            "settings": settings,
            "gpu_hours": day.gpu_hours,
            "dollars": day.gpu_hours * self.dollars,
            "gpus_mean": float(gpus.mean()),
            "gpus_max": int(gpus.max()),
            "minutes_met": day.met(self.target_s),
            "turns_met": float((day.first_token_s <= self.target_s).mean()),
            "first_s_p50": float(np.percentile(day.first_token_s, 50)),
            "first_s_p99": float(np.percentile(day.first_token_s, 99)),
        }


def least(fits: Callable[[int], bool]) -> int:
    """The smallest number up to ``MAX_GANGS`` that fits, where all above it do."""
    low, high = -1, MAX_GANGS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def smallest_static(meets: Callable[[int, int], bool]) -> tuple[int, int]:
    """The fewest gangs (prefill, decode) of both pools together that meet it, where more of either never harm."""
    decode = least(lambda number: meets(MAX_GANGS, number))
    prefill = least(lambda number: meets(number, decode))
    for more in range(decode + 1, decode + 1 + MORE_DECODE):
        fewer = prefill + decode - 1 - more  # prefill gangs with which the fleet would be smaller
        if fewer >= 0 and meets(fewer, more):
            prefill, decode = least(lambda number, more=more: meets(number, more)), more  # type: ignore[misc]
    return prefill, decode


def own() -> Own:
    """With the defaults of ``serving.yaml``."""
    slo = Slo(
        prefill=Limits(at_least=0, at_most=MAX_GANGS, ranks_per_gang=GANG_RANKS),
        decode=Limits(at_least=1, at_most=MAX_GANGS, ranks_per_gang=GANG_RANKS),
    )
    return Own(slo=slo, begins_with=BEGINS_WITH)


def serve_grid() -> Iterator[tuple[str, ServeDefault]]:
    """Serve's default policy, with its default delays and quicker ones."""
    for prefill, decode, up_s, down_s in itertools.product(
        PREFILL_TARGETS, DECODE_TARGETS, UPSCALE_DELAYS_S, DOWNSCALE_DELAYS_S
    ):
        yield (
            f"target {prefill:g} and {decode:g}, up {up_s:g} s, down {down_s:g} s",
            ServeDefault(
                prefill_target=prefill,
                decode_target=decode,
                upscale_delay_s=up_s,
                downscale_delay_s=down_s,
                begins_with=BEGINS_WITH,
                max_gangs=MAX_GANGS,
            ),
        )


def best(days: list[tuple[str, Day]], target_s: float) -> tuple[str, Day]:
    """The one with the fewest GPU-hours of those that have the target, else the one that is nearest to it."""
    meeting = [one for one in days if one[1].met(target_s) >= MET]
    if meeting:
        return min(meeting, key=lambda one: one[1].gpu_hours)
    return max(days, key=lambda one: one[1].met(target_s))


def compare(trial: Trial, *, grid: bool) -> tuple[list[Row], dict[str, Day], list[tuple[str, Day]]]:
    """Rows of every way, their days, and those of the grid."""
    prefill, decode = smallest_static(trial.meets)
    static = trial.run("smallest static", Fixed(prefill=prefill, decode=decode))
    ways = {"smallest static": (f"{prefill} prefill, {decode} decode", static)}
    ways["own"] = "defaults", trial.run("own", own())
    tried = [(name, trial.run(f"Serve, {name}", scaler)) for name, scaler in serve_grid()] if grid else []
    if tried:
        ways["best of Serve"] = best(tried, trial.target_s)
        default = [one for one in tried if one[0].endswith(DEFAULT_DELAYS)]
        ways["Serve's default delays"] = best(default, trial.target_s)
    rows = [trial.row(way, settings, day) for way, (settings, day) in ways.items()]
    return rows, {way: day for way, (_, day) in ways.items()}, tried


def plot(trial: Trial, days: dict[str, Day], path: Path) -> None:
    """Turns, gangs, queue, first-token p99 and dollars over the day."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 12), layout="constrained")
    panels = figure.subplots(5, 1, sharex=True)
    hours = np.arange(DAY_S) / 3600
    by_minute = trial.demand.num_turns.reshape(-1, 60).mean(axis=1)
    panels[0].plot(hours[::60], by_minute, color="black")
    panels[0].set(ylabel="turns / s", title="A day of agents' turns; GPUs in gangs of eight")
    for way, day in days.items():
        if way == "Serve's default delays":
            continue
        panels[1].plot(hours[::60], GANG_RANKS * day.series["gangs"][::60], label=way)
        panels[2].plot(hours[::60], day.series["queued_tokens"].reshape(-1, 60).max(axis=1) / 1e6, label=way)
        panels[3].plot(hours[::60], day.p99_by_minute, label=way)
        cost = np.cumsum(day.series["gangs"]) * GANG_RANKS / 3600
        panels[4].plot(hours[::60], cost[::60], label=way)
    own_day = days["own"]
    for pool, style in (("decode", ":"), ("prefill", "--")):
        ready = GANG_RANKS * own_day.series[pool][::60]  # type: ignore[index]
        panels[1].plot(hours[::60], ready, linestyle=style, color="gray", label=f"own, {pool} ready")
    panels[1].set(ylabel="GPUs held")
    panels[2].set(ylabel="prompt tokens waiting (M)", yscale="symlog")
    panels[3].axhline(trial.target_s, color="black", linestyle=":", label="target")
    panels[3].set(ylabel="first token p99 (s)", yscale="log")
    panels[4].set(ylabel="GPU-hours", xlabel="hour of the day")
    dollars = panels[4].secondary_yaxis("right", functions=(lambda x: x * trial.dollars, lambda x: x / trial.dollars))
    dollars.set_ylabel(f"$ at {trial.dollars:g} a GPU-hour")
    for panel in panels:
        panel.grid(True, alpha=0.3)
    for panel in panels[1:4]:
        panel.legend(loc="upper left", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def plot_grid(trial: Trial, days: dict[str, Day], tried: list[tuple[str, Day]], path: Path) -> None:
    """GPU-hours and minutes that had the target: each setting of the grid beside the other ways."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()

    def dots(label: str, found: list[Day], **look: str) -> None:
        panel.scatter([day.gpu_hours for day in found], [day.met(trial.target_s) for day in found], label=label, **look)

    dots("Serve's default policy, each setting", [day for _, day in tried], marker=".", color="tab:gray")
    dots("own, with its defaults", [days["own"]], marker="*", color="tab:red")
    dots("smallest static fleet", [days["smallest static"]], marker="s", color="tab:blue")
    panel.axhline(MET, color="black", linestyle=":", label="wanted")
    panel.set(xlabel="GPU-hours of the day", ylabel="share of the minutes within the target", ylim=(0.9, 1.003))
    panel.grid(True, alpha=0.3)
    panel.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def verdicts(rows: list[Row]) -> Iterator[str]:
    """What is promised, for each seed."""
    for seed in sorted({int(row["seed"]) for row in rows}):
        by_way = {str(row["way"]): row for row in rows if row["seed"] == seed}
        mine, static = by_way["own"], by_way["smallest static"]
        met, share = float(mine["minutes_met"]), float(mine["gpu_hours"]) / float(static["gpu_hours"])
        yield f"seed {seed}: target in {met:.2%} of the minutes: {_holds(met >= MET)} (at least {MET:.0%})"
        yield f"seed {seed}: {share:.2f} of the smallest static fleet's GPU-hours: {_holds(share <= BOUND)} ({BOUND})"
        if "best of Serve" in by_way:
            serve = by_way["best of Serve"]
            hours = float(mine["gpu_hours"]) / float(serve["gpu_hours"])
            is_better = met >= MET and (hours < 1 or float(serve["minutes_met"]) < MET)
            yield (
                f"seed {seed}: {hours:.2f} of the GPU-hours of Serve's best, which has the target in "
                f"{float(serve['minutes_met']):.2%}: {_holds(is_better)}"
            )


def _holds(is_so: bool) -> str:
    return "holds" if is_so else "DOES NOT HOLD"


def _plants(seed: int, costs: StepCosts, turns_per_s: float, peak: float, load_gb_s: float) -> tuple[Demand, Plant]:
    demand = day_of_agents(seed=seed, turns_per_s=turns_per_s, peak=peak, costs=costs)
    return demand, Plant.of(demand, costs, load_gb_s * 1e9)


def main(
    turns_per_s: Annotated[float, typer.Option(min=0.1, help="Mean of the day without bursts.")] = 20.0,
    peak: Annotated[float, typer.Option(min=1.5, help="Turns of the busiest minute over the median one's.")] = 10.0,
    target: Annotated[float, typer.Option(min=0.1, help="First-token p99 of a minute, seconds.")] = 15.0,
    load_gb_s: Annotated[float, typer.Option(min=0.1, help="Weights loaded by a node, GB/s.")] = LOAD_BYTES_PER_S / 1e9,
    dollars: Annotated[float, typer.Option(min=0.0, help="Of a GPU-hour: assumed.")] = 2.5,
    seeds: Annotated[int, typer.Option(min=1, help="Days, seeds from 1 on.")] = 1,
    grid: Annotated[bool, typer.Option(help="Serve's default policy over a grid of its settings.")] = True,
    plot_to: Annotated[Path, typer.Option(help="Where the plots of the first day go.")] = RESULTS / "scaling.png",
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Scaling over a day of bursty agents' traffic.

    Examples: python -m benchmarks.scaling --json · python -m benchmarks.scaling --no-grid --peak 5
    """
    load, console, rows, costs = load_average(), Console(stderr=True), list[Row](), h100_costs()
    with Progress(console=console) as progress:
        bar = progress.add_task("making up a day", total=None)
        for seed in range(1, seeds + 1):
            demand, plant = _plants(seed, costs, turns_per_s, peak, load_gb_s)
            console.print(
                f"seed {seed}: {len(demand.second):,} turns, busiest minute {demand.peak:.1f} times the median; a gang "
                f"starts in {plant.start_s:.0f} s",
                highlight=False,
            )
            trial = Trial(
                seed=seed,
                demand=demand,
                plant=plant,
                target_s=target,
                dollars=dollars,
                step=lambda name, seed=seed: progress.update(bar, description=f"seed {seed}: {name}", advance=1),  # type: ignore[misc]
            )
            found, days, tried = compare(trial, grid=grid)
            rows += found
            if seed == 1:
                plot(trial, days, plot_to)
            if seed == 1 and tried:
                plot_grid(trial, days, tried, plot_to.with_stem(f"{plot_to.stem}_grid"))
    publish("scaling", rows, as_json=json, load=load, constants={"target_s": target, "peak": peak})
    for line in verdicts(rows):
        console.print(line, highlight=False)


if __name__ == "__main__":
    typer.run(main)
