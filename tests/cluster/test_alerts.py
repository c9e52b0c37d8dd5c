"""Every metric that docs/operate.md and the chart's rules speak of exists in the code, with those labels."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from seamount.cluster.fleet_metrics import FleetMetrics
from seamount.router.metrics import RouterMetrics, RouterView
from seamount.v1 import worker_pb2
from seamount.wire.metrics import new_registry
from seamount.workers.cache.retention import Tier
from seamount.workers.cache.tier_door import TierCounts
from seamount.workers.engine_counts import FaultCounts
from seamount.workers.metrics import RankMetrics, RankView

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "helm" / "seamount" / "files" / "alerts.yaml"
OPERATE = ROOT / "docs" / "operate.md"
NAME = re.compile(r"\bseamount_(?:router|rank|fleet|build)[a-z_]*")
SELECTOR = re.compile(r"\b(seamount_[a-z_]+)\{([^}]*)\}")
MATCHER = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')


@dataclass(slots=True)
class Known:
    """labels: by the names of samples; values: what a label was seen to be, by (name, label)."""

    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def add(self, family: Metric, labels: tuple[str, ...]) -> None:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "info": ("_info",)}
        for suffix in suffixes.get(family.type, ("",)):
            name = family.name + suffix
            self.labels.setdefault(name, set()).update(labels, {"le"} if suffix == "_bucket" else set())
        for sample in family.samples:
            self.labels.setdefault(sample.name, set()).update(sample.labels)
            for label, value in sample.labels.items():
                self.values.setdefault((sample.name, label), set()).add(value)


async def all_metrics() -> Known:
    """What a router, a rank and the fleet tell, before any event."""
    registry = new_registry()
    router, rank = RouterMetrics(registry), RankMetrics(registry, pool="decode", gang_rank=0)
    FleetMetrics(registry)
    router.follow(lambda: RouterView(num_running_turns=0, num_ranks={"decode": 0, "prefill": 0}, num_rank_deaths=0))
    tiers = {tier: TierCounts(num_evicted=0, num_damaged=0) for tier in Tier}
    faults = FaultCounts(num_preemptions=0, num_failed=0)
    view = RankView(state=worker_pb2.RankState(), faults=faults, tiers=tiers, num_late_kernels=0)
    rank.follow(lambda: view)
    return await read(registry)


async def read(registry: CollectorRegistry) -> Known:
    def collect() -> Known:
        known = Known()
        for collector in list(registry._collector_to_names):
            for family in collector.collect():
                known.add(family, tuple(getattr(collector, "_labelnames", ())))
        return known

    return await asyncio.to_thread(collect)


def rules() -> Iterator[dict[str, object]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from group["rules"]


def test_alerts_are_whole_and_named_once() -> None:
    names = [str(rule["alert"]) for rule in rules()]
    assert len(names) == len(set(names)) > 15
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"] in ({"severity": "warning"}, {"severity": "critical"})
        assert rule["annotations"]["runbook"] == f"docs/operate.md#{str(rule['alert']).lower()}"  # type: ignore[index]
        expr = str(rule["expr"])
        assert expr.count("(") == expr.count(")")


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    headings = re.findall(r"(?m)^### (Seamount\w+)$", OPERATE.read_text())
    assert sorted(headings) == sorted(str(rule["alert"]) for rule in rules())


@pytest.mark.parametrize("text", [ALERTS.read_text(), OPERATE.read_text()], ids=[ALERTS.name, OPERATE.name])
async def test_every_metric_that_is_spoken_of_exists_with_those_labels(text: str) -> None:
    known = await all_metrics()
    mentioned = set(NAME.findall(text))
    assert len(mentioned) > 10
    families = {re.sub(r"_(total|bucket|count|sum|info)$", "", name) for name in known.labels}
    unknown = {name for name in mentioned if name not in known.labels and name not in families}
    assert not unknown
    for name, matchers in SELECTOR.findall(text):
        for label, wanted in MATCHER.findall(matchers):
            assert label in known.labels[name], f"{name} has no label {label}"
            if label in ("le", "tier", "state", "pool") and (name, label) in known.values:
                assert set(wanted.split("|")) <= known.values[name, label] | {"router"}, f"{name}: {label}={wanted}"


async def test_a_name_that_does_not_exist_would_be_found() -> None:
    known = await all_metrics()
    assert "seamount_router_first_token_seconds_bucket" in known.labels
    assert {"pool", "rank", "tier", "state"} == known.labels["seamount_rank_pages"]
    assert "5.0" in known.values["seamount_router_first_token_seconds_bucket", "le"]
    assert "seamount_router_first_tokens_seconds" not in known.labels
