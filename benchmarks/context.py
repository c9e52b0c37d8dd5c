"""Step time over the length of the context: decode steps and a prefill chunk, with selection and without.

The demo geometry with random weights; the pages hold random values, not those of a text, so what the indexer selects
lies scattered over the whole context. That decides which bytes are read, not how many. "Without selection" is the same
model and weights with an index_topk beyond every context; both kinds of step alternate within the run.

``predicted_ms`` counts what the step cannot avoid: multiplications at the rate of this machine's float32 matrix
product plus bytes of weights and cache entries at its reading rate, both measured at the start of the run.

    python -m benchmarks.context                               the table of docs/performance.md, in 3 minutes
    python -m benchmarks.context --max-context 4096 --json     a quick look, as JSON lines
    python -m benchmarks.context --layout fp8 --repeats 9      another cache layout, steadier medians
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks._report import RESULTS, Row, load_average, publish
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, CachePlanes, pack_index_key, pack_latent, scatter_slots
from seamount.workers.experts.dispatch import LocalExperts
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.parameters import parameter_shapes
from seamount.workers.model.random_checkpoint import write_random_checkpoint
from seamount.workers.model.transformer import Transformer
from seamount.workers.model.weights import load_weights

MIN_CONTEXT = 1024
NO_SELECTION = 1 << 20
VOCAB_SIZE = 512
NUM_DISTINCT_PAGES = 512
MIN_CASE_S, MAX_CASE_S = 0.5, 12.0
FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A kind of step: sequences of the batch, and new tokens of each."""

    name: str
    num_sequences: int
    num_new: int

    def batch(self, context: int, page_tables: Sequence[Sequence[int]]) -> ForwardBatch:
        """The last ``num_new`` tokens of a context, for each sequence."""
        ids = list(range(2, 2 + self.num_new))
        first = context - self.num_new
        return ForwardBatch.create([(ids, first, pages) for pages in page_tables[: self.num_sequences]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this machine can do on the given number of threads."""

    flop_per_s: float
    bytes_per_s: float

    @staticmethod
    def measure() -> Limits:
        left, right = torch.randn(512, 512), torch.randn(512, 4096)
        large = torch.zeros(32 << 20)
        product_s = min(_timed(lambda: left @ right) for _ in range(20))
        return Limits(
            flop_per_s=2 * 512 * 512 * 4096 / product_s,
            bytes_per_s=large.nbytes / min(_timed(lambda: large.sum()) for _ in range(5)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step has to do at the least."""

    flop: int
    cache_bytes: int
    weight_bytes: int

    @staticmethod
    def count(step: Step, context: int, config: ModelConfig, layout: CacheLayout) -> Work:
        rows, selects = step.num_sequences * step.num_new, context > config.index_topk
        num_keys = min(context, config.index_topk)
        pairs = step.num_sequences * step.num_new * context
        absorbed = rows * num_keys * config.num_attention_heads * (layout.latent_dim + config.kv_lora_rank)
        if step.num_new > 1 and not selects:
            plain = pairs * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
            expand = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
            absorbed = min(absorbed, plain + step.num_sequences * context * expand)
        scores = pairs * config.index_n_heads * (config.index_head_dim + 1) if selects else 0
        latents = step.num_sequences * (num_keys if step.num_new == 1 else context)
        keys = step.num_sequences * context if selects else 0
        entries = latents * layout.latent_bytes_per_token + keys * layout.index_bytes_per_token
        per_row, touched = _projections(config, rows, selects)
        return Work(
            flop=2 * (per_row * rows + config.num_hidden_layers * (absorbed + scores)),
            cache_bytes=config.num_hidden_layers * entries,
            weight_bytes=touched * FLOAT_BYTES,
        )

    def seconds(self, limits: Limits) -> float:
        return self.flop / limits.flop_per_s + (self.cache_bytes + self.weight_bytes) / limits.bytes_per_s


def _projections(config: ModelConfig, rows: int, selects: bool) -> tuple[int, int]:
    """Weights that one row multiplies with, and weights that a step of ``rows`` rows reads."""
    shapes = parameter_shapes(config, range(config.n_routed_experts))
    unused = ("embed_tokens", "lm_head") if selects else ("embed_tokens", "lm_head", "indexer.wq_b", "weights_proj")
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if not any(part in name for part in unused)}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts
    share = config.num_experts_per_tok / config.n_routed_experts
    return rest + round(experts * share), rest + round(experts * (1 - (1 - share) ** rows))


def random_caches(config: ModelConfig, layout: CacheLayout, num_pages: int) -> CachePlanes:
    """Planes whose entries are normal random numbers: some pages drawn, and every page a copy of one of them."""
    planes = layout.allocate(config.num_hidden_layers, num_pages)
    drawn = layout.allocate(1, min(num_pages, NUM_DISTINCT_PAGES))
    slots = torch.arange(drawn.latent[0].shape[0] * PAGE_SIZE)
    for latent, index in zip(planes.latent, planes.index, strict=True):
        values = torch.randn(len(slots), layout.latent_dim, dtype=layout.dtype)
        rows = pack_latent(values[:, : layout.kv_lora_rank], values[:, layout.kv_lora_rank :], layout)
        scatter_slots(drawn.latent[0], slots, rows, layout, "latent")
        keys = pack_index_key(torch.randn(len(slots), layout.index_head_dim, dtype=layout.dtype), layout)
        scatter_slots(drawn.index[0], slots, keys, layout, "index")
        choice = torch.randint(drawn.latent[0].shape[0], (num_pages,))
        torch.index_select(drawn.latent[0], 0, choice, out=latent)
        torch.index_select(drawn.index[0], 0, choice, out=index)
    return planes


def models(layout_name: str) -> dict[str, Transformer]:
    """The demo model with selection on and off, over the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        write_random_checkpoint(path, seed=1, geometry="demo", vocab_size=VOCAB_SIZE)
        config = ModelConfig.from_json(path)
        experts = LocalExperts(config.n_routed_experts)
        owned = experts.map.owned(experts.rank)
        weights = load_weights(path, config, owned_experts=owned, dtype=torch.float32)
    layout = CacheLayout.create(
        layout_name,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        dtype=torch.float32,
    )
    without = replace(config, index_topk=NO_SELECTION)
    return {
        "on": Transformer(config, layout, weights, experts),
        "off": Transformer(without, layout, weights, experts),
    }


def time_step(model: Transformer, batch: ForwardBatch, planes: CachePlanes) -> tuple[float, float]:
    """Seconds of a step, and of its layers alone.

    The layers: from the first one's cache write to the last one's, which is a whole layer less, scaled to all of them.
    """
    writes: list[float] = []
    began = time.perf_counter()
    model.forward(batch, planes, on_layer=lambda layer: writes.append(time.perf_counter()))
    step_s = time.perf_counter() - began
    num_layers = len(writes)
    return step_s, (writes[-1] - writes[0]) * num_layers / (num_layers - 1)


def measure(
    step: Step,
    context: int,
    ways: dict[str, Transformer],
    planes: CachePlanes,
    page_tables: Sequence[Sequence[int]],
    repeats: int,
    limits: Limits,
) -> list[Row]:
    """One row for selection on and one for off, which alternate: quick steps more often, steps of seconds less."""
    batch = step.batch(context, page_tables)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for model in ways.values():
        if step.num_new == 1 or context == MIN_CONTEXT:
            time_step(model, batch, planes)  # warm: the first use of a shape chooses kernels
    began = time.perf_counter()
    while (spent_s := time.perf_counter() - began) < MIN_CASE_S or (
        len(seconds["on"]) < repeats and spent_s < MAX_CASE_S
    ):
        for name, model in ways.items():
            seconds[name].append(time_step(model, batch, planes))
    without_s = median(step_s for step_s, _ in seconds["off"])
    rows: list[Row] = []
    for name, model in ways.items():
        step_s = median(step_s for step_s, _ in seconds[name])
        work = Work.count(step, context, model.config, model.layout)
        rows.append(
            {
                "step": step.name,
                "context": context,
                "selection": name,
                "pages": "random values",
                "repeats": len(seconds[name]),
                "step_ms": step_s * 1e3,
                "layers_ms": median(layers_s for _, layers_s in seconds[name]) * 1e3,
                "off_over_this": without_s / step_s,
                "gflop": work.flop / 1e9,
                "cache_mb": work.cache_bytes / 1e6,
                "predicted_ms": work.seconds(limits) * 1e3,
                "predicted_share": work.seconds(limits) / step_s,
            }
        )
    return rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step time over context, a panel for each kind of step."""
    from matplotlib.figure import Figure  # slow to import

    names = list(dict.fromkeys(row["step"] for row in rows))
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for selection, label, style in (("on", "sparse (top-k 64)", "o-"), ("off", "dense", "s--")):
            chosen = [row for row in rows if row["step"] == name and row["selection"] == selection]
            panel.plot([row["context"] for row in chosen], [row["step_ms"] for row in chosen], style, label=label)
        panel.set(title=str(name), xlabel="context (tokens)", ylabel="step time (ms)", xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(True, which="both", alpha=0.3)
        panel.legend()
    figure.suptitle("Demo geometry on CPU, pages filled with random values")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(
    max_context: Annotated[int, typer.Option(min=MIN_CONTEXT, help="Contexts double from 1024 to this.")] = 32768,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the larger decode step.")] = 16,
    chunk: Annotated[int, typer.Option(min=2, max=MIN_CONTEXT, help="Tokens of the prefill chunk.")] = 256,
    layout: Annotated[str, typer.Option(help="Of the caches: bf16, fp8 or exact.")] = "bf16",
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind and context, if quick enough.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; a rank has 1 unless configured.")] = 1,
    plot_to: Annotated[Path, typer.Option(help="Where the plot goes.")] = RESULTS / "context.png",
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Time decode steps and a prefill chunk over the context; needs 3 GB for 16 contexts of 32K.

    Examples: python -m benchmarks.context --max-context 4096 --json · python -m benchmarks.context --layout fp8
    """
    load = load_average()
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    contexts = [MIN_CONTEXT << i for i in range((max_context // MIN_CONTEXT).bit_length())]
    steps = [Step(name=f"decode {count}", num_sequences=count, num_new=1) for count in sorted({1, sequences})]
    steps.append(Step(name=f"prefill {chunk}", num_sequences=1, num_new=chunk))
    with torch.inference_mode(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("cases", total=len(contexts) * len(steps))
        limits = Limits.measure()
        ways = models(layout)
        num_pages = contexts[-1] // PAGE_SIZE
        planes = random_caches(ways["on"].config, ways["on"].layout, num_pages * sequences)
        page_tables = torch.randperm(num_pages * sequences).view(sequences, num_pages).tolist()
        rows: list[Row] = []
        for step in steps:
            for context in contexts:
                rows += measure(step, context, ways, planes, page_tables, repeats, limits)
                progress.advance(task)
    plot(rows, plot_to)
    constants = {"gflop_per_s_limit": limits.flop_per_s / 1e9, "gb_per_s_limit": limits.bytes_per_s / 1e9}
    publish("context", rows, as_json=json, load=load, constants=constants)


if __name__ == "__main__":
    typer.run(main)
