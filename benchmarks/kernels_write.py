"""Cache writes, quantisation, the gate, routing and FP8 products on one GPU.

Each fused operation is timed beside the separate Triton launches that do the same (ours_us, peer_us, ratio); the FP8
products beside ``torch._scaled_mm`` where it takes the shape, and beside DeepGEMM's times on another machine of the
same kind (published_us), which are not from this run. Times are of captured launches over inputs that rotate through
more than twice the L2.

    python -m benchmarks.kernels_write [--only write,gate,gemm,grouped]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._gpu import Row, copies, publish_gpu, random_fp8, time_us
from seamount.kernels import cache_write, gemm, moe
from seamount.kernels.layout import CacheLayout, scatter_slots
from seamount.kernels.norms import layer_norm, rms_norm
from seamount.kernels.quant import quantize
from seamount.kernels.rope import apply_rope_half, apply_rope_interleaved

HIDDEN, RANK, ROPE, INDEX_DIM, INDEX_HEADS, EXPERTS, INTERMEDIATE = 7168, 512, 64, 128, 64, 256, 2048
WEIGHTS = {
    "qkv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o_proj": (7168, 16384),
    "idx_wq_b": (8192, 1536),
    "dense_gate_up": (36864, 7168),
    "dense_down": (7168, 18432),
    "shared_gate_up": (4096, 7168),
    "shared_down": (7168, 2048),
}
# DeepGEMM (sgl-deep-gemm 0.1.5) on one H100 80GB, microseconds by (weight, rows).
PUBLISHED = {
    ("qkv_a", 32): 14.9, ("qkv_a", 128): 14.9, ("qkv_a", 4096): 98.7, ("q_b", 32): 25.6, ("q_b", 128): 25.7,
    ("q_b", 1024): 64.8, ("q_b", 4096): 242.3, ("kv_b", 32): 15.0, ("kv_b", 128): 16.4, ("kv_b", 1024): 42.0,
    ("kv_b", 4096): 138.7, ("o_proj", 32): 56.9, ("o_proj", 128): 57.8, ("o_proj", 1024): 199.9,
    ("o_proj", 4096): 657.3, ("idx_wq_b", 32): 12.5, ("idx_wq_b", 128): 12.9, ("idx_wq_b", 4096): 85.1,
    ("dense_gate_up", 32): 105.1, ("dense_gate_up", 128): 108.3, ("dense_gate_up", 1024): 383.7,
    ("dense_gate_up", 4096): 1666.9, ("dense_down", 32): 61.9, ("dense_down", 128): 62.4, ("dense_down", 1024): 223.2,
    ("dense_down", 4096): 789.7, ("shared_gate_up", 32): 20.8, ("shared_gate_up", 128): 21.0,
    ("shared_gate_up", 4096): 168.7, ("shared_down", 32): 13.5, ("shared_down", 128): 14.5, ("shared_down", 4096): 96.1,
}  # fmt: skip
# The same, grouped: (form, experts, tokens of 8 choices each, columns).
PUBLISHED_GROUPED = {
    ("masked", 32, 32, 4096): 341.3, ("masked", 32, 128, 4096): 341.3, ("masked", 32, 1024, 4096): 506.6,
    ("masked", 32, 32, 7168): 187.5, ("masked", 32, 128, 7168): 187.6, ("masked", 32, 1024, 7168): 270.2,
    ("masked", 256, 64, 4096): 2317.1, ("masked", 256, 64, 7168): 1190.5,
    ("contiguous", 32, 1024, 4096): 552.7, ("contiguous", 32, 1024, 7168): 302.9,
    ("contiguous", 256, 64, 4096): 2921.2, ("contiguous", 256, 64, 7168): 1374.3,
}  # fmt: skip


def _row(kernel: str, shape: str, ours: float, peer: float | None, peer_name: str, num_bytes: float) -> Row:
    ratio = ours / peer if peer else None
    return {
        "kernel": kernel, "shape": shape, "ours_us": round(ours, 2), "peer": peer_name,
        "peer_us": round(peer, 2) if peer else None, "ratio": round(ratio, 3) if ratio else None,
        "gb_per_s": round(num_bytes / ours / 1e3, 1),
    }  # fmt: skip


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def writes() -> list[Row]:
    """Latent, index key, index query, checksum and quantisation for decode and prefill sizes."""
    rows: list[Row] = []
    for tokens in (1, 32, 128, 4096):
        for name in ("fp8", "bf16"):
            rows.append(_write_latent(tokens, name))
        rows += [_write_index_key(tokens), _rotate_queries(tokens), _quantize(tokens)]
    for pages in (1, 64, 1024):
        planes = [torch.randint(0, 256, (pages, 656 * 64), device="cuda", dtype=torch.uint8) for _ in range(3)]
        ours = time_us([lambda plane=plane: cache_write.page_checksum(plane) for plane in planes])
        peer = time_us([lambda plane=plane: plane.view(torch.int32).sum(1) for plane in planes])
        rows.append(_row("page_checksum", f"{pages} pages", ours, peer, "torch.sum of the words", pages * 656 * 64))
    return rows


def _cache_inputs(tokens: int, name: str) -> tuple[CacheLayout, list[tuple[Tensor, ...]]]:
    layout = CacheLayout.create(
        name, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, index_head_dim=INDEX_DIM, dtype=torch.bfloat16
    )
    pages = max(2, tokens // 16)
    sets = []
    for _ in range(copies(tokens * 2100)):
        planes = layout.allocate(1, pages, "cuda")
        slots = torch.randperm(pages * 64, device="cuda")[:tokens]
        angles = torch.rand((tokens, ROPE // 2), device="cuda") * 100
        sets.append(
            (planes.latent[0], planes.index[0], slots, angles.cos(), angles.sin(), _normal(tokens, RANK + ROPE))
        )
    return layout, sets


def _write_latent(tokens: int, name: str) -> Row:
    layout, sets = _cache_inputs(tokens, name)
    weight = torch.rand(RANK, device="cuda").bfloat16()

    def fused(plane: Tensor, _index: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> None:
        cache_write.write_latent(plane, slots, x[:, :RANK], x[:, RANK:], weight, 1e-6, cos, sin, layout)

    def parts(plane: Tensor, _index: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> None:
        latent, key = rms_norm(x[:, :RANK], weight, 1e-6), apply_rope_interleaved(x[:, RANK:], cos, sin)
        pieces = (*quantize(latent), key) if name == "fp8" else (latent, key)
        rows = torch.cat([piece.view(torch.uint8) for piece in pieces], dim=1)
        scatter_slots(plane, slots, rows, layout, "latent")

    return _compare(f"write_latent {name}", tokens, fused, parts, sets, tokens * (1408 + layout.latent_bytes_per_token))


def _write_index_key(tokens: int) -> Row:
    layout, sets = _cache_inputs(tokens, "fp8")
    weight, bias = torch.rand(INDEX_DIM, device="cuda"), torch.rand(INDEX_DIM, device="cuda")

    def fused(_latent: Tensor, plane: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> None:
        cache_write.write_index_key(plane, slots, x[:, :INDEX_DIM], weight, bias, 1e-6, cos, sin, layout)

    def parts(_latent: Tensor, plane: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> None:
        normed = layer_norm(x[:, :INDEX_DIM].float(), weight, bias, 1e-6)
        values, scales = quantize(cache_write.rotate_index_vectors(normed, cos, sin))
        rows = torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), dim=1)
        scatter_slots(plane, slots, rows, layout, "index")

    return _compare("write_index_key", tokens, fused, parts, sets, tokens * (256 + 256 + 132))


def _rotate_queries(tokens: int) -> Row:
    angles = torch.rand((tokens, ROPE // 2), device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    sets = [(_normal(tokens, INDEX_HEADS, INDEX_DIM),) for _ in range(copies(tokens * INDEX_HEADS * INDEX_DIM * 3))]
    hadamard = cache_write.hadamard_transform(torch.eye(INDEX_DIM, device="cuda")).bfloat16()

    def parts(x: Tensor) -> None:
        rotated = torch.cat((apply_rope_half(x[..., :ROPE], cos, sin), x[..., ROPE:]), dim=-1)
        quantize(rotated @ hadamard)

    return _compare(
        "rotate_quantize_index_vectors",
        tokens,
        lambda x: cache_write.rotate_quantize_index_vectors(x, cos, sin),
        parts,
        sets,
        tokens * INDEX_HEADS * (3 * INDEX_DIM + 4),
    )


def _quantize(tokens: int) -> Row:
    sets = [(_normal(tokens, HIDDEN),) for _ in range(copies(tokens * HIDDEN * 3))]
    outs = [torch.empty((tokens, HIDDEN), device="cuda", dtype=torch.float8_e4m3fn) for _ in sets]
    ours = time_us([lambda x=x: quantize(x) for (x,) in sets])
    peer = time_us([lambda x=x, out=out: out.copy_(x) for (x,), out in zip(sets, outs, strict=True)])
    return _row("quantize", f"{tokens} x {HIDDEN}", ours, peer, "torch cast without scales", tokens * HIDDEN * 3.03)


def _compare(
    kernel: str,
    tokens: int,
    fused: Callable[..., object],
    parts: Callable[..., object],
    sets: list[tuple[Tensor, ...]],
    num_bytes: float,
) -> Row:
    ours = time_us([lambda inputs=inputs: fused(*inputs) for inputs in sets])
    peer = time_us([lambda inputs=inputs: parts(*inputs) for inputs in sets])
    return _row(kernel, f"{tokens} tokens", ours, peer, "its unfused parts", num_bytes)


def gates() -> list[Row]:
    """The gate against a product and a chain of torch operations; routing and the weighted sum."""
    return [row for tokens in (1, 32, 128, 4096) for row in (*_gate(tokens), *_routing(tokens))]


def _gate(tokens: int) -> list[Row]:
    bias = torch.rand(EXPERTS, device="cuda") * 0.1
    num_bytes = HIDDEN * 2 * (tokens + EXPERTS)
    sets = [(_normal(tokens, HIDDEN), _normal(EXPERTS, HIDDEN) * 0.02) for _ in range(copies(num_bytes))]

    def fused(x: Tensor, weight: Tensor) -> object:
        return moe.gate(x, weight, bias, num_groups=8, num_chosen_groups=4, num_chosen=8, normalize=True, scale=2.5)

    def parts(x: Tensor, weight: Tensor) -> object:
        scores = torch.sigmoid((x @ weight.T).float())
        choice = (scores + bias).view(-1, 8, 32)
        best = choice.topk(2, dim=2).values.sum(2).topk(4, dim=1).indices
        kept = torch.zeros(choice.shape[:2], dtype=torch.bool, device="cuda").scatter_(1, best, True)
        ids = choice.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(8, dim=1).indices
        weights = scores.gather(1, ids)
        return weights / weights.sum(1, keepdim=True) * 2.5, ids

    return [_compare("gate", tokens, fused, parts, sets, num_bytes)]


def _routing(tokens: int) -> list[Row]:
    ids = torch.stack([torch.randperm(EXPERTS, device="cuda")[:8] for _ in range(tokens)])
    order = moe.group_by_expert(ids, EXPERTS)
    weights = torch.rand((tokens, 8), device="cuda")
    xs = [(_normal(tokens, HIDDEN),) for _ in range(copies(tokens * HIDDEN * 10))]
    ys = [(_normal(tokens * 8, HIDDEN),) for _ in range(copies(tokens * HIDDEN * 18))]

    def combined(y: Tensor) -> Tensor:
        return (y[order.rows].float() * weights[..., None]).sum(1).bfloat16()

    def sort(ids: Tensor) -> object:
        return torch.sort(ids.flatten(), stable=True)

    return [
        _compare("group_by_expert", tokens, lambda ids: moe.group_by_expert(ids, EXPERTS), sort, [(ids,)], tokens * 96),
        _compare(
            "permute_quantize",
            tokens,
            lambda x: moe.permute_quantize(x, order),
            lambda x: quantize(x[order.tokens]),
            xs,
            tokens * HIDDEN * 10,
        ),
        _compare("combine", tokens, lambda y: moe.combine(y, order, weights), combined, ys, tokens * HIDDEN * 18),
    ]


def products() -> list[Row]:
    """``fp8_gemm`` over the model's weights; the peer is cuBLASLt through torch, the scales' transposition included."""
    return [row for name in WEIGHTS for row in _products(name)]


def _products(name: str) -> list[Row]:
    from seamount.kernels.triton.fp8_gemm import library_gemm

    columns, channels = WEIGHTS[name]
    weights = [(random_fp8(columns, channels),) for _ in range(copies(columns * channels))]
    scale = torch.rand((-(-columns // 128), channels // 128), device="cuda") * 0.02 + 0.01

    def row(tokens: int) -> Row:
        x, x_scale = quantize(_normal(tokens, channels))
        ours = _over(weights, lambda w: gemm.fp8_gemm(x, x_scale, w, scale))
        library = _over(weights, lambda w: library_gemm(x, x_scale, w, scale))
        num_bytes = columns * channels + tokens * (channels + 2 * columns)
        row = _row("fp8_gemm", f"{name} {tokens}x{columns}x{channels}", ours, library, "torch._scaled_mm", num_bytes)
        row["tflop_per_s"] = round(2 * tokens * columns * channels / ours / 1e6, 1)
        return row | _published(ours, PUBLISHED.get((name, tokens)))

    return [row(tokens) for tokens in (1, 32, 64, 128, 1024, 4096)]


def _over(sets: list[tuple[Tensor, ...]], launch: Callable[..., object], min_launches: int = 24) -> float:
    return time_us([lambda inputs=inputs: launch(*inputs) for inputs in sets], min_launches=min_launches)


def _published(ours: float, published: float | None) -> Row:
    return {"published_us": published, "to_published": round(ours / published, 3) if published else None}


def grouped() -> list[Row]:
    """Grouped products, and the SwiGLU form against the product followed by ``swiglu_quantize``."""
    shapes = [(32, 4096, 7168), (32, 7168, 2048), (256, 4096, 7168), (256, 7168, 2048)]
    return [row for shape in shapes for row in _grouped(*shape)]


def _grouped(experts: int, columns: int, channels: int) -> list[Row]:
    weight = random_fp8(experts, columns, channels)
    scale = torch.rand((experts, columns // 128, channels // 128), device="cuda") * 0.02 + 0.01

    def rows(tokens: int) -> list[Row]:
        order = moe.group_by_expert(torch.randint(0, experts, (tokens, 8), device="cuda"), experts)
        counts = order.offsets.diff()
        slab = -(-int(counts.max()) // 128) * 128
        x, x_scale = _quantised(tokens * 8, channels)
        slabs, slab_scale = _quantised(experts, slab, channels)
        num_bytes = int((counts > 0).sum()) * columns * channels + tokens * 8 * (channels + 2 * columns)
        shape = f"{experts} experts, {tokens} tokens x 8, {columns}x{channels}"

        def contiguous() -> Tensor:
            return gemm.grouped_fp8_gemm(x, x_scale, weight, scale, order.offsets)

        def masked() -> Tensor:
            return gemm.grouped_fp8_gemm_masked(slabs, slab_scale, weight, scale, counts)

        out = []
        for form, launch in (("contiguous", contiguous), ("masked", masked)):
            ours = _over([()], launch, 8)
            published = PUBLISHED_GROUPED.get((form, experts, tokens, columns))
            row = _row(f"grouped_fp8_gemm {form}", shape, ours, None, "", num_bytes)
            row["tflop_per_s"] = round(16 * tokens * columns * channels / ours / 1e6, 1)
            out.append(row | _published(ours, published))
        if columns == 2 * INTERMEDIATE:
            fused = _over([()], lambda: gemm.grouped_fp8_gemm_swiglu(x, x_scale, weight, scale, order.offsets), 8)
            parts = _over([()], lambda: gemm.swiglu_quantize(contiguous()), 8)
            out.append(_row("grouped_fp8_gemm_swiglu", shape, fused, parts, "product, then swiglu_quantize", num_bytes))
        return out

    return [row for tokens in ((32, 128, 1024) if experts == 32 else (64,)) for row in rows(tokens)]


def _quantised(*shape: int) -> tuple[Tensor, Tensor]:
    return random_fp8(*shape), torch.rand((*shape[:-1], shape[-1] // 128), device="cuda") + 0.5


def main() -> None:
    sections = {"write": writes, "gate": gates, "gemm": products, "grouped": grouped}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sections), help="sections, separated by commas")
    if not torch.cuda.is_available():
        print("kernels_write: no CUDA device here; nothing measured")
        return
    rows: list[Row] = []
    with torch.inference_mode():
        for section in parser.parse_args().only.split(","):
            rows += sections[section]()
    publish_gpu("kernels_write_h100", rows)


if __name__ == "__main__":
    main()
