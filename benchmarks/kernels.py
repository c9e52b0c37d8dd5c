"""Attention kernels on one GPU beside the best published ones: ours, theirs, the ratio, from one run.

A call is measured inside a CUDA graph that holds a call for each of several input sets, together more than
twice the L2; a figure is the median replay divided by the number of sets. Peers are measured when their wheels are
importable (sgl-flash-mla, sgl-deep-gemm with apache-tvm-ffi); top-k's peer is SGLang's, as published beside
torch.topk, times what torch.topk takes here. ``bound`` is the ratio to be reached.

    python -m benchmarks.kernels [--only sparse,prefill,indexer] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import deep_gemm_module
from seamount.kernels.indexer import paged_mqa_logits, paged_topk_indices
from seamount.kernels.layout import CacheLayout, pack_latent
from seamount.kernels.sparse_mla import sparse_mla_decode, sparse_mla_prefill
from seamount.kernels.topk import topk_indices

RESULTS = Path(__file__).parent / "results" / "kernels_h100.jsonl"
TOPK = 2048
SCALE = 0.13523378
LAYOUT = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
ROTATED_BYTES = 110 << 20
# SGLang 0.5.23's topk_v2 and torch.topk on one H100, us: {(rows, scores): (topk_v2, torch.topk)}.
PUBLISHED_TOPK = {
    (1, 4096): (7.8, 21.5),
    (1, 32768): (16.3, 52.0),
    (1, 131072): (13.2, 61.3),
    (32, 4096): (8.0, 30.7),
    (32, 32768): (17.5, 69.4),
    (32, 131072): (31.0, 105.8),
    (128, 4096): (8.6, 29.9),
    (128, 32768): (21.2, 109.6),
    (128, 131072): (68.4, 276.3),
}
Row = dict[str, Any]


def microseconds(call: Callable[[int], object], sets: int) -> float:
    """The median time of one call; ``call(i)`` runs on input set i."""
    torch.cuda.synchronize()  # the inputs were made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(sets):
                call(i)
        graph.replay()
        times = []
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / sets)
    del graph
    torch.cuda.empty_cache()
    return statistics.median(times)


def num_sets(bytes_of_one: int) -> int:
    return max(2, min(64, -(-ROTATED_BYTES // bytes_of_one)))


def tiled_pages(template: Tensor, num_pages: int) -> Tensor:
    repeats = -(-num_pages // template.shape[0])
    return template.repeat(repeats, 1)[:num_pages].contiguous()


def page_tables(num_pages: int, batch: int, context: int) -> Tensor:
    pages = context // 64
    if batch * pages <= num_pages:
        return torch.randperm(num_pages, device="cuda")[: batch * pages].view(batch, pages).to(torch.int32)
    return torch.randint(num_pages, (batch, pages), device="cuda", dtype=torch.int32)


def sparse_shapes(quick: bool) -> Iterator[tuple[int, int, int, int]]:
    """Context, batch, queries a sequence, heads."""
    for context in (32768,) if quick else (8192, 32768, 131072):
        for batch in (1, 8, 32, 64, 128):
            yield context, batch, 1, 128
    if quick:
        return
    for batch in (1, 8, 32, 64, 128):
        yield 32768, batch, 2, 128
    for heads in (64, 16):
        for batch in (1, 8, 32, 128):
            yield 32768, batch, 1, heads


def sparse_rows(quick: bool) -> Iterator[Row]:
    try:
        import flash_mla
    except ImportError:
        flash_mla = None
    from seamount.kernels.layout import pack_latent

    latent = torch.randn((256 * 64, 576), device="cuda")
    template = pack_latent(latent[:, :512], latent[:, 512:], LAYOUT).view(256, -1)
    plane = template
    for context, batch, queries, heads in sparse_shapes(quick):
        num_pages = 32 * context // 64
        if plane.shape[0] != num_pages:
            del plane
            plane = tiled_pages(template, num_pages)
        rows = batch * queries
        sets = num_sets(rows * TOPK * 656)
        chosen = [
            torch.randint(num_pages * 64 // TOPK, (rows, TOPK), device="cuda")
            + torch.arange(TOPK, device="cuda") * (num_pages * 64 // TOPK)
            for _ in range(sets)
        ]
        slots = [x[:, torch.randperm(TOPK, device="cuda")].contiguous() for x in chosen]
        q = [torch.randn((rows, heads, 576), device="cuda").bfloat16() for _ in range(sets)]

        def ours(i: int, q: list[Tensor] = q, slots: list[Tensor] = slots, plane: Tensor = plane) -> object:
            return sparse_mla_decode(q[i], plane, slots[i], LAYOUT, SCALE)

        row: Row = {"kernel": "sparse_mla_decode", "shape": f"b{batch} s_q{queries} h{heads} k{TOPK} ctx{context}"}
        row["ours_us"] = microseconds(ours, sets)
        if flash_mla is not None:
            padded = max(heads, 64)
            narrow = [x.int().view(batch, queries, TOPK) for x in slots]
            wide = [torch.randn((batch, queries, padded, 576), device="cuda").bfloat16() for _ in range(sets)]
            tables = page_tables(num_pages, batch, context)
            lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
            meta, _ = flash_mla.get_mla_metadata()
            pool = plane.view(num_pages, 64, 1, 656)

            def theirs(
                i: int,
                wide: list[Tensor] = wide,
                narrow: list[Tensor] = narrow,
                tables: Tensor = tables,
                lengths: Tensor = lengths,
                meta: Any = meta,
                pool: Tensor = pool,
            ) -> object:
                return flash_mla.flash_mla_with_kvcache(
                    wide[i],
                    pool,
                    tables,
                    lengths,
                    512,
                    meta,
                    None,
                    softmax_scale=SCALE,
                    causal=False,
                    is_fp8_kvcache=True,
                    indices=narrow[i],
                    use_legacy=True,
                )

            row["peer_us"] = microseconds(theirs, sets)
        yield finish(row, 1.0 if rows <= 32 else 1.2)


def prefill_rows(quick: bool) -> Iterator[Row]:
    """The last s_q queries of a context over the top-k of what each sees; the peer reads bf16 whatever the cache.

    The ways are measured in turn, three times: at its power limit the chip slows as it warms.
    """
    shapes = [(1024, 8192, 128), (1024, 32768, 128), (1024, 131072, 128)]
    if not quick:
        shapes += [(4096, 8192, 128), (4096, 32768, 128), (4096, 131072, 128), (4096, 32768, 64)]
    for queries, context, heads in shapes:
        ways = prefill_ways(queries, context, heads)
        turns = [{name: microseconds(way, 2) for name, way in ways.items()} for _ in range(3)]
        median = {name: statistics.median(turn[name] for turn in turns) for name in ways}
        for name in ("bf16", "fp8"):
            row: Row = {"kernel": f"sparse_mla_prefill_{name}", "shape": f"s_q{queries} h{heads} k{TOPK} ctx{context}"}
            row |= {"ours_us": median[name], "peer_us": median.get("peer")}
            yield finish(row, 1.2)


def prefill_ways(queries: int, context: int, heads: int) -> dict[str, Callable[[int], object]]:
    q = [torch.randn((queries, heads, 576), device="cuda").bfloat16() for _ in range(2)]
    indices = [spread_indices(queries, context) for _ in range(2)]
    pages = torch.randperm(context // 64, device="cuda").unsqueeze(1)
    tokens = (pages * 64 + torch.arange(64, device="cuda")).flatten()
    latent = torch.randn((context, 576), device="cuda")

    def from_cache(layout: CacheLayout) -> Callable[[int], object]:
        plane = pack_latent(latent[:, :512], latent[:, 512:], layout).view(context // 64, -1)
        return lambda i: sparse_mla_prefill(q[i], plane, tokens, indices[i], layout, SCALE)

    ways = {"bf16": from_cache(replace(LAYOUT, name="bf16")), "fp8": from_cache(LAYOUT)}
    try:
        import flash_mla
    except ImportError:
        return ways
    kv, narrow = latent.bfloat16().unsqueeze(1), [x.unsqueeze(1) for x in indices]
    return {"peer": lambda i: flash_mla.flash_mla_sparse_fwd(q[i], kv, narrow[i], SCALE, 512, use_legacy=True), **ways}


def spread_indices(queries: int, context: int) -> Tensor:
    """One token from each of TOPK equal parts of what each of the last queries sees: [queries, TOPK] int32."""
    parts = torch.arange(context - queries + 1, context + 1, device="cuda").clamp_min(TOPK).unsqueeze(1) / TOPK
    at = torch.arange(TOPK, device="cuda")
    first, end = (parts * at).floor(), (parts * (at + 1)).floor()
    return (first + torch.rand((queries, TOPK), device="cuda") * (end - first)).int().clamp_max(context - 1)


def indexer_rows(quick: bool) -> Iterator[Row]:
    deep_gemm = deep_gemm_module()
    num_pages = 128 * 131072 // 64
    template = torch.empty((1024, 64 * 132), dtype=torch.uint8, device="cuda")
    template[:, :8192] = torch.randn((1024, 8192), device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    template[:, 8192:] = (torch.rand((1024, 64), device="cuda") + 0.5).view(torch.uint8).view(1024, 256)
    plane = tiled_pages(template, num_pages)
    shapes = [(b, 1, c) for c in (32768, 131072) for b in (1, 32, 128)]
    if not quick:
        shapes += [(1, 1, 4096), (32, 1, 4096), (128, 1, 4096), (8, 1, 131072), (64, 1, 131072)]
        shapes += [(b, 2, c) for c in (32768, 131072) for b in (1, 32, 128)]
    totals: dict[tuple[int, int], tuple[float, float | None]] = {}
    for batch, queries, context in shapes:
        sets = num_sets(batch * context * 132)
        tables = [page_tables(num_pages, batch, context) for _ in range(sets)]
        q = [torch.randn((batch, queries, 64, 128), device="cuda").to(torch.float8_e4m3fn) for _ in range(sets)]
        weights = torch.randn((batch, queries, 64), device="cuda")
        behind = torch.arange(queries - 1, -1, -1, dtype=torch.int32, device="cuda")
        lengths = (torch.full((batch, 1), context, dtype=torch.int32, device="cuda") - behind).contiguous()

        def ours(
            i: int,
            q: list[Tensor] = q,
            weights: Tensor = weights,
            lengths: Tensor = lengths,
            tables: list[Tensor] = tables,
            plane: Tensor = plane,
        ) -> object:
            return paged_mqa_logits(q[i], plane, weights, lengths, tables[i], LAYOUT)

        row: Row = {"kernel": "paged_mqa_logits", "shape": f"b{batch} next_n{queries} ctx{context}"}
        row["ours_us"] = microseconds(ours, sets)
        if deep_gemm is not None:
            meta = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
            pool = plane.view(num_pages, 64, 1, 132)
            flat = weights.flatten(0, 1)

            def theirs(
                i: int,
                q: list[Tensor] = q,
                flat: Tensor = flat,
                lengths: Tensor = lengths,
                tables: list[Tensor] = tables,
                meta: Any = meta,
                pool: Tensor = pool,
                context: int = context,
            ) -> object:
                return deep_gemm.fp8_paged_mqa_logits(
                    q[i], pool, flat, lengths, tables[i], meta, context, clean_logits=False
                )

            row["peer_us"] = microseconds(theirs, sets)
        if queries == 1 and context >= 32768:

            def ours_selected(
                i: int,
                q: list[Tensor] = q,
                weights: Tensor = weights,
                lengths: Tensor = lengths,
                tables: list[Tensor] = tables,
                plane: Tensor = plane,
            ) -> object:
                return paged_topk_indices(q[i], plane, weights, lengths, tables[i], LAYOUT, TOPK)

            totals[batch, context] = (microseconds(ours_selected, sets), row.get("peer_us"))
        yield finish(row, None)
    del plane
    torch.cuda.empty_cache()
    for batch, context in PUBLISHED_TOPK:
        row = topk_row(batch, context)
        yield finish(row, None)
        if (batch, context) in totals:
            ours_us, peer_us = totals[batch, context]
            both: Row = {"kernel": "indexer_and_topk", "shape": f"b{batch} ctx{context} k{TOPK}"}
            both["ours_us"] = ours_us
            if peer_us is not None:
                both["peer_us"] = peer_us + row["peer_us"]
            yield finish(both, 1.0)
    if not quick:
        row = {"kernel": "topk_indices", "shape": f"rows4096 n32768 k{TOPK}"}
        logits = torch.randn((4096, 32768), device="cuda")
        lengths = torch.full((4096,), 32768, dtype=torch.int32, device="cuda")
        row["ours_us"] = microseconds(lambda i: topk_indices(logits, TOPK, lengths), 2)
        yield finish(row, None)


def topk_row(rows: int, width: int) -> Row:
    sets = num_sets(rows * width * 4)
    logits = [torch.randn((rows, width), device="cuda") for _ in range(sets)]
    lengths = torch.full((rows,), width, dtype=torch.int32, device="cuda")
    row: Row = {"kernel": "topk_indices", "shape": f"rows{rows} n{width} k{TOPK}"}
    row["ours_us"] = microseconds(lambda i: topk_indices(logits[i], TOPK, lengths), sets)
    row["torch_topk_us"] = microseconds(lambda i: logits[i].topk(TOPK, sorted=False), sets)
    published, published_torch = PUBLISHED_TOPK[rows, width]
    row["peer_us"] = published * row["torch_topk_us"] / published_torch
    row["published_peer_us"] = published
    return row


def finish(row: Row, bound: float | None) -> Row:
    row.setdefault("peer_us", None)
    row["ratio"] = None if row["peer_us"] is None else row["ours_us"] / row["peer_us"]
    row["bound"] = bound
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="sparse,prefill,indexer", help="sections, separated by commas")
    parser.add_argument("--quick", action="store_true", help="the shapes that have a bound")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA device here, nothing measured")
        return
    sections = {"sparse": sparse_rows, "prefill": prefill_rows, "indexer": indexer_rows}
    wanted = arguments.only.split(",")
    stamp = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    rows = []
    for name in wanted:
        for row in sections[name](arguments.quick):
            rows.append(row)
            if arguments.json:
                print(json.dumps({**stamp, **row}), flush=True)
            else:
                peer, ratio = row["peer_us"] or float("nan"), row["ratio"] or float("nan")
                print(
                    f"{row['kernel']:20} {row['shape']:36} {row['ours_us']:9.1f} {peer:9.1f} {ratio:6.2f}", flush=True
                )
        torch.cuda.empty_cache()
    RESULTS.parent.mkdir(exist_ok=True)
    kept = []
    if RESULTS.exists():
        fresh = {(row["kernel"], row["shape"]) for row in rows}
        old = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        kept = [row for row in old if (row["kernel"], row["shape"]) not in fresh]
    lines = [json.dumps(row) for row in [*kept, *({**stamp, **row} for row in rows)]]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
