"""Which rank of a gang holds which routed experts."""

from __future__ import annotations

from dataclasses import dataclass

from seamount.wire.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMap:
    """Contiguous, even split of ``num_experts`` routed experts over the ``size`` ranks of a gang.

    Example: 8 experts over 2 ranks: rank 0 owns 0..3, rank 1 owns 4..7.
    Raises ``InvalidArgument`` if either count is below 1 or the experts do not divide evenly.
    """

    num_experts: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidArgument(f"size is {self.size}; a gang has at least 1 rank", field="size")
        if self.num_experts < 1 or self.num_experts % self.size:
            raise InvalidArgument(
                f"num_experts is {self.num_experts}; it must be a positive multiple of the gang's {self.size} ranks: "
                "choose an expert_parallel that divides it",
                field="num_experts",
                metadata={"num_experts": str(self.num_experts), "size": str(self.size)},
            )

    @property
    def num_local(self) -> int:
        """Experts held by each rank."""
        return self.num_experts // self.size

    def owner(self, expert: int) -> int:
        """The rank that holds a global expert id. Raises ``InvalidArgument`` for an id outside [0, num_experts)."""
        if not 0 <= expert < self.num_experts:
            raise InvalidArgument(f"expert is {expert}; it must be in [0, {self.num_experts})", field="expert")
        return expert // self.num_local

    def owned(self, rank: int) -> range:
        """Global ids of the experts that a rank holds. Raises ``InvalidArgument`` for a rank outside [0, size)."""
        if not 0 <= rank < self.size:
            raise InvalidArgument(f"rank is {rank}; it must be in [0, {self.size})", field="rank")
        return range(rank * self.num_local, (rank + 1) * self.num_local)
