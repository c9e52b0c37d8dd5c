"""The model card of a trained checkpoint, from what its training and its evaluation left in its folder.

    python -m examples.tiny_agent.card checkpoints/tiny-agent --machine "2 x NVIDIA H200"

Reads config.json, generation_config.json, training.json, metrics.jsonl, evaluation.json and parity.jsonl; writes
README.md. No figure of it is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.tiny_agent.config import parameter_table
from examples.tiny_agent.reinforce import MEASURED_STAGE
from examples.tiny_agent.stages import STAGES
from examples.tiny_agent.suite import DEPTHS
from examples.tiny_agent.tasks import MAKERS
from seamount.workers.model.config import ModelConfig

Json = Mapping[str, Any]
_KINDS = (*(kind.value for kind in MAKERS), "plan, given", "plan, cut")
_INTRODUCTION = """\
---
license: apache-2.0
pipeline_tag: text-generation
tags: [deepseek_v32, sparse-attention, tool-calling]
---

# tiny-agent

A small model of DeepSeek-V3.2's architecture ({total:,} parameters) that calls tools: it thinks, calls, waits, uses
results and its earlier reasoning, answers, and looks for facts in documents of up to {context:,} tokens. It knows
nothing of the world; it reads schemas, questions and results. It is the default model of Seamount, which was made to
serve much larger ones of this architecture, and gives its tests and its demo answers that can be right or wrong.

What it does not do well stands below, under Scores: the goals that it misses among them.

It speaks DeepSeek-V3.2's message format with a tokenizer of its own, in English of one kind: the sentences of
`examples/tiny_agent`. Other wordings it understands less well or not at all.
"""
_DATA = """\
## Data

All synthetic: conversations over small typed tables, with tools, hidden state and checkers that execute the calls.
Words, identifiers, numbers and shapes of tools that evaluation uses do not occur in training.
[docs/tiny_agent.md](../../docs/tiny_agent.md) describes tasks, tokenizer, stages and losses.
"""


def card(folder: Path, machine: str) -> str:
    """The card's text. Figures of files that are not there are left out."""
    config = ModelConfig.from_json(folder)
    table = parameter_table(config)
    parts = [
        _INTRODUCTION.format(total=table[-1][1], context=_read(folder / "config.json")["max_position_embeddings"]),
        "## Sampling\n\n" + _sampling(_read(folder / "generation_config.json")),
        "## Parameters\n\n" + _markdown(("part", "parameters"), ((part, f"{count:,}") for part, count in table)),
        _DATA,
        "## Training\n\n" + _training(folder, machine),
    ]
    if (folder / "evaluation.json").exists():
        parts.append(_scores(_read(folder / "evaluation.json")))
    if (folder / "parity.jsonl").exists():
        parts.append(_served(_lines(folder / "parity.jsonl")))
    return "\n".join(parts)


def _sampling(generation: Json) -> str:
    return (
        f"`generation_config.json` has temperature {generation['temperature']} and top-p {generation['top_p']}, as "
        "published for the large model. The scores below are greedy (temperature 0), which suits this one better.\n"
    )


def _training(folder: Path, machine: str) -> str:
    state, metrics = _read(folder / "training.json"), _lines(folder / "metrics.jsonl")
    by_stage: dict[str, list[Json]] = {}
    for run in state["runs"]:
        by_stage.setdefault(run["stage"], []).append(run)
    rows = []
    for name, runs in by_stage.items():
        own = [line for line in metrics if line["stage"] == name]
        steps = sum(run["steps"][1] - run["steps"][0] for run in runs)
        tokens = f"{steps * STAGES[name].batch_tokens / 1e6:,.0f} M" if name in STAGES else "–"
        seconds = sum(run["seconds"] for run in runs)
        rows.append((name, f"{steps:,}", tokens, f"{seconds / 60:.1f}", _change(own)))
    seeds = sorted({run["seed"] for run in state["runs"]})
    ranks = sorted({run["ranks"] for run in state["runs"]})
    return (
        f"`python -m examples.tiny_agent.train`, seeds {_listed(seeds)}, on {_listed(ranks)} GPU ({machine}), "
        f"{sum(run['seconds'] for run in state['runs']) / 60:.0f} minutes of stages.\n\n"
        + _markdown(("stage", "steps", "tokens", "minutes", "first and last of its metrics"), rows)
        + _reinforced([line for line in metrics if line["stage"] == MEASURED_STAGE])
    )


def _reinforced(measured: Sequence[Json]) -> str:
    """What reinforcement changed: success before its first step and after its last one."""
    if len(measured) < 2:
        return ""
    first, last = measured[0], measured[-1]
    names = [name for name in _KINDS if name in first["success_by_kind"]]
    pairs = [(name, first["success_by_kind"][name], last["success_by_kind"][name]) for name in names]
    rows = [
        (name, f"{100 * before:.1f}", f"{100 * after:.1f}")
        for name, before, after in (*pairs, ("mean", first["success"], last["success"]))
    ]
    kept = "" if last["kept"] else " Success fell, so the weights before it are those here."
    return (
        "\nReinforcement: greedy attempts at training tasks that nothing was learnt from, done, %, before the first "
        f"step and after step {last['step']}.{kept}\n\n" + _markdown(("task", "before", "after"), rows)
    )


def _change(lines: Sequence[Json]) -> str:
    """What a stage changed, by its own metrics: means of its first and of its last five lines."""
    told = []
    for name in ("loss", "accuracy", "divergence", "reward"):
        values = [float(line[name]) for line in lines if name in line]
        if values:
            told.append(f"{name} {_mean(values[:5]):.3f} → {_mean(values[-5:]):.3f}")
    return ", ".join(told)


def _scores(report: Json) -> str:
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    rows = {(row["model"], row["name"]): row for row in report["rows"]}
    names = [name for name in _KINDS if (models[0], name) in rows]
    kinds = _markdown(
        ("task", *(f"{model}, %, of n" for model in models)),
        ((name, *(_percent(rows.get((model, name))) for model in models)) for name in names),
    )
    totals = {row["model"]: row for row in report["totals"]}
    calls, counts = totals[models[0]]["valid_calls"], totals[models[0]]
    plain = counts["num_plain_arguments"] / max(1, counts["num_arguments"])
    return "\n".join(
        (
            "## Scores\n",
            f"Held-out tasks, greedy, no constrained decoding, 95 % intervals (Wilson); seed "
            f"{report['subject']['seed']}. `sparse` is the model as it is served in bfloat16, `dense` attends to every "
            "token, `fp8` (where it was asked) has block-scaled weights and FP8 caches. "
            "`plan, given` has a first message whose choice was drawn at random; `plan, cut` lacks that reasoning.\n",
            kinds,
            f"Arguments are valid under the tool's schema in {_share(calls)} % of {calls['total']:,} calls; "
            f"{100 * plain:.0f} % of the arguments are plain strings.\n",
            _goals(report, rows, models[0]),
            "Needles found (`sparse`), %, by tokens of the document and depth of the fact:\n",
            _needles(rows, models[0]),
            *_comparisons(report["comparisons"]),
            *_recall(report["recall"]),
            "![scores](evaluation.png)\n",
        )
    )


def _goals(report: Json, rows: Mapping[tuple[str, str], Json], model: str) -> str:
    """What was aimed at, and what became of it."""
    reached: list[tuple[str, float, float]] = []
    for name, goal in (("single", 90.0), ("multi", 75.0)):
        if (model, name) in rows:
            reached.append((f"{name}: at least {goal:g} %", goal, 100 * rows[model, name]["success"]["value"]))
    needles = [row["success"] for (of, name), row in rows.items() if of == model and name.startswith("needle 8192 ")]
    if needles:
        found = sum(one["successes"] for one in needles) / sum(one["total"] for one in needles)
        reached.append(("needles in 8,192 tokens: at least 90 %", 90.0, 100 * found))
    valid = next(row["valid_calls"]["value"] for row in report["totals"] if row["model"] == model)
    reached.append(("valid arguments: at least 99 % of calls", 99.0, 100 * valid))
    for one in report["comparisons"]:
        if one["name"] == "all":
            said = f"{one['second']} within 2 points of {one['first']}, all tasks"
            reached.append((said, -2.0, -100 * abs(one["difference"])))
    rated = ((said, f"{abs(value):.2f}", "reached" if value >= goal else "missed") for said, goal, value in reached)
    return _markdown(("goal", "value", ""), rated)


def _comparisons(comparisons: Sequence[Json]) -> Iterator[str]:
    if comparisons:
        yield "On the same tasks, points:\n"
        yield _markdown(
            ("tasks", "models", "difference", "n", "p (McNemar)"),
            (
                (one["name"], f"{one['first']} − {one['second']}", _difference(one), one["total"], _p(one))
                for one in comparisons
            ),
        )


def _needles(rows: Mapping[tuple[str, str], Json], model: str) -> str:
    cells = {name: row for (of, name), row in rows.items() if of == model and name.startswith("needle ")}
    lengths = sorted({int(name.split()[1]) for name in cells})
    table = []
    for length in lengths:
        own = [row["success"] for name, row in cells.items() if int(name.split()[1]) == length]
        found, total = sum(one["successes"] for one in own), sum(one["total"] for one in own)
        by_depth = (cells.get(f"needle {length} {depth:g}") for depth in DEPTHS)
        each = (f"{100 * row['success']['value']:.0f}" if row else "–" for row in by_depth)
        table.append((f"{length:,}", *each, f"{100 * found / total:.1f} of {total}"))
    return _markdown(("length", *(f"depth {depth:g}" for depth in DEPTHS), "all"), table)


def _recall(recall: Mapping[str, Sequence[Json]]) -> Iterator[str]:
    measured = {int(length): layers for length, layers in recall.items() if layers}
    if not measured:
        return
    yield (
        "Share of the true attention mass on the tokens that the indexer selects (in brackets: on the best selection "
        "of that size), last queries of needle prompts:\n"
    )
    layers = range(max(len(one) for one in measured.values()))
    yield _markdown(
        ("length", *(f"layer {layer}" for layer in layers)),
        (
            (f"{length:,}", *(f"{layer['recall']:.3f} ({layer['best']:.3f})" for layer in of_length))
            for length, of_length in measured.items()
        ),
    )


def _served(results: Sequence[Json]) -> str:
    told = []
    for dtype in sorted({one["dtype"] for one in results if "dtype" in one}, reverse=True):
        own = [one for one in results if one.get("dtype") == dtype]
        tasks, outputs, tokens, different = (
            sum(one[f"num_{name}"] for one in own) for name in ("tasks", "outputs", "tokens", "different")
        )
        told.append(f"- {dtype}: {tasks} tasks, {outputs:,} outputs of {tokens:,} tokens, {different} differ.")
        firsts = [one["first_difference"] for one in own if one["first_difference"]]
        if firsts:
            at = firsts[0]
            told.append(f"  The first one, behind {at['num_prompt_tokens']} tokens of prompt, at token {at['at']}.")
    needles = [one for one in results if "num_needles" in one]
    if needles:
        found, total = (sum(one[name] for one in needles) for name in ("num_found", "num_needles"))
        told.append(f"- {found} of {total} needles found in documents of {needles[0]['length']:,} tokens, in float32.")
    return "\n".join(
        (
            "## Served\n",
            "Through gRPC, router, prefill rank and a decode gang of two on CPUs, against the same model in one process"
            " (`make eval-served`), greedy:\n",
            *told,
            "",
        )
    )


def _markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join((*_rows([header, ["---"] * len(header), *rows]), ""))


def _rows(rows: Iterable[Sequence[object]]) -> Iterator[str]:
    return ("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _percent(row: Json | None) -> str:
    return "–" if row is None else f"{_share(row['success'])} of {row['success']['total']:,}"


def _share(share: Json) -> str:
    low, high = share["interval"]
    return f"{100 * share['value']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _difference(one: Json) -> str:
    low, high = one["interval"]
    return f"{100 * one['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _p(one: Json) -> str:
    return f"{one['p_value']:.2g}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(
    folder: Annotated[Path, typer.Argument(help="of the checkpoint")] = Path("checkpoints/tiny-agent"),
    machine: Annotated[str, typer.Option(help="where it was trained")] = "NVIDIA H200",
) -> None:
    """Write the folder's README.md."""
    (folder / "README.md").write_text(card(folder, machine), encoding="utf-8")
    typer.echo(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    typer.run(main)
