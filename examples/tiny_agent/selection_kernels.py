"""Triton kernel of ``indexing.selection_mask``: lists of selected tokens to bits and blocks."""

import triton
import triton.language as tl

from examples.tiny_agent.attention import BLOCK

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)


@triton.jit
def selected_bits(picked, words, blocks, length, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """One row: picked [B, T, COUNT] int64, -1 for none; words [B, T / 32, T] int32 and blocks
    [B, T / 128, T / 128] int8, both zeroed; WIDTH: the least power of two that is not below COUNT.

    The words of neighbouring rows are neighbours, as attention reads them; 8 rows share each memory sector.
    """
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    key = tl.load(picked + (batch * length + row) * COUNT + at, mask=at < COUNT, other=-1).to(tl.int32)
    chosen = key >= 0
    word = (batch * (length // 32) + key // 32) * length + row
    tl.atomic_or(words + word, 1 << (key % 32), mask=chosen, sem="relaxed")
    edge = length // _BLOCK
    tl.store(blocks + (batch * edge + row // _BLOCK) * edge + key // _BLOCK, 1, mask=chosen)
