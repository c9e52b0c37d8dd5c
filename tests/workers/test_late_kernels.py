"""How a variant of a kernel that was made late is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from seamount.workers.late_kernels import LateKernels, describe

TYPES = {"x_ptr": "*bf16", "num_rows": "i32", "num_blocks": "i32", "turns": "i64", "BLOCK": "i32", "LAYOUT": "i32"}


def source(**constants: Any) -> SimpleNamespace:
    """Triton's of a variant of which these arguments are constants, ``x_ptr`` and ``num_blocks`` divisible."""
    names = list(TYPES)
    return SimpleNamespace(
        signature={name: "constexpr" if name in constants else kind for name, kind in TYPES.items()},
        constants={(names.index(name),): value for name, value in constants.items()},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [], (2,): [["tt.divisibility", 16]]},
    )


def test_a_variant_is_told_by_what_sets_it_apart() -> None:
    told = describe(source(turns=1, BLOCK=64, LAYOUT=object()), 8)
    assert told == "x_ptr:*bf16/16 num_rows:i32 num_blocks:i32/16 turns=1 BLOCK=64 num_warps=8"
    assert describe(source(turns=1, BLOCK=None, LAYOUT=True), 4).endswith("BLOCK=None LAYOUT=True num_warps=4")


def test_a_rank_that_does_not_watch_has_none() -> None:
    assert LateKernels().count == 0
