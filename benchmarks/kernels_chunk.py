"""What a prefill chunk runs besides sparse attention, on one GPU beside its peers in the same run.

``mqa_logits``: a chunk's indexer scores, beside DeepGEMM's (contiguous keys; neither writes beyond a row's length).
``mqa_topk_indices``: scores and selection together, beside DeepGEMM's scores plus SGLang's top-k, as published beside
torch.topk, times what torch.topk takes here. ``dense_mha``: causal attention with expanded keys, beside the fastest of
torch's scaled_dot_product_attention (cuDNN; flash with values padded to the keys' width). ours_us, peer_us, ratio;
``bound`` is the ratio to be reached.

    python -m benchmarks.kernels_chunk [--only logits,dense]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks._gpu import Row, compared, copies, deep_gemm_module, publish_gpu, random_fp8, time_us, times_in_turn
from seamount.kernels.dense_mla import dense_mha
from seamount.kernels.indexer import mqa_topk_indices
from seamount.kernels.layout import CacheLayout
from seamount.kernels.triton.prefill_logits import write_logits

CHUNKS = [(rows, context) for rows in (1024, 4096) for context in (8192, 32768, 131072)]
DENSE = [(2048, 2048, 128), (512, 2048, 128), (512, 512, 128), (128, 128, 128), (2048, 2048, 16)]
HEADS, DIM, TOPK = 64, 128, 2048
LOGITS_BOUND = 1.2
SCALE = 0.13523378
LAYOUT = CacheLayout.create("fp8", kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=DIM, dtype=torch.bfloat16)
# SGLang 0.5.23's topk_v2 for prefill over torch.topk, 4096 rows of 32K scores on one H100: 289.6 / 1735.6 us.
PUBLISHED_TOPK_SHARE = 289.6 / 1735.6


class _Chunk:
    """The last ``num_rows`` tokens of a context, its index keys in shuffled pages and side by side."""

    def __init__(self, num_rows: int, context: int) -> None:
        num_pages = context // 64
        self.q = random_fp8(num_rows, HEADS, DIM)
        self.weights = torch.randn((num_rows, HEADS), device="cuda")
        self.lengths = torch.arange(context - num_rows + 1, context + 1, device="cuda")
        self.keys = random_fp8(context, DIM)
        self.scales = torch.rand(context, device="cuda") + 0.5
        self.pages = torch.randperm(num_pages, device="cuda")
        self.plane = torch.empty((num_pages, LAYOUT.page_bytes("index")), dtype=torch.uint8, device="cuda")
        self.plane[self.pages, : 64 * DIM] = self.keys.view(torch.uint8).view(num_pages, -1)
        self.plane[self.pages, 64 * DIM :] = self.scales.view(num_pages, 64).view(torch.uint8)
        self.starts = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
        self.ends = self.lengths.int()

    def ours(self, out: Tensor) -> Tensor:
        write_logits(self.q, self.plane, self.weights, self.lengths, self.pages, out)
        return out

    def theirs(self, deep_gemm: Any) -> Tensor:
        keys = (self.keys, self.scales)
        out: Tensor = deep_gemm.fp8_mqa_logits(self.q, keys, self.weights, self.starts, self.ends, clean_logits=False)
        return out

    def select(self) -> Tensor:
        return mqa_topk_indices(self.q, self.plane, self.weights, self.lengths, self.pages, LAYOUT, TOPK)


def logits() -> Iterator[Row]:
    for num_rows, context in CHUNKS:
        yield from _scores(num_rows, context)


def _scores(num_rows: int, context: int) -> Iterator[Row]:
    deep_gemm = deep_gemm_module()
    read = context * (DIM + 4) + num_rows * HEADS * DIM
    chunks = [_Chunk(num_rows, context) for _ in range(copies(read))]
    out = torch.empty((num_rows, context), device="cuda")
    seen = int(chunks[0].lengths.sum())
    rates = {"num_bytes": read + 4 * seen, "flop": 2 * HEADS * DIM * seen}
    few = 12 if seen < 1 << 28 else 3
    ways = [[lambda c=c: c.ours(out) for c in chunks], [chunk.select for chunk in chunks]]
    if deep_gemm is not None:
        ways.append([lambda c=c: c.theirs(deep_gemm) for c in chunks])
    ours, both, *rest = times_in_turn(ways, repeats=3, min_launches=few)
    peer = peers = None
    if rest:
        peer = rest[0]
        _check_logits(chunks[0].ours(out), chunks[0].theirs(deep_gemm), chunks[0].lengths)
        if (num_rows, context) == (4096, 32768):
            torch_topk = time_us([lambda: out.topk(TOPK, sorted=False)], min_launches=few)
            peers = peer + PUBLISHED_TOPK_SHARE * torch_topk
    shape = f"{num_rows}x{context}"
    yield compared("mqa_logits", shape, ours, peer, LOGITS_BOUND, **rates)
    yield compared("mqa_topk_indices", f"{shape} k{TOPK}", both, peers, None, **rates)


def _check_logits(ours: Tensor, theirs: Tensor, lengths: Tensor) -> None:
    for row in (0, len(lengths) - 1):
        seen = slice(int(lengths[row]))
        error = float((ours[row, seen] - theirs[row, seen]).norm() / theirs[row, seen].norm())
        if not error < 0.01:
            raise RuntimeError(f"the peer's scores differ by {error:.3f}: nothing comparable was measured")


def dense() -> Iterator[Row]:
    for shape in DENSE:
        yield _plain(*shape)


def _plain(num_rows: int, num_keys: int, heads: int) -> Row:
    inputs = [_dense_inputs(num_rows, num_keys, heads) for _ in range(copies(num_keys * heads * 640))]
    lengths = torch.arange(num_keys - num_rows + 1, num_keys + 1, device="cuda")
    ours = time_us([lambda x=x: dense_mha(*x, lengths, SCALE) for x in inputs], min_launches=8)
    wide = [_side_by_side(*x) for x in inputs]
    peer = min(_sdpa_us(wide, backend) for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION))
    return compared(
        "dense_mha",
        f"{num_rows}x{num_keys} h{heads}",
        ours,
        None if math.isinf(peer) else peer,
        None,
        num_bytes=2 * heads * (num_keys * 256 + num_rows * 320),
        flop=2 * 320 * heads * int(lengths.sum()),
    )


def _dense_inputs(num_rows: int, num_keys: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn((num_rows, heads, 192), device="cuda").bfloat16()
    k, v = torch.randn((num_keys, heads, 256), device="cuda").bfloat16().split(128, 2)
    return q, k, torch.randn((num_keys, 64), device="cuda").bfloat16(), v


def _side_by_side(q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor) -> list[Tensor]:
    """As torch wants them: [1, H, T, D], the rotary part copied to every head's keys, values padded to their width."""
    k = torch.cat((k, k_rope.unsqueeze(1).expand(-1, k.shape[1], -1)), 2)
    return [x.transpose(0, 1).unsqueeze(0) for x in (q, k, pad(v, (0, 64)))]


def _sdpa_us(inputs: list[list[Tensor]], backend: SDPBackend) -> float:
    """Infinite where the backend refuses."""
    num_rows, num_keys = inputs[0][0].shape[2], inputs[0][1].shape[2]
    mask: dict[str, Any] = {"is_causal": True}
    if num_rows != num_keys:
        mask = {"attn_mask": causal_lower_right(num_rows, num_keys)}
    try:
        with sdpa_kernel(backend):
            return time_us(
                [lambda x=x: scaled_dot_product_attention(*x, scale=SCALE, **mask) for x in inputs], min_launches=8
            )
    except RuntimeError:
        return math.inf


def main() -> None:
    sections: dict[str, Callable[[], Iterator[Row]]] = {"logits": logits, "dense": dense}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sections), help="sections, separated by commas")
    only = parser.parse_args().only.split(",")
    if not torch.cuda.is_available():
        print("kernels_chunk: no CUDA device here; nothing measured")
        return
    with torch.inference_mode():
        publish_gpu("kernels_chunk", (row for section in only for row in sections[section]()))


if __name__ == "__main__":
    main()
