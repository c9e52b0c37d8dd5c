"""What a deployment knows of its tools' times: the estimate, and what Redis keeps of it."""

from __future__ import annotations

import pytest

from seamount.router import tool_waits
from seamount.router.store import Store
from seamount.router.tool_waits import DEFAULT_WAIT_S, NUM_BUCKETS, ToolWaits, bucket_of, quantile_s
from seamount.wire import limits
from seamount.wire.ids import TenantId

ALICE, BOB = TenantId("al/ice"), TenantId("bob")


@pytest.mark.parametrize(
    ("wait_s", "bucket"),
    [(-3.0, 0), (0.0, 0), (0.25, 0), (0.26, 1), (0.5, 1), (0.51, 2), (1.0, 2), (60.0, 8), (4096.0, 14), (1e9, 14)],
)
def test_buckets_double(wait_s: float, bucket: int) -> None:
    assert bucket_of(wait_s) == bucket


def counts(**by_bucket: int) -> list[int]:
    return [by_bucket.get(f"b{index}", 0) for index in range(NUM_BUCKETS)]


@pytest.mark.parametrize(
    ("histogram", "wait_s"),
    [
        (counts(), None),
        (counts(b3=2), None),
        (counts(b3=3), 2.0),
        (counts(b0=9, b5=1), 0.25),
        (counts(b0=8, b5=2), 8.0),
        (counts(b14=5), limits.MAX_TOOL_WAIT_S),
    ],
)
def test_nine_of_ten_waits_are_shorter(histogram: list[int], wait_s: float | None) -> None:
    assert quantile_s(histogram) == wait_s


async def test_waits_are_counted_by_tenant_and_tool(store: Store) -> None:
    waits = ToolWaits(store)
    assert await waits.expected_s(ALICE, ["f"]) == DEFAULT_WAIT_S
    for _ in range(3):
        await waits.note(ALICE, ["f", "f"], 3.0)
        await waits.note(ALICE, ["g"], 100.0)
    assert await waits.expected_s(ALICE, ["f"]) == 4.0
    assert await waits.expected_s(ALICE, ["f", "g"]) == 128.0, "the slowest is waited for"
    assert await waits.expected_s(ALICE, ["f", "new"]) == DEFAULT_WAIT_S
    assert await waits.expected_s(BOB, ["f"]) == DEFAULT_WAIT_S
    assert await waits.expected_s(ALICE, []) == DEFAULT_WAIT_S


async def test_old_waits_fade(store: Store) -> None:
    waits = ToolWaits(store)
    for _ in range(300):
        await waits.note(ALICE, ["f"], 1000.0)
    for _ in range(250):
        await waits.note(ALICE, ["f"], 1.0)
    assert await waits.expected_s(ALICE, ["f"]) == 1.0


async def test_what_is_kept_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_waits, "MAX_TOOLS", 4)
    waits = ToolWaits(store)
    for _ in range(5):
        await waits.note(ALICE, ["often"], 1.0)
    for index in range(20):
        await waits.note(ALICE, [f"once{index}"], 1.0)
    await waits.note(ALICE, ["é" * limits.MAX_NAME_BYTES], 1.0)
    kept = await store.command("HKEYS", store.key("tool_waits", "al%2Fice"))
    assert len(kept) == 4
    assert {b"often", b"once19"} <= set(kept)
    assert 0 < await store.command("TTL", store.key("tool_waits", "al%2Fice")) <= tool_waits.KEPT_S
    assert await waits.expected_s(ALICE, ["é" * limits.MAX_NAME_BYTES]) == DEFAULT_WAIT_S
