import pytest

from seamount.wire.errors import InvalidArgument
from seamount.workers.experts.mapping import ExpertMap


@pytest.mark.parametrize(("num_experts", "size"), [(1, 1), (16, 1), (16, 2), (15, 5), (256, 8)])
def test_every_expert_has_one_owner(num_experts: int, size: int) -> None:
    experts = ExpertMap(num_experts=num_experts, size=size)
    owned = [expert for rank in range(size) for expert in experts.owned(rank)]
    assert owned == list(range(num_experts))
    for rank in range(size):
        assert len(experts.owned(rank)) == experts.num_local == num_experts // size
        assert all(experts.owner(expert) == rank for expert in experts.owned(rank))


@pytest.mark.parametrize(
    ("num_experts", "size", "field"), [(16, 3, "num_experts"), (0, 1, "num_experts"), (4, 0, "size")]
)
def test_uneven_splits_are_refused(num_experts: int, size: int, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ExpertMap(num_experts=num_experts, size=size)
    assert caught.value.field == field


def test_ids_outside_the_map_are_refused() -> None:
    experts = ExpertMap(num_experts=8, size=2)
    for expert in (-1, 8):
        with pytest.raises(InvalidArgument, match="expert"):
            experts.owner(expert)
    for rank in (-1, 2):
        with pytest.raises(InvalidArgument, match="rank"):
            experts.owned(rank)
