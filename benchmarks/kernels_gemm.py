"""FP8 products on one GPU beside DeepGEMM in the same run: plain, grouped by expert, and with SwiGLU between.

ours_us, peer_us, ratio; ``bound`` is the ratio to be reached: 1.15 where a product waits for its weights, up to 128
tokens. DeepGEMM is measured where its wheel is importable, its scales laid out as it wants them beforehand, with and
without programmatic dependent launch, whichever is faster; a SwiGLU form's peer is our own product followed by
``swiglu_quantize``. Times are of captured launches over weights that rotate through more than twice the L2, ours and
theirs in turn. Everything is compiled first, in several processes: DeepGEMM takes seconds for a shape.

    python -m benchmarks.kernels_gemm [--only gemm,grouped] [--warm 16]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import (
    Row,
    compared,
    compile_ahead,
    copies,
    deep_gemm_module,
    publish_gpu,
    random_fp8,
    times_in_turn,
)
from seamount.kernels import gemm, moe

INTERMEDIATE, CHOICES = 2048, 8
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
TOKENS = (1, 32, 64, 128, 256, 1024, 4096)
GROUPED = {(32, 4096, 7168): (32, 128, 1024), (32, 7168, 2048): (32, 128, 1024)} | {
    (256, 4096, 7168): (64,),
    (256, 7168, 2048): (64,),
}
"""(experts, columns, channels): tokens, each with 8 choices."""
BOUND = 1.15
_BOUND_TOKENS = 128


def products(names: Iterable[str] = tuple(WEIGHTS), all_tokens: Iterable[int] = TOKENS) -> Iterator[Row]:
    """``fp8_gemm`` over the model's weights."""
    for name in names:
        columns, channels = WEIGHTS[name]
        weights = [random_fp8(columns, channels) for _ in range(copies(columns * channels))]
        scale = _scales(-(-columns // 128), channels // 128)
        for tokens in all_tokens:
            yield _product(name, weights, scale, tokens)


def _product(name: str, weights: list[Tensor], scale: Tensor, tokens: int) -> Row:
    columns, channels = weights[0].shape
    x, x_scale = random_fp8(tokens, channels), _scales(tokens, channels // 128)
    ways = [[lambda w=w: gemm.fp8_gemm(x, x_scale, w, scale) for w in weights]]
    if (deep_gemm := deep_gemm_module()) is not None:
        aligned, out = deep_gemm.get_mn_major_tma_aligned_tensor(x_scale), _bfloat16(tokens, columns)

        def theirs(w: Tensor, early: bool) -> None:
            deep_gemm.set_pdl(early)
            deep_gemm.fp8_gemm_nt((x, aligned), (w, scale), out, compiled_dims="nk", disable_ue8m0_cast=True)

        # With programmatic dependent launch, which our kernels use and which it leaves off unless told, and without.
        ways += [[lambda w=w, early=early: theirs(w, early) for w in weights] for early in (True, False)]
    ours, *others = times_in_turn(ways)
    if others:
        _check(gemm.fp8_gemm(x, x_scale, weights[-1], scale), out)
    peer = min(others, default=None)
    return compared(
        "fp8_gemm",
        f"{name} {tokens}x{columns}x{channels}",
        ours,
        peer,
        BOUND if tokens <= _BOUND_TOKENS else None,
        num_bytes=columns * channels + tokens * (channels + 2 * columns),
        flop=2 * tokens * columns * channels,
    )


def grouped(
    shapes: Iterable[tuple[int, int, int]] = tuple(GROUPED), all_tokens: Iterable[int] | None = None
) -> Iterator[Row]:
    """Grouped products in both forms, and the SwiGLU form against the product followed by ``swiglu_quantize``."""
    for shape in shapes:
        experts, columns, channels = shape
        weight, scale = random_fp8(*shape), _scales(experts, columns // 128, channels // 128)
        for tokens in all_tokens or GROUPED[shape]:
            yield from _Grouped(weight, scale, tokens).rows()


class _Grouped:
    """One weight of many experts and the choices of some tokens, drawn evenly."""

    def __init__(self, weight: Tensor, scale: Tensor, tokens: int) -> None:
        self.weight, self.scale, self.tokens = weight, scale, tokens
        self.experts, self.columns, self.channels = weight.shape
        ids = torch.randint(0, self.experts, (tokens, CHOICES), device="cuda")
        self.offsets = moe.group_by_expert(ids, self.experts).offsets
        self.counts = self.offsets.diff()

    def rows(self) -> Iterator[Row]:
        yield self._row("grouped_fp8_gemm contiguous", *self._contiguous())
        yield self._row("grouped_fp8_gemm masked", *self._masked())
        if self.columns == 2 * INTERMEDIATE:
            yield self._row("grouped_fp8_gemm_swiglu", *self._swiglu())

    def _row(self, kernel: str, ours: float, peer: float | None) -> Row:
        rows = self.tokens * CHOICES
        active = int((self.counts > 0).sum())
        shape = f"{self.experts} experts, {self.tokens} tokens x {CHOICES}, {self.columns}x{self.channels}"
        bound = 1.0 if "swiglu" in kernel else BOUND if self.tokens <= _BOUND_TOKENS else None
        num_bytes = active * self.columns * self.channels + rows * (self.channels + 2 * self.columns)
        flop = 2 * rows * self.columns * self.channels
        return compared(kernel, shape, ours, peer, bound, num_bytes=num_bytes, flop=flop)

    def _contiguous(self) -> tuple[float, float | None]:
        x, x_scale = self._activations(self.tokens * CHOICES)

        def ours() -> Any:
            return gemm.grouped_fp8_gemm(x, x_scale, self.weight, self.scale, self.offsets)

        deep_gemm = deep_gemm_module()
        if deep_gemm is None:
            return _in_turn(ours)
        # Its groups begin at multiples of 128 rows, and each row names its expert, -1 for padding.
        padded = (self.counts + 127) // 128 * 128
        group = torch.full((int(padded.sum()),), -1, dtype=torch.int32, device="cuda")
        starts = (padded.cumsum(0) - padded).tolist()
        for expert, (start, count) in enumerate(zip(starts, self.counts.tolist(), strict=True)):
            group[start : start + count] = expert
        wide, wide_scale = self._activations(len(group))
        aligned, out = deep_gemm.get_mn_major_tma_aligned_tensor(wide_scale), _bfloat16(len(group), self.columns)
        return _in_turn(
            ours,
            lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                (wide, aligned), (self.weight, self.scale), out, group, disable_ue8m0_cast=True
            ),
        )

    def _masked(self) -> tuple[float, float | None]:
        slab = -(-int(self.counts.max()) // 128) * 128
        x, x_scale = self._activations(self.experts, slab)

        def ours() -> Any:
            return gemm.grouped_fp8_gemm_masked(x, x_scale, self.weight, self.scale, self.counts)

        deep_gemm = deep_gemm_module()
        if deep_gemm is None:
            return _in_turn(ours)
        aligned = deep_gemm.get_mn_major_tma_aligned_tensor(x_scale)
        out = _bfloat16(self.experts, slab, self.columns)
        mean = max(1, -(-self.tokens * CHOICES // self.experts))
        return _in_turn(
            ours,
            lambda: deep_gemm.fp8_m_grouped_gemm_nt_masked(
                (x, aligned), (self.weight, self.scale), out, self.counts, mean, disable_ue8m0_cast=True
            ),
        )

    def _swiglu(self) -> tuple[float, float | None]:
        x, x_scale = self._activations(self.tokens * CHOICES)
        operands = (x, x_scale, self.weight, self.scale, self.offsets)
        return _in_turn(
            lambda: gemm.grouped_fp8_gemm_swiglu(*operands),
            lambda: gemm.swiglu_quantize(gemm.grouped_fp8_gemm(*operands)),
        )

    def _activations(self, *rows: int) -> tuple[Tensor, Tensor]:
        return random_fp8(*rows, self.channels), _scales(*rows, self.channels // 128)


def _in_turn(*ways: Callable[[], Any]) -> tuple[float, float | None]:
    """Ours and the peer's, if there is one. The experts' weights exceed the L2 by far: nothing needs to rotate."""
    ours, *others = times_in_turn([[launch] for launch in ways], min_launches=8)
    return ours, others[0] if others else None


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") * 0.02 + 0.01


def _bfloat16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


def _check(ours: Tensor, theirs: Tensor) -> None:
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    if not error < 0.01:
        raise RuntimeError(f"the peer's product differs by {error:.3f}: nothing comparable was measured")


SECTIONS: dict[str, Callable[..., Iterator[Row]]] = {"gemm": products, "grouped": grouped}


def _run(section: str, what: Any, tokens: int) -> None:
    with torch.inference_mode():
        for _ in SECTIONS[section]([what], [tokens]):
            pass


def _compile(only: list[str], processes: int) -> None:
    shapes: dict[str, list[tuple[Any, int]]] = {
        "gemm": [(name, tokens) for name in WEIGHTS for tokens in TOKENS],
        "grouped": [(shape, tokens) for shape in GROUPED for tokens in GROUPED[shape]],
    }
    compile_ahead([partial(_run, section, *shape) for section in only for shape in shapes[section]], processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument(
        "--warm", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile first; 0: compile as met"
    )
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if not torch.cuda.is_available():
        print("kernels_gemm: no CUDA device here; nothing measured")
        return
    if arguments.warm:
        _compile(only, arguments.warm)
    with torch.inference_mode():
        publish_gpu("kernels_gemm", (row for section in only for row in SECTIONS[section]()))


if __name__ == "__main__":
    main()
