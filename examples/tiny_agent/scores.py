"""Shares with their uncertainty, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Share:
    """``successes`` of ``total``, with Wilson's 95 % interval; all shares are 0 where nothing was tried."""

    successes: int
    total: int

    @property
    def value(self) -> float:
        return self.successes / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)  (Wilson 1927)."""
        if not self.total:
            return 0.0, 1.0
        n, p, z = self.total, self.value, _Z95
        centre = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two models on the same tasks. only_first, only_second: tasks that one of them did and the other did not."""

    only_first: int
    only_second: int
    total: int

    @property
    def difference(self) -> float:
        """The first model's share minus the second's."""
        return (self.only_first - self.only_second) / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, normal approximation for a paired difference."""
        if not self.total:
            return -1.0, 1.0
        b, c, n = self.only_first, self.only_second, self.total
        spread = _Z95 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
        return self.difference - spread, self.difference + spread

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how often a fair coin splits the tasks that differ at least so unevenly."""
        differing, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        tail = sum(math.comb(differing, i) for i in range(fewer + 1))
        return min(1.0, float(2 * tail / 2**differing))


def share(successes: Sequence[bool]) -> Share:
    return Share(sum(successes), len(successes))


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Of outcomes of the same tasks in the same order."""
    pairs = list(zip(first, second, strict=True))
    return Paired(
        only_first=sum(one and not other for one, other in pairs),
        only_second=sum(other and not one for one, other in pairs),
        total=len(pairs),
    )
