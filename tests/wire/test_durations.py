"""Seconds to protobuf and back, on both sides of zero."""

from __future__ import annotations

import pytest

from seamount.wire.durations import duration


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 0.25, 1.0, 59.75, 86400.5, -0.5, -1.25])
def test_there_and_back(seconds: float) -> None:
    assert duration(seconds).ToTimedelta().total_seconds() == pytest.approx(seconds, abs=1e-6)
