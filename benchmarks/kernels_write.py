"""Cache writes, quantisation, the gate and routing on one GPU.

Each fused operation is timed beside the separate launches that do the same (ours_us, peer_us, ratio); ``bound`` is the
ratio to be reached. Times are of captured launches over inputs that rotate through more than twice the L2.

    python -m benchmarks.kernels_write [--only write,gate]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._gpu import Row, compared, copies, publish_gpu, time_us
from seamount.kernels import cache_write, moe
from seamount.kernels.layout import CacheLayout, scatter_slots
from seamount.kernels.norms import layer_norm, rms_norm
from seamount.kernels.quant import quantize
from seamount.kernels.rope import apply_rope_half, apply_rope_interleaved

HIDDEN, RANK, ROPE, INDEX_DIM, INDEX_HEADS, EXPERTS = 7168, 512, 64, 128, 64, 256


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def writes() -> list[Row]:
    """Latent, index key, index query, checksum and quantisation for decode and prefill sizes.

    A checksum's peer is torch's sum of the same words, a quantisation's torch's cast without scales.
    """
    rows: list[Row] = []
    for tokens in (1, 32, 128, 4096):
        for name in ("fp8", "bf16"):
            rows.append(_write_latent(tokens, name))
        rows += [_write_index_key(tokens), _rotate_queries(tokens), _quantize(tokens)]
    for pages in (1, 64, 1024):
        planes = [torch.randint(0, 256, (pages, 656 * 64), device="cuda", dtype=torch.uint8) for _ in range(3)]
        ours = time_us([lambda plane=plane: cache_write.page_checksum(plane) for plane in planes])
        peer = time_us([lambda plane=plane: plane.view(torch.int32).sum(1) for plane in planes])
        rows.append(compared("page_checksum", f"{pages} pages", ours, peer, None, num_bytes=pages * 656 * 64))
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
    return compared("quantize", f"{tokens} x {HIDDEN}", ours, peer, None, num_bytes=tokens * HIDDEN * 3.03)


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
    return compared(kernel, f"{tokens} tokens", ours, peer, 1.0, num_bytes=num_bytes)


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


def main() -> None:
    sections = {"write": writes, "gate": gates}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sections), help="sections, separated by commas")
    if not torch.cuda.is_available():
        print("kernels_write: no CUDA device here; nothing measured")
        return
    rows: list[Row] = []
    with torch.inference_mode():
        for section in parser.parse_args().only.split(","):
            rows += sections[section]()
    publish_gpu("kernels_write", rows)


if __name__ == "__main__":
    main()
