"""Which points a test injects its fault at: all of them in ``make test-faults``, a seeded few in every run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

SEED = 20


def points(name: str, every: Sequence[Any], *, seeded: int, ids: Sequence[str] | None = None) -> Any:
    """``parametrize`` over ``every``; all but ``seeded`` of them are marked ``faults``. ``name``: of the parameters."""
    chosen = set(random.Random(f"{SEED}/{name}/{len(every)}").sample(range(len(every)), seeded))
    return pytest.mark.parametrize(
        name,
        [
            pytest.param(
                *(point if isinstance(point, tuple) else (point,)),
                marks=() if index in chosen else pytest.mark.faults,
                id=ids[index] if ids is not None else None,
            )
            for index, point in enumerate(every)
        ],
    )


def sample(every: Sequence[Any], number: int) -> list[Any]:
    """So many of them, in order, the same in each run."""
    return sorted(random.Random(f"{SEED}/{len(every)}").sample(list(every), number))
