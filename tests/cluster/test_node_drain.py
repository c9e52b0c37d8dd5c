from __future__ import annotations

import json
import secrets
from dataclasses import asdict

import pytest

from seamount.cluster.fleet_state import connect
from seamount.cluster.node_drain import KEPT_S, DrainPhase, DrainRequests, DrainStatus
from seamount.wire.errors import InvalidArgument


@pytest.fixture
def drains(redis_url: str) -> DrainRequests:
    return DrainRequests(connect(redis_url, timeout_s=1.0), f"test-{secrets.token_hex(4)}")


def test_a_request_stands_until_a_fleet_tells_of_it(drains: DrainRequests) -> None:
    assert drains.drain_status("node-a") is None
    drains.request_drain("node-a", deadline_s=60.0, cause="maintenance")
    asked = drains.drain_status("node-a")
    assert asked is not None
    assert (asked.phase, asked.node_id) == (DrainPhase.ASKED, "")
    assert 55.0 < asked.remaining_s <= 60.0
    assert [(one.node, one.cause) for one in drains.requests()] == [("node-a", "maintenance")]

    told = DrainStatus(node="node-a", phase=DrainPhase.DRAINING, node_id="ab12", gangs=("decode-3",), detail="moving")
    drains.tell(told)
    seen = drains.drain_status("node-a")
    assert seen is not None
    assert (seen.phase, seen.node_id, seen.gangs, seen.detail) == (DrainPhase.DRAINING, "ab12", ("decode-3",), "moving")
    drains.cancel_drain("node-a")
    drains.cancel_drain("node-a")
    assert drains.drain_status("node-a") is None
    assert drains.requests() == []


def test_asked_again_the_earlier_deadline_holds(drains: DrainRequests) -> None:
    for deadline_s in (60.0, 20.0, 500.0):
        drains.request_drain("10.0.0.7", deadline_s=deadline_s)
    status = drains.drain_status("10.0.0.7")
    assert status is not None
    assert status.remaining_s <= 20.0


def test_a_request_of_a_release_that_says_more_is_understood(drains: DrainRequests, redis_url: str) -> None:
    drains.request_drain("node-a", deadline_s=60.0, cause="maintenance")
    (asked,) = drains.requests()
    client = connect(redis_url, timeout_s=1.0)
    (key,) = [key for key in client.keys("*drains:asked") if client.hexists(key, "node-a")]
    client.hset(key, "node-a", json.dumps({**asdict(asked), "priority": "high"}))
    assert drains.requests() == [asked]


def test_old_requests_go(drains: DrainRequests, monkeypatch: pytest.MonkeyPatch) -> None:
    drains.request_drain("node-a", deadline_s=10.0)
    later = drains.now() + 10.0 + KEPT_S
    monkeypatch.setattr(drains, "now", lambda: later - 5.0)
    assert len(drains.requests()) == 1
    monkeypatch.setattr(drains, "now", lambda: later + 5.0)
    assert drains.requests() == []


@pytest.mark.parametrize(
    ("node", "deadline_s", "field"),
    [("", 5.0, "node"), ("n" * 254, 5.0, "node"), ("a", 0.0, "deadline"), ("a", 86_401.0, "deadline")],
)
def test_what_cannot_be_asked_for(drains: DrainRequests, node: str, deadline_s: float, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        drains.request_drain(node, deadline_s=deadline_s)
    assert refused.value.field == field
