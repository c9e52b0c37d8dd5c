"""Every operation once on small, awkward shapes, beside the CPU's result: what ``make memcheck-gpu`` checks.

Few launches each, so that a memory checker ends in minutes; values are tested in the other files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels import cache_write, dense_mla, gemm, indexer, moe, norms, quant, rope, sparse_mla, topk
from seamount.kernels.layout import PAGE_SIZE, CacheLayout, pack_index_key, pack_latent, scatter_slots

pytestmark = pytest.mark.gpu

PAGES = 5
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def layout(name: str = "fp8") -> CacheLayout:
    return CacheLayout.create(name, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, dtype=torch.bfloat16)


def latent_plane(name: str) -> Tensor:
    tokens = PAGES * PAGE_SIZE
    return pack_latent(torch.randn(tokens, 512), torch.randn(tokens, 64), layout(name)).view(PAGES, -1)


def index_plane() -> Tensor:
    planes = layout().allocate(1, PAGES)
    keys = pack_index_key(torch.randn(PAGES * PAGE_SIZE, 128), layout())
    scatter_slots(planes.index[0], torch.arange(PAGES * PAGE_SIZE), keys, layout(), "index")
    return planes.index[0]


def attention(name: str, heads: int) -> list[Call]:
    q = torch.randn(3, heads, 576).bfloat16().float()
    plane, scale = latent_plane(name), 576**-0.5
    slots = torch.stack([torch.randperm(PAGES * PAGE_SIZE)[:67] for _ in range(3)])
    slots[1, 40:] = -1
    slots[2] = -1
    every, lengths = torch.randperm(PAGES * PAGE_SIZE)[:131], torch.tensor([1, 131, 64])
    # Most of a short context: where it is fp8, all of it is unpacked first.
    most = torch.stack([torch.randperm(67) for _ in range(3)])
    most[1, 40:] = -1
    return [
        (sparse_mla.sparse_mla_prefill, (q, plane, every[:67], most, layout(name), scale)),
        (sparse_mla.sparse_mla_decode, (q, plane, slots, layout(name), scale)),
        (sparse_mla.sparse_mla_prefill, (q, plane, torch.randperm(PAGES * PAGE_SIZE), slots, layout(name), scale)),
        (dense_mla.dense_mla, (q, plane, every, lengths, layout(name), scale)),
    ]


def plain_attention() -> list[Call]:
    calls: list[Call] = []
    # The sizes that have a kernel of their own on Hopper, and others.
    for nope, rope_dim, value in ((128, 64, 128), (32, 16, 64)):
        q, k, v = (
            torch.randn(rows, 3, dim).bfloat16() for rows, dim in ((5, nope + rope_dim), (67, nope), (67, value))
        )
        lengths = torch.tensor([1, 63, 64, 65, 67])
        calls.append((dense_mla.dense_mha, (q, k, torch.randn(67, rope_dim).bfloat16(), v, lengths, 0.1)))
    return calls


def scores() -> list[Call]:
    q = torch.randn(3, 64, 128).to(torch.float8_e4m3fn).float()
    weights, plane = torch.randn(3, 64), index_plane()
    lengths, tables = torch.tensor([1, 130, 64]), torch.tensor([[4, 0, 2], [1, 3, 0], [2, 2, 2]])
    two = (torch.stack((q, q.flip(0)), 1), plane, torch.stack((weights, weights.flip(0)), 1))
    both_lengths = torch.stack((lengths - 1, lengths), 1)
    return [
        (indexer.paged_mqa_logits, (*two, both_lengths, tables, layout())),
        (indexer.paged_topk_indices, (*two, both_lengths, tables, layout(), 130)),
        (indexer.mqa_topk_indices, (q, plane, weights, lengths, tables[1], layout(), 130)),
        (indexer.paged_mqa_logits, (q, plane, weights, lengths, tables, layout())),
        (
            indexer.paged_mqa_logits,
            (q[:, None], plane, weights[:, None], lengths[:, None].contiguous(), tables, layout()),
        ),
        (indexer.paged_topk_indices, (q, plane, weights, lengths, tables, layout(), 66)),
        (indexer.paged_topk_indices, (q, plane, weights, lengths * 64, tables.repeat(1, 44), layout(), 2048)),
        (indexer.mqa_logits, (q, plane, weights, lengths, tables[1], layout())),
    ]


def selection() -> list[Call]:
    calls: list[Call] = []
    for rows, width, k in ((3, 70, 8), (2, 4097, 2048), (1, 33000, 2048), (2, 70001, 2048), (270, 9000, 512)):
        lengths = torch.full((rows,), width)
        lengths[1:3] = torch.tensor([5, 0])[: rows - 1]
        calls.append((topk.topk_indices, (torch.randn(rows, width), k, lengths)))
    # More equal scores than any list of candidates holds.
    return [*calls, (topk.topk_indices, (torch.zeros(1, 33000), 2048, torch.tensor([33000])))]


def writes() -> list[Call]:
    angles = torch.rand(3, 32) * 100
    cos, sin, slots = angles.cos(), angles.sin(), torch.tensor([0, PAGES * PAGE_SIZE - 1, 65])
    latent, key = torch.randn(3, 576).bfloat16(), torch.randn(3, 128).bfloat16()
    weight, bias, norm = torch.rand(128), torch.rand(128), torch.rand(512).bfloat16()

    def write_latent(name: str) -> Callable[..., Tensor]:
        def write(plane: Tensor, *arguments: Tensor) -> Tensor:
            slots, latent, norm, cos, sin = arguments
            cache_write.write_latent(plane, slots, latent[:, :512], latent[:, 512:], norm, 1e-6, cos, sin, layout(name))
            return plane

        return write

    def write_key(plane: Tensor, *arguments: Tensor) -> Tensor:
        slots, key, weight, bias, cos, sin = arguments
        cache_write.write_index_key(plane, slots, key, weight, bias, 1e-6, cos, sin, layout())
        return plane

    empty = {name: layout(name).allocate(1, PAGES) for name in ("fp8", "bf16")}
    calls: list[Call] = [
        (write_latent(name), (planes.latent[0], slots, latent, norm, cos, sin)) for name, planes in empty.items()
    ]
    return [
        *calls,
        (write_key, (empty["fp8"].index[0], slots, key, weight, bias, cos, sin)),
        (cache_write.rotate_index_vectors, (torch.randn(3, 5, 128), cos, sin)),
        (cache_write.rotate_quantize_index_vectors, (torch.randn(3, 5, 128), cos, sin)),
        (cache_write.page_checksum, (torch.randint(0, 256, (9, 1028), dtype=torch.uint8),)),
    ]


def elementwise() -> list[Call]:
    x, angles = torch.randn(5, 1000), torch.rand(5, 32)
    return [
        (quant.quantize, (torch.randn(5, 384),)),
        (norms.rms_norm, (x, torch.rand(1000), 1e-6)),
        (norms.layer_norm, (x, torch.rand(1000), torch.rand(1000), 1e-6)),
        (rope.apply_rope_interleaved, (torch.randn(5, 3, 64), angles.cos(), angles.sin())),
        (rope.apply_rope_half, (torch.randn(5, 3, 64), angles.cos(), angles.sin())),
    ]


def routing() -> list[Call]:
    x, weight, bias = torch.randn(33, 640), torch.randn(32, 640) * 0.03, torch.randn(32)
    ids = torch.randint(-1, 32, (33, 4))

    def gate(*arguments: Tensor) -> Any:
        return moe.gate(*arguments, num_groups=8, num_chosen_groups=4, num_chosen=4, normalize=True, scale=2.5)

    def there_and_back(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = moe.group_by_expert(ids, 31)
        return moe.combine(moe.permute(x, order), order, weights, x)

    def quantised(x: Tensor, ids: Tensor) -> Tensor:
        order = moe.group_by_expert(ids, 31)
        filled = int(order.offsets[-1])
        return quant.dequantize(*(part[:filled] for part in moe.permute_quantize(x, order)))

    return [
        (gate, (x, weight, bias)),
        (there_and_back, (x, ids, torch.rand(33, 4))),
        (quantised, (x, ids)),
    ]


def products() -> list[Call]:
    calls: list[Call] = []
    few = ((1, 576, 384), (2, 130, 2176), (33, 130, 640), (40, 2304, 4096))
    shapes = (*few, (65, 576, 256), (130, 512, 512), (300, 256, 512))
    for rows, columns, channels in shapes:
        x, weight = torch.randn(rows, channels), torch.randn(columns, channels)
        calls.append((gemm.fp8_gemm, (*quant.quantize(x), *quant.quantize_blocks(weight))))
    for counts in ([3, 0, 40, 1], [200, 129, 0, 70]):
        weight = torch.randn(4, 512, 256).to(torch.float8_e4m3fn)
        scale, offsets = torch.rand(4, 4, 2) + 0.5, torch.tensor([0, *counts]).cumsum(0).int()
        x, x_scale = quant.quantize(torch.randn(sum(counts), 256))
        slab = max(counts) + 3
        slabs, slab_scales = quant.quantize(torch.randn(4, slab, 256))
        filled = torch.tensor(counts).int()

        def masked(*arguments: Tensor) -> Tensor:
            out = gemm.grouped_fp8_gemm_masked(*arguments)
            return torch.cat([part[:count] for part, count in zip(out, arguments[-1].tolist(), strict=True)])

        calls += [
            (gemm.grouped_fp8_gemm, (x, x_scale, weight, scale, offsets)),
            (masked, (slabs, slab_scales, weight, scale, filled)),
            (gemm.grouped_fp8_gemm_swiglu, (x, x_scale, weight, scale, offsets)),
        ]
    return [*calls, (gemm.swiglu_quantize, (torch.randn(3, 512),))]


OPERATIONS = {
    "attention fp8 128": lambda: attention("fp8", 128),
    "attention fp8 16": lambda: attention("fp8", 16),
    "attention bf16 64": lambda: attention("bf16", 64),
    "plain attention": plain_attention,
    "scores": scores,
    "selection": selection,
    "writes": writes,
    "elementwise": elementwise,
    "routing": routing,
    "products": products,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, device: torch.device) -> None:
    for function, arguments in OPERATIONS[name]():
        on_gpu = [at.to(device) if isinstance(at, Tensor) else at for at in arguments]
        actual = flat(function(*on_gpu))
        torch.cuda.synchronize()
        expected = flat(function(*arguments))
        for got, wanted in zip(actual, expected, strict=True):
            assert got.shape == wanted.shape
            same = (got.cpu().double() - wanted.double()).abs() <= 0.05 * wanted.double().abs() + 0.05
            same |= got.cpu().double() == wanted.double()
            assert same.double().mean() > 0.98, getattr(function, "__name__", function)


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
