"""Cost of a million tokens against their position in the context, sparse and dense, from measured kernels.

``cost_parts`` times the kernels of one layer on a GPU; this adds them up for the whole model and sets the sums beside
the published curve. Nothing is measured here.

    us per token = (61 (projections + attention(position)) + 3 dense MLP + 58 experts + head) / tokens
    cost         = us per token * 10^6 tokens * price of a GPU-hour / 3.6 * 10^9 us

Sparse adds the indexer's projections to every layer; attention(0) is 0. Assumed: the batch stays the same at every
position (the caches of 128 contexts of 128K are spread over as many GPUs as hold them), communication hides behind
computation, no tokens are drafted (published figures come from a system that drafts), GPUs are never idle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from benchmarks._report import RESULTS
from benchmarks._tables import table

LAYERS, DENSE_LAYERS = 61, 3
PUBLISHED = Path(__file__).parent / "published_cost_curve.json"
Row = dict[str, str | int | float]
# [(position in tokens, USD per million tokens)], ascending.
Curve = list[tuple[float, float]]


def cost_per_million(us_per_token: float, usd_per_hour: float) -> float:
    return us_per_token * usd_per_hour / 3600


def curves(rows: Sequence[Mapping[str, object]], usd_per_hour: float) -> dict[tuple[str, str], Curve]:
    """{(phase, way): cost over position} from the rows of ``cost_parts``, and at 0, without attention."""
    found: dict[tuple[str, str], Curve] = {}
    for phase in ("prefill", "decode"):
        own = [row for row in rows if row["phase"] == phase]
        fixed = {str(row["part"]): _us_per_token(row) for row in own if row["position"] is None}
        rest = DENSE_LAYERS * fixed["dense_mlp"] + (LAYERS - DENSE_LAYERS) * fixed["experts"]
        # A prompt's logits are computed for its last token alone.
        rest += fixed["head"] if phase == "decode" else 0
        for way in ("dense", "sparse"):
            layer = fixed["projections"] + (fixed["index_projections"] if way == "sparse" else 0)
            base = LAYERS * layer + rest
            points = {0.0: 0.0}
            points |= {float(str(row["position"])): _us_per_token(row) for row in own if row["part"] == way}
            found[phase, way] = [
                (position, cost_per_million(base + LAYERS * us, usd_per_hour))
                for position, us in sorted(points.items())
            ]
    return found


def _us_per_token(row: Mapping[str, object]) -> float:
    return float(str(row["us"])) / float(str(row["tokens_timed"]))


def at(curve: Sequence[tuple[float, float]], position: float) -> float:
    """Linear between points; the first or last value outside them."""
    if position <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in pairwise(curve):
        if position <= right:
            return low + (high - low) * (position - left) / (right - left)
    return curve[-1][1]


def published() -> dict[tuple[str, str], Curve]:
    found = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {
        (phase, way): [(1024.0 * kilo, usd) for kilo, usd in found[phase][way]]
        for phase in ("prefill", "decode")
        for way in ("dense", "sparse")
    }


def compare(ours: Mapping[tuple[str, str], Curve], theirs: Mapping[tuple[str, str], Curve]) -> list[Row]:
    """A row for each phase and position, 0 and measured ones: USD per million tokens, dense over sparse."""
    rows: list[Row] = []
    for phase in ("prefill", "decode"):
        for position, sparse in ours[phase, "sparse"]:
            dense = at(ours[phase, "dense"], position)
            their_dense, their_sparse = at(theirs[phase, "dense"], position), at(theirs[phase, "sparse"], position)
            rows.append(
                {
                    "phase": phase,
                    "position": int(position),
                    "dense_usd": dense,
                    "sparse_usd": sparse,
                    "dense_over_sparse": dense / sparse,
                    "published_dense_usd": their_dense,
                    "published_sparse_usd": their_sparse,
                    "published_dense_over_sparse": their_dense / their_sparse,
                }
            )
    return rows


def plot(
    ours: Mapping[tuple[str, str], Curve], theirs: Mapping[tuple[str, str], Curve], path: Path, about: str
) -> None:
    """Cost over position, a panel for each phase; measured lines solid, published ones dashed."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    for panel, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        for way, colour in (("dense", "tab:orange"), ("sparse", "tab:blue")):
            for lines, style, label in ((ours, "o-", "measured"), (theirs, "--", "published")):
                points = [(position / 1024, usd) for position, usd in lines[phase, way]]
                panel.plot(*zip(*points, strict=True), style, color=colour, markersize=3, label=f"{way}, {label}")
        panel.set(title=phase, xlabel="position (1,024 tokens)", ylabel="USD per million tokens", ylim=(0, None))
        panel.grid(True, alpha=0.3)
        panel.legend()
    figure.suptitle(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    parts: Annotated[Path, typer.Option(help="Rows of cost_parts.")] = RESULTS / "cost_parts_h100.jsonl",
    usd_per_hour: Annotated[float, typer.Option(min=0.0, help="Price of a GPU-hour.")] = 2.0,
    plot_to: Annotated[Path, typer.Option(help="Where the plot goes.")] = RESULTS / "cost_curve.png",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Print and plot the cost per million tokens against position.

    Examples: python -m benchmarks.cost_curve · python -m benchmarks.cost_curve --usd-per-hour 3.5 --json
    """
    if not parts.exists():
        raise typer.BadParameter(f"{parts} is missing; `python -m benchmarks.cost_parts` on a GPU machine writes it")
    measured = [json.loads(line) for line in parts.read_text(encoding="utf-8").splitlines()]
    ours, theirs = curves(measured, usd_per_hour), published()
    rows = compare(ours, theirs)
    plot(ours, theirs, plot_to, f"DeepSeek-V3.2 sizes, {measured[0]['machine']}, ${usd_per_hour:g} a GPU-hour")
    print("\n".join(json.dumps(row) for row in rows) if as_json else table(rows))


if __name__ == "__main__":
    typer.run(main)
