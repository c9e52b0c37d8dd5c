"""Attention kernels on one GPU beside the best published ones: ours, theirs, the ratio, from one run.

Times are of captured launches over inputs that rotate through more than twice the L2. Peers are measured when their
wheels are importable (sgl-flash-mla, sgl-deep-gemm with apache-tvm-ffi; of its two ways to launch the faster); top-k's
peer is SGLang's, as published beside torch.topk, times what torch.topk takes here. ``bound`` is the ratio to be
reached.

    python -m benchmarks.kernels [--only sparse,prefill,indexer] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import Row, compared, copies, deep_gemm_module, publish_gpu, random_fp8, time_us, times_in_turn
from seamount.kernels.indexer import paged_mqa_logits, paged_topk_indices
from seamount.kernels.layout import CacheLayout, pack_latent
from seamount.kernels.sparse_mla import sparse_mla_decode, sparse_mla_prefill
from seamount.kernels.topk import topk_indices

TOPK = 2048
SCALE = 0.13523378
LAYOUT = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)
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


def timed(call: Callable[[int], object], sets: int) -> float:
    """The median time of one call in microseconds; ``call(i)`` runs on input set i."""
    return time_us([partial(call, i) for i in range(sets)])


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
        sets = copies(rows * TOPK * 656)
        chosen = [
            torch.randint(num_pages * 64 // TOPK, (rows, TOPK), device="cuda")
            + torch.arange(TOPK, device="cuda") * (num_pages * 64 // TOPK)
            for _ in range(sets)
        ]
        slots = [x[:, torch.randperm(TOPK, device="cuda")].contiguous() for x in chosen]
        q = [torch.randn((rows, heads, 576), device="cuda").bfloat16() for _ in range(sets)]

        def ours(i: int, q: list[Tensor] = q, slots: list[Tensor] = slots, plane: Tensor = plane) -> object:
            return sparse_mla_decode(q[i], plane, slots[i], LAYOUT, SCALE)

        ours_us, peer_us = timed(ours, sets), None
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

            peer_us = timed(theirs, sets)
        yield compared(
            "sparse_mla_decode",
            f"b{batch} s_q{queries} h{heads} k{TOPK} ctx{context}",
            ours_us,
            peer_us,
            1.0 if rows <= 32 else 1.2,
            num_bytes=rows * (TOPK * 656 + heads * 2 * (576 + 512)),
            flop=2 * rows * heads * TOPK * (576 + 512),
        )


def prefill_rows(quick: bool) -> Iterator[Row]:
    """The last s_q queries of a context over the top-k of what each sees; the peer reads bf16 whatever the cache.

    The ways are measured in turn, three times: at its power limit the chip slows as it warms.
    """
    shapes = [(1024, 8192, 128), (1024, 32768, 128), (1024, 131072, 128)]
    if not quick:
        shapes += [(4096, 8192, 128), (4096, 32768, 128), (4096, 131072, 128), (4096, 32768, 64)]
    for queries, context, heads in shapes:
        ways = prefill_ways(queries, context, heads)
        launches = [[partial(way, i) for i in range(2)] for way in ways.values()]
        median = dict(zip(ways, times_in_turn(launches, min_launches=2), strict=True))
        for name in ("bf16", "fp8"):
            yield compared(
                f"sparse_mla_prefill_{name}",
                f"s_q{queries} h{heads} k{TOPK} ctx{context}",
                median[name],
                median.get("peer"),
                1.2,
                num_bytes=queries * (TOPK * (1152 if name == "bf16" else 656) + heads * 2 * (576 + 512)),
                flop=2 * queries * heads * TOPK * (576 + 512),
            )


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


def index_pages(num_pages: int) -> Tensor:
    """Random index pages, no two alike: equal ones would give top-k ties that a model's scores do not have."""
    plane = torch.empty((num_pages, 64 * 132), dtype=torch.uint8, device="cuda")
    plane[:, :8192] = random_fp8(num_pages, 8192).view(torch.uint8)
    plane[:, 8192:] = (torch.rand((num_pages, 64), device="cuda") + 0.5).view(torch.uint8).view(num_pages, 256)
    return plane


def indexer_rows(quick: bool) -> Iterator[Row]:
    """Scores of decode, top-k alone, and both together, whose peer is the sum of the two peers.

    What is compared is measured in turn, three times, as the chip slows while it warms.
    """
    num_pages = 128 * 131072 // 64
    plane = index_pages(num_pages)
    shapes = [(b, 1, c) for c in (32768, 131072) for b in (1, 32, 128)]
    if not quick:
        shapes += [(1, 1, 4096), (32, 1, 4096), (128, 1, 4096), (8, 1, 131072), (64, 1, 131072)]
        shapes += [(b, 2, c) for c in (32768, 131072) for b in (1, 32, 128)]
    totals: dict[tuple[int, int], tuple[float, float | None]] = {}
    for batch, queries, context in shapes:
        sets = copies(batch * context * 132)
        ways = indexer_ways(plane, batch, queries, context, sets)
        launches = [[partial(way, i) for i in range(sets)] for way in ways.values()]
        median = dict(zip(ways, times_in_turn(launches), strict=True))
        peer_us = min((median[name] for name in ways if name.startswith("peer")), default=None)
        if queries == 1 and context >= 32768:
            totals[batch, context] = (median["selected"], peer_us)
        shape = f"b{batch} next_n{queries} ctx{context}"
        num_bytes = batch * context * 132
        flop = 2 * batch * queries * 64 * 128 * context
        yield compared("paged_mqa_logits", shape, median["scores"], peer_us, None, num_bytes=num_bytes, flop=flop)
    del plane, ways, launches
    torch.cuda.empty_cache()
    for batch, context in PUBLISHED_TOPK:
        row = topk_row(batch, context)
        yield row
        if (batch, context) in totals:
            both_us, scores_us = totals[batch, context]
            peer_us = None if scores_us is None else scores_us + row["peer_us"]
            shape = f"b{batch} ctx{context} k{TOPK}"
            yield compared("indexer_and_topk", shape, both_us, peer_us, 1.0, num_bytes=batch * context * 132)
    if not quick:
        logits = torch.randn((4096, 32768), device="cuda")
        lengths = torch.full((4096,), 32768, dtype=torch.int32, device="cuda")
        us = timed(lambda i: topk_indices(logits, TOPK, lengths), 2)
        yield compared("topk_indices", f"rows4096 n32768 k{TOPK}", us, None, None, num_bytes=logits.nbytes)


def indexer_ways(
    plane: Tensor, batch: int, queries: int, context: int, sets: int
) -> dict[str, Callable[[int], object]]:
    """Scores, scores and selection, and DeepGEMM's scores, launched after the launch ahead has ended and before."""
    num_pages = plane.shape[0]
    tables = [page_tables(num_pages, batch, context) for _ in range(sets)]
    q = [torch.randn((batch, queries, 64, 128), device="cuda").to(torch.float8_e4m3fn) for _ in range(sets)]
    weights = torch.randn((batch, queries, 64), device="cuda")
    behind = torch.arange(queries - 1, -1, -1, dtype=torch.int32, device="cuda")
    lengths = (torch.full((batch, 1), context, dtype=torch.int32, device="cuda") - behind).contiguous()
    ways: dict[str, Callable[[int], object]] = {
        "scores": lambda i: paged_mqa_logits(q[i], plane, weights, lengths, tables[i], LAYOUT),
        "selected": lambda i: paged_topk_indices(q[i], plane, weights, lengths, tables[i], LAYOUT, TOPK),
    }
    deep_gemm = deep_gemm_module()
    if deep_gemm is None:
        return ways
    meta = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
    pool, flat = plane.view(num_pages, 64, 1, 132), weights.flatten(0, 1)

    def theirs(early: bool, i: int) -> object:
        deep_gemm.set_pdl(early)
        return deep_gemm.fp8_paged_mqa_logits(q[i], pool, flat, lengths, tables[i], meta, context, clean_logits=False)

    return {**ways, "peer": partial(theirs, False), "peer, early launch": partial(theirs, True)}


def topk_row(rows: int, width: int) -> dict[str, Any]:
    sets = copies(rows * width * 4)
    logits = [torch.randn((rows, width), device="cuda") for _ in range(sets)]
    lengths = torch.full((rows,), width, dtype=torch.int32, device="cuda")
    ours = timed(lambda i: topk_indices(logits[i], TOPK, lengths), sets)
    torch_topk = timed(lambda i: logits[i].topk(TOPK, sorted=False), sets)
    published, published_torch = PUBLISHED_TOPK[rows, width]
    peer = published * torch_topk / published_torch
    row = compared("topk_indices", f"rows{rows} n{width} k{TOPK}", ours, peer, None, num_bytes=rows * width * 4)
    return row | {"torch_topk_us": round(torch_topk, 2), "published_peer_us": published}


def main() -> None:
    sections = {"sparse": sparse_rows, "prefill": prefill_rows, "indexer": indexer_rows}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sections), help="sections, separated by commas")
    parser.add_argument("--quick", action="store_true", help="the shapes that have a bound")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels: no CUDA device here; nothing measured")
        return
    wanted = arguments.only.split(",")
    publish_gpu("kernels", (row for section in wanted for row in sections[section](arguments.quick)))


if __name__ == "__main__":
    main()
