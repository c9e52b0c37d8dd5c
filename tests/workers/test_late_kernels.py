"""How a variant of a kernel that was made late is told."""

from __future__ import annotations

from typing import Any

from seamount.workers.late_kernels import LateKernels, describe

NAMES = ["x_ptr", "num_rows", "num_blocks", "turns", "BLOCK", "LAYOUT"]


def made(**constants: Any) -> dict[str, Any]:
    """What Triton says of a variant of which these arguments are constants, ``x_ptr`` and ``num_blocks`` divisible."""
    types = {"x_ptr": "*bf16", "num_rows": "i32", "num_blocks": "i32", "turns": "i64"}
    return {
        "signature": {name: "constexpr" if name in constants else types[name] for name in NAMES},
        "constants": {(NAMES.index(name),): value for name, value in constants.items()},
        "configs": [{(0,): [["tt.divisibility", 16]], (1,): [], (2,): [["tt.divisibility", 16]]}],
        "num_warps": 8,
    }


def test_a_variant_is_told_by_what_sets_it_apart() -> None:
    told = describe(NAMES, made(turns=1, BLOCK=64, LAYOUT=object()))
    assert told == "x_ptr:*bf16/16 num_rows:i32 num_blocks:i32/16 turns=1 BLOCK=64 num_warps=8"
    assert describe(NAMES, made(turns=1, BLOCK=None, LAYOUT=True)).endswith("BLOCK=None LAYOUT=True num_warps=8")


def test_a_rank_that_does_not_watch_has_none() -> None:
    assert LateKernels().count == 0
