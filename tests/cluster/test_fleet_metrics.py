"""What the fleet's figures say after decisions, starts, failures and drains."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from seamount.cluster.fleet_metrics import FleetMetrics


def fleet() -> tuple[FleetMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return FleetMetrics(registry), registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"seamount_fleet_{name}", labels)


def test_a_change_of_what_is_wanted_is_a_decision_and_the_first_word_is_none() -> None:
    metrics, registry = fleet()
    for count in (2, 2, 3, 5, 1):
        metrics.wanted("decode", count)
    assert value(registry, "decisions_total", pool="decode", direction="up") == 2
    assert value(registry, "decisions_total", pool="decode", direction="down") == 1
    assert value(registry, "wanted_gangs", pool="decode") == 1


def test_a_phase_that_no_gang_is_in_any_more_goes_to_zero() -> None:
    metrics, registry = fleet()
    names = {"pools": ("decode", "prefill"), "phases": ("starting", "ready")}
    metrics.gangs([("decode", "starting"), ("decode", "starting"), ("decode", "ready")], **names)
    assert value(registry, "gangs", pool="decode", phase="starting") == 2
    assert value(registry, "gangs", pool="prefill", phase="ready") == 0
    metrics.gangs([("decode", "ready")] * 3, **names)
    assert value(registry, "gangs", pool="decode", phase="starting") == 0
    assert value(registry, "gangs", pool="decode", phase="ready") == 3


def test_drains_and_starts_are_timed() -> None:
    metrics, registry = fleet()
    metrics.drain_ended("node", "empty", 42.0)
    metrics.gang_started("decode")
    metrics.gang_ready("decode", 150.0)
    metrics.gang_failed("prefill")
    metrics.watch_restarted("nodes", "gone")
    assert value(registry, "drain_seconds_count", cause="node", outcome="empty") == 1
    assert value(registry, "drain_seconds_bucket", cause="node", outcome="empty", le="60.0") == 1
    assert value(registry, "drain_seconds_bucket", cause="node", outcome="empty", le="30.0") == 0
    assert value(registry, "gang_start_seconds_sum", pool="decode") == 150
    assert value(registry, "gang_starts_total", pool="decode") == value(registry, "gang_failures_total", pool="prefill")
    assert value(registry, "watch_restarts_total", resource="nodes", cause="gone") == 1
