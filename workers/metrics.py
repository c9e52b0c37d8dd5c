"""What a rank tells Prometheus: its steps as they end, everything else as it stands when it is scraped.

A token costs nothing here: a step is one observation, and counts are read where the engine and the caches keep them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from seamount.v1 import worker_pb2
from seamount.wire.metrics import SHORT_BUCKETS, LoopCollector
from seamount.workers.cache.retention import Tier
from seamount.workers.cache.tier_door import TierCounts
from seamount.workers.engine_counts import FaultCounts, StepKind

_Values = dict[tuple[str, ...], float]
"""By the values of the labels beside pool and rank."""
_GAUGES = (
    ("queued_prefill_tokens", "num_queued_prefill_tokens", "Prompt tokens still to compute"),
    ("reservations", "num_reservations", "Reservations in force"),
    ("prefill_tokens_per_second", "prefill_tokens_per_s", "Speed of recent steps that only computed prompts"),
    ("answer_seconds", "answer_s", "Smoothed time of an answer from its first step to its end"),
    ("healthy", "healthy", "1 while the engine's loop answers"),
    ("draining", "draining", "1 while the rank takes no new work"),
)
_COUNTERS = (
    ("steps", "num_steps", "Steps of the gang that this rank took part in"),
    ("computed_tokens", "num_computed_tokens", "Prompt tokens computed, recomputation included"),
    ("sampled_tokens", "num_sampled_tokens", "Tokens sampled"),
    ("prepared_tokens", "num_prepared_tokens", "Tokens computed ahead of a question"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """A rank as of now. tiers: evictions and damage of each tier since the start; num_late_kernels: made since it was
    warm."""

    state: worker_pb2.RankState
    faults: FaultCounts
    tiers: Mapping[Tier, TierCounts]
    num_late_kernels: int


class RankMetrics:
    """Of one rank. Every series has its pool and its place in the gang; ``read`` is called on the event loop."""

    def __init__(self, registry: CollectorRegistry, *, pool: str, gang_rank: int) -> None:
        self._registry = registry
        self._of_rank = (pool, str(gang_rank))
        steps = Histogram(
            "seamount_rank_step_seconds",
            "A step from its schedule to its tokens, by what this rank computed in it",
            ["pool", "rank", "kind"],
            buckets=SHORT_BUCKETS,
            registry=registry,
        )
        self._steps = {kind: steps.labels(*self._of_rank, kind.value) for kind in StepKind}

    def step(self, kind: StepKind, took_s: float) -> None:
        """A step has ended; on the engine's thread."""
        self._steps[kind].observe(took_s)

    def follow(self, read: Callable[[], RankView]) -> None:
        """Tell from now on what ``read`` says at each scrape. Called on the event loop that it belongs to."""
        loop = asyncio.get_running_loop()
        self._registry.register(LoopCollector(loop, lambda: self._families(read())))

    def _families(self, view: RankView) -> Iterable[Metric]:
        state = view.state
        for name, field, text in _GAUGES:
            yield self._gauge(name, text, {(): float(getattr(state, field))})
        for name, field, text in _COUNTERS:
            yield self._counter(name, text, {(): float(getattr(state, field))})
        yield self._gauge("requests", "Requests by what they do", _requests(state), "state")
        yield self._gauge("pages", "Pages of 64 tokens by tier and use", _pages(state), "tier", "state")
        speeds: _Values = {
            ("pull", "link"): state.pull_bytes_per_s,
            ("push", "link"): state.push_bytes_per_s,
            ("restore", Tier.HOST.value): state.host_bytes_per_s,
            ("restore", Tier.DISK.value): state.disk_bytes_per_s,
        }
        text = "Measured speed of moving pages; 0 = not measured yet"
        yield self._gauge("transfer_bytes_per_second", text, speeds, "kind", "over")
        evicted: _Values = {(tier.value,): float(counts.num_evicted) for tier, counts in view.tiers.items()}
        yield self._counter("evictions", "Pages evicted to make room", evicted, "tier")
        damaged: _Values = {(tier.value,): float(counts.num_damaged) for tier, counts in view.tiers.items()}
        yield self._counter("damaged_pages", "Copies dropped for a wrong checksum", damaged, "tier")
        yield self._counter("preemptions", "Sequences that gave their pages back", {(): view.faults.num_preemptions})
        yield self._counter("failed_requests", "Requests that ended in an error", {(): view.faults.num_failed})
        yield self._counter("late_kernels", "Kernels made after the warm-up", {(): view.num_late_kernels})

    def _gauge(self, name: str, text: str, values: _Values, *labels: str) -> Metric:
        family = GaugeMetricFamily(f"seamount_rank_{name}", text, labels=["pool", "rank", *labels])
        for label_values, value in values.items():
            family.add_metric([*self._of_rank, *label_values], value)
        return family

    def _counter(self, name: str, text: str, values: _Values, *labels: str) -> Metric:
        family = CounterMetricFamily(f"seamount_rank_{name}", text, labels=["pool", "rank", *labels])
        for label_values, value in values.items():
            family.add_metric([*self._of_rank, *label_values], value)
        return family


def _requests(state: worker_pb2.RankState) -> _Values:
    return {("running",): state.num_running, ("waiting",): state.num_waiting}


def _pages(state: worker_pb2.RankState) -> _Values:
    """Of each tier, adding up to all its pages. Leased ones are cached ones that may not go, superseded ones those that
    go first; leased ones of a tier below are not counted apart."""
    device = Tier.DEVICE.value
    pages: _Values = {
        (device, "free"): state.num_free_pages,
        (device, "cached"): state.num_cached_pages - state.num_leased_pages - state.num_superseded_pages,
        (device, "leased"): state.num_leased_pages,
        (device, "superseded"): state.num_superseded_pages,
        (device, "used"): state.num_pages - state.num_free_pages - state.num_cached_pages,
    }
    below = (
        (Tier.HOST.value, state.num_host_pages, state.num_host_cached_pages, state.num_host_superseded_pages),
        (Tier.DISK.value, state.num_disk_pages, state.num_disk_cached_pages, state.num_disk_superseded_pages),
    )
    for tier, num_pages, num_cached, num_superseded in below:
        pages[tier, "free"] = num_pages - num_cached
        pages[tier, "cached"], pages[tier, "superseded"] = num_cached - num_superseded, num_superseded
    return pages
