"""What a gang is told to cost counts pages that sessions may come back for, and no others."""

from __future__ import annotations

import pytest

from harness.fleet_samples import Clock, gang, rank
from seamount.cluster.fleet_meter import Meter
from seamount.cluster.load import GangLoad
from seamount.cluster.moving import losing_s


def load_of(**state: int) -> GangLoad:
    """Of a gang of one rank with 100 pages."""
    (load,) = Meter(Clock()).gangs([gang(3)], [rank("decode-3-abc.0", **state)])
    return load


@pytest.mark.parametrize(
    "state",
    [
        {"num_free_pages": 60, "num_cached_pages": 40, "num_superseded_pages": 40},
        {"num_free_pages": 100, "num_host_cached_pages": 30, "num_host_superseded_pages": 30},
        {"num_free_pages": 100, "num_disk_cached_pages": 70, "num_disk_superseded_pages": 70},
    ],
    ids=["device", "host", "disk"],
)
def test_superseded_pages_cost_nothing(state: dict[str, int]) -> None:
    assert losing_s(load_of(**state), []) == 0
    wanted = {name: number - ("superseded" in name) for name, number in state.items()}
    assert losing_s(load_of(**wanted), []) == pytest.approx(0.5)  # one page, computed at a speed that is not known


def test_leased_pages_are_wanted_for_certain_and_counted_once() -> None:
    load = load_of(num_free_pages=50, num_cached_pages=40, num_leased_pages=20, num_superseded_pages=5)
    assert (load.num_held_pages, load.num_cached_pages) == (30, 15)
    assert losing_s(load, []) == 30 + 15 / 2
