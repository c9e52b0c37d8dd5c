"""Times of the kernels that a DeepSeek-V3.2 layer is made of, on one GPU: what ``cost_curve`` adds up.

Two deployments, as in published ones: decode with 128 sequences a GPU and 2 routed experts on each (expert parallelism
of 128), prefill in chunks of 4,096 tokens with 8 routed experts on each GPU (32). Choices are spread evenly over the
experts. Every row is one graph of captured launches: a group of kernels that does not depend on the position
(``position`` is null), or the attention over a context of ``position`` tokens, sparse or dense. Communication between
GPUs is not in it.

Dense decode is FlashMLA's (bf16 pages) where its wheel is importable, else sparse decode over every slot. Dense prefill
is torch's scaled_dot_product_attention over expanded keys and values, without a mask over the chunk's mean context.

    python -m benchmarks.cost_parts [--positions 2048,8192,32768,131072]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks._gpu import Row, publish_gpu, random_fp8, time_us
from benchmarks.kernels import tiled_pages
from seamount.kernels import cache_write, gemm, moe
from seamount.kernels.indexer import mqa_topk_indices, paged_topk_indices
from seamount.kernels.layout import CacheLayout, pack_latent
from seamount.kernels.norms import rms_norm
from seamount.kernels.quant import quantize
from seamount.kernels.rope import apply_rope_interleaved
from seamount.kernels.sparse_mla import sparse_mla_decode, sparse_mla_prefill

HIDDEN, HEADS, Q_RANK, RANK, ROPE, NOPE, VALUE = 7168, 128, 1536, 512, 64, 128, 128
INDEX_HEADS, INDEX_DIM, TOPK, EXPERTS, CHOSEN, INNER, DENSE_INNER, VOCABULARY = (
    64,
    128,
    2048,
    256,
    8,
    2048,
    18432,
    129280,
)
SCALE = 0.13523378
LAYOUT = CacheLayout.create(
    "fp8", kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=INDEX_DIM, dtype=torch.bfloat16
)
POSITIONS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Deployment:
    """What one GPU computes at a time: ``tokens`` rows, and the routed experts that it holds."""

    phase: str
    tokens: int
    local_experts: int


DEPLOYMENTS = (Deployment("decode", 128, 2), Deployment("prefill", 4096, 8))


@dataclass(frozen=True)
class Weight:
    values: Tensor
    scales: Tensor

    @classmethod
    def random(cls, *shape: int) -> Weight:
        blocks = (*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128)
        return cls(random_fp8(*shape), torch.rand(blocks, device="cuda") * 0.02)

    def __call__(self, x: Tensor) -> Tensor:
        return gemm.fp8_gemm(*quantize(x), self.values, self.scales)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def projections(tokens: int) -> Callable[[], object]:
    """Both norms, the query and latent projections, absorption, output projection, latent write."""
    q_a, q_b, kv_a = (
        Weight.random(Q_RANK, HIDDEN),
        Weight.random(HEADS * (NOPE + ROPE), Q_RANK),
        Weight.random(576, HIDDEN),
    )
    out = Weight.random(HIDDEN, HEADS * VALUE)
    k_up, v_up = normal(HEADS, NOPE, RANK), normal(HEADS, RANK, VALUE)
    norm, q_norm, kv_norm = (torch.rand(n, device="cuda").bfloat16() for n in (HIDDEN, Q_RANK, RANK))
    x, context = normal(tokens, HIDDEN), normal(HEADS, tokens, RANK)
    angles = torch.rand((tokens, ROPE // 2), device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    plane, slots = LAYOUT.allocate(1, tokens // 64 + 1, "cuda").latent[0], torch.arange(tokens, device="cuda")

    def run() -> object:
        hidden = rms_norm(x, norm, 1e-6)
        q = q_b(rms_norm(q_a(hidden), q_norm, 1e-6)).view(tokens, HEADS, NOPE + ROPE)
        kv = kv_a(hidden)
        cache_write.write_latent(plane, slots, kv[:, :RANK], kv[:, RANK:], kv_norm, 1e-6, cos, sin, LAYOUT)
        rotated = apply_rope_interleaved(q[..., NOPE:], cos, sin)
        absorbed = torch.bmm(q[..., :NOPE].transpose(0, 1), k_up).transpose(0, 1)
        values = torch.bmm(context, v_up).transpose(0, 1).flatten(1)
        return torch.cat((absorbed, rotated), dim=-1), out(values), rms_norm(x, norm, 1e-6)

    return run


def index_projections(tokens: int) -> Callable[[], object]:
    """The indexer's queries, head weights and key write."""
    wq_b, wk = Weight.random(INDEX_HEADS * INDEX_DIM, Q_RANK), Weight.random(INDEX_DIM, HIDDEN)
    heads = torch.randn((INDEX_HEADS, HIDDEN), device="cuda")
    weight, bias = torch.rand(INDEX_DIM, device="cuda"), torch.rand(INDEX_DIM, device="cuda")
    x, q_latent = normal(tokens, HIDDEN), normal(tokens, Q_RANK)
    angles = torch.rand((tokens, ROPE // 2), device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    plane, slots = LAYOUT.allocate(1, tokens // 64 + 1, "cuda").index[0], torch.arange(tokens, device="cuda")

    def run() -> object:
        cache_write.write_index_key(plane, slots, wk(x), weight, bias, 1e-6, cos, sin, LAYOUT)
        q = wq_b(q_latent).view(tokens, INDEX_HEADS, INDEX_DIM)
        return cache_write.rotate_quantize_index_vectors(q, cos, sin), linear(x.float(), heads)

    return run


def dense_mlp(tokens: int) -> Callable[[], object]:
    """The feed-forward half of the first three layers, a share of one in ``tokens`` rows."""
    gate_up, down = Weight.random(2 * DENSE_INNER, HIDDEN), Weight.random(HIDDEN, DENSE_INNER)
    x = normal(tokens, HIDDEN)

    def run() -> object:
        return gemm.fp8_gemm(*gemm.swiglu_quantize(gate_up(x)), down.values, down.scales)

    return run


def experts(tokens: int, local: int) -> Callable[[], object]:
    """Gate, shared expert, and this GPU's share of the routed ones: as many rows as its tokens make choices."""
    gate_weight, bias = normal(EXPERTS, HIDDEN) * 0.02, torch.rand(EXPERTS, device="cuda") * 0.1
    up, down = Weight.random(local, 2 * INNER, HIDDEN), Weight.random(local, HIDDEN, INNER)
    shared_up, shared_down = Weight.random(2 * INNER, HIDDEN), Weight.random(HIDDEN, INNER)
    x = normal(tokens, HIDDEN)
    # Every GPU serves what all send it: on average as many rows as its own tokens choose.
    ids = (torch.arange(tokens * CHOSEN, device="cuda") % local).view(tokens, CHOSEN)

    def run() -> object:
        weights, _ = moe.gate(
            x, gate_weight, bias, num_groups=8, num_chosen_groups=4, num_chosen=CHOSEN, normalize=True, scale=2.5
        )
        order = moe.group_by_expert(ids, local)
        inner = gemm.grouped_fp8_gemm_swiglu(*moe.permute_quantize(x, order), up.values, up.scales, order.offsets)
        routed = gemm.grouped_fp8_gemm(*inner, down.values, down.scales, order.offsets)
        shared_inner = gemm.swiglu_quantize(shared_up(x))
        shared = gemm.fp8_gemm(*shared_inner, shared_down.values, shared_down.scales)
        return moe.combine(routed, order, weights, shared)

    return run


def head(tokens: int) -> Callable[[], object]:
    """The last norm and the vocabulary's logits."""
    weight, norm = normal(VOCABULARY, HIDDEN), torch.rand(HIDDEN, device="cuda").bfloat16()
    x = normal(tokens, HIDDEN)
    return lambda: linear(rms_norm(x, norm, 1e-6), weight)


def random_slots(rows: int, context: int, pool: int) -> Tensor:
    """min(context, 2,048) slots a row, each from another stretch of the pool, in random order: [rows, k] int64."""
    count = min(context, TOPK)
    stretch = pool // count
    slots = torch.randint(stretch, (rows, count), device="cuda") + torch.arange(count, device="cuda") * stretch
    return slots[:, torch.randperm(count, device="cuda")].contiguous()


def random_plane(num_pages: int, kind: str) -> Tensor:
    """Pages of random entries of the FP8 layout, finite scales: [num_pages, bytes] uint8.

    Latents repeat 256 pages. Index keys are all distinct: equal scores would make top-k look slower than it is.
    """
    template = 256 if kind == "latent" else num_pages
    if kind == "latent":
        entries = torch.randn((template * 64, RANK + ROPE), device="cuda")
        pages = pack_latent(entries[:, :RANK], entries[:, RANK:], LAYOUT).view(template, -1)
    else:
        pages = torch.empty((template, 64 * 132), dtype=torch.uint8, device="cuda")
        pages[:, :8192] = random_fp8(template, 8192).view(torch.uint8)
        pages[:, 8192:] = (torch.rand((template, 64), device="cuda") + 0.5).view(torch.uint8).view(template, 256)
    return tiled_pages(pages, num_pages)


def sparse_decode(tokens: int, context: int) -> list[Callable[[], object]]:
    num_pages = tokens * context // 64
    latent = random_plane(min(num_pages, 1 << 15), "latent")
    index = random_plane(num_pages, "index")
    tables = torch.randperm(num_pages, device="cuda").view(tokens, -1)
    lengths = torch.full((tokens,), context, device="cuda")
    runs = []
    for _ in range(3):
        q, slots = normal(tokens, HEADS, RANK + ROPE), random_slots(tokens, context, latent.shape[0] * 64)
        index_q, weights = random_fp8(tokens, INDEX_HEADS, INDEX_DIM), torch.randn((tokens, INDEX_HEADS), device="cuda")

        def run(q: Tensor = q, slots: Tensor = slots, index_q: Tensor = index_q, weights: Tensor = weights) -> None:
            if context > TOPK:
                paged_topk_indices(index_q, index, weights, lengths, tables, LAYOUT, TOPK)
            sparse_mla_decode(q, latent, slots, LAYOUT, SCALE)

        runs.append(run)
    return runs


def dense_decode(tokens: int, context: int) -> list[Callable[[], object]]:
    try:
        import flash_mla
    except ImportError:
        latent = random_plane(max(64, tokens * context // 64), "latent")
        slots = torch.randperm(tokens * context, device="cuda").view(tokens, context)
        q = normal(tokens, HEADS, RANK + ROPE)
        return [lambda: sparse_mla_decode(q, latent, slots, LAYOUT, SCALE)]
    num_pages = tokens * context // 64
    pool = normal(256, 64, 1, RANK + ROPE).repeat(-(-num_pages // 256), 1, 1, 1)[:num_pages].contiguous()
    tables = torch.randperm(num_pages, device="cuda").to(torch.int32).view(tokens, -1)
    lengths = torch.full((tokens,), context, dtype=torch.int32, device="cuda")
    q = normal(tokens, 1, HEADS, RANK + ROPE)
    meta, _ = flash_mla.get_mla_metadata()
    flags: dict[str, Any] = {"softmax_scale": SCALE, "causal": True, "is_fp8_kvcache": False, "use_legacy": True}
    return [lambda: flash_mla.flash_mla_with_kvcache(q, pool, tables, lengths, RANK, meta, None, **flags)]


def sparse_prefill(tokens: int, context: int) -> list[Callable[[], object]]:
    num_pages = context // 64
    latent, index = random_plane(num_pages, "latent"), random_plane(num_pages, "index")
    pages = torch.randperm(num_pages, device="cuda")
    tokens = min(tokens, context)
    lengths = torch.arange(context - tokens + 1, context + 1, device="cuda")
    q, slots = normal(tokens, HEADS, RANK + ROPE), random_slots(tokens, context, context)
    index_q, weights = random_fp8(tokens, INDEX_HEADS, INDEX_DIM), torch.randn((tokens, INDEX_HEADS), device="cuda")

    def run() -> None:
        if context > TOPK:
            mqa_topk_indices(index_q, index, weights, lengths, pages, LAYOUT, TOPK)
        sparse_mla_prefill(q, latent, torch.arange(context, device="cuda"), slots, LAYOUT, SCALE)

    return [run]


def dense_prefill(tokens: int, context: int) -> list[Callable[[], object]]:
    tokens = min(tokens, context)
    keys = max(64, context - tokens // 2)
    q, k = normal(1, HEADS, tokens, NOPE + ROPE), normal(1, HEADS, keys, NOPE + ROPE)
    v = normal(1, HEADS, keys, VALUE)
    return [lambda: scaled_dot_product_attention(q, k, v, scale=SCALE)]


def parts(deployment: Deployment) -> dict[str, Callable[[], object]]:
    tokens = deployment.tokens
    return {
        "projections": projections(tokens),
        "index_projections": index_projections(tokens),
        "experts": experts(tokens, deployment.local_experts),
        "dense_mlp": dense_mlp(tokens),
        "head": head(tokens),
    }


def measure(deployment: Deployment, positions: list[int]) -> Iterator[Row]:
    about: Row = {"phase": deployment.phase, "tokens": deployment.tokens}
    for name, run in parts(deployment).items():
        us = time_us([run], min_launches=8, repeats=5)
        yield about | {"part": name, "position": None, "tokens_timed": deployment.tokens, "us": round(us, 1)}
    torch.cuda.empty_cache()
    prefill = deployment.phase == "prefill"
    ways = (
        (("sparse", sparse_prefill), ("dense", dense_prefill))
        if prefill
        else (("sparse", sparse_decode), ("dense", dense_decode))
    )
    for position in positions:
        for name, make in ways:
            runs = make(deployment.tokens, position)
            us = time_us(runs, min_launches=2, repeats=3)
            timed = min(deployment.tokens, position) if prefill else deployment.tokens
            yield about | {"part": name, "position": position, "tokens_timed": timed, "us": round(us, 1)}
            del runs
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", default=",".join(map(str, POSITIONS)), help="contexts, tokens, multiples of 64")
    positions = [int(text) for text in parser.parse_args().positions.split(",")]
    torch.manual_seed(1)
    with torch.inference_mode():
        publish_gpu("cost_parts", (row for deployment in DEPLOYMENTS for row in measure(deployment, positions)))


if __name__ == "__main__":
    main()
