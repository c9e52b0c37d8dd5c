"""The chart once with each file of values: profiles, and those under ci/."""

from __future__ import annotations

import pytest

from rendered_chart import VALUES, Manifest, rendered


@pytest.fixture(params=sorted(VALUES))
def manifests(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    return rendered(VALUES[request.param])
