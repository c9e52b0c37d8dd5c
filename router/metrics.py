"""What a router tells Prometheus: what its clients wait for, what turns cost, what went wrong.

Times are observed as they pass, costs once a turn; counts of what is there now are read at the scrape.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from seamount.router.account import Account
from seamount.v1 import common_pb2, events_pb2
from seamount.wire.errors import SeamountError
from seamount.wire.metrics import LONG_BUCKETS, SHORT_BUCKETS, STORE_BUCKETS, LoopCollector

_PATHS = ("local", "remote")


class Outcome(Enum):
    """How a turn left this router."""

    FINISHED = "finished"
    RECORDED = "recorded"
    """It stored messages and generated nothing."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    """A router as of now. num_ranks: alive, healthy and not leaving, by pool; num_rank_deaths: since its start."""

    num_running_turns: int
    num_ranks: Mapping[str, int]
    num_rank_deaths: int


class RouterMetrics:
    """Of one router; used on its event loop alone, but for the scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        first_token = self._histogram(
            "first_token_seconds",
            "From the arrival of a turn to its first token, by where its prompt was computed",
            LONG_BUCKETS,
            "path",
        )
        self._first_token = {path: first_token.labels(path) for path in _PATHS}
        self._inter_token = self._histogram(
            "inter_token_seconds", "Gaps between the tokens of an answer, each the mean of a frame", SHORT_BUCKETS
        )
        self._turn = self._histogram("turn_seconds", "From the arrival of a turn to its end", LONG_BUCKETS)
        turns = self._counter("turns", "Turns by how they left this router", "outcome")
        self._turns = {outcome: turns.labels(outcome.value) for outcome in Outcome}
        self._failures = self._counter("failures", "Turns and stateless answers that failed, by gRPC code", "code")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answers")
        self._cached = self._counter("cached_tokens", "Those found cached when the turn came, by tier", "tier")
        self._computed = self._counter("computed_tokens", "Prompt tokens computed for answers, by pool", "pool")
        self._moved = self._counter("moved_tokens", "Tokens whose pages moved between ranks, by how", "kind")
        self._output_tokens = self._counter("output_tokens", "Tokens of answers")
        self._misses = self._counter("cache_misses", "Turns that found less than their context, by cause", "cause")
        self._leases = self._counter("leases", "Leases asked for, by the rank's answer", "outcome")
        self._retries = self._counter("retries", "Work of answers that was placed again")
        self.take_overs = self._counter("take_overs", "Turns of other routers that this one went on with")
        self.quarantined = self._counter("quarantined_turns", "Turns refused because ranks died of them")
        self.streams = Gauge("seamount_router_streams", "Streams to clients", registry=registry)
        self._redis = self._histogram(
            "redis_seconds", "Round trips to Redis that were answered, by Function", STORE_BUCKETS, "operation"
        )
        self._redis_failures = self._counter("redis_failures", "Attempts that Redis did not answer", "operation")

    def follow(self, read: Callable[[], RouterView]) -> None:
        """Tell from now on what ``read`` says at each scrape. Called on the event loop that it belongs to."""
        loop = asyncio.get_running_loop()
        self._registry.register(LoopCollector(loop, lambda: _families(read())))

    def first_token(self, path: str, took_s: float) -> None:
        self._first_token[path].observe(took_s)

    def inter_token(self, gap_s: float) -> None:
        self._inter_token.observe(gap_s)

    def turn_ended(self, outcome: Outcome, took_s: float | None) -> None:
        """took_s: None for one that another router began or goes on with."""
        self._turns[outcome].inc()
        if took_s is not None:
            self._turn.observe(took_s)

    def failed(self, error: SeamountError) -> None:
        """What a turn or a stateless answer ended with."""
        self._failures.labels(error.code.name).inc()
        if error.reason == "REQUEST_QUARANTINED":
            self.quarantined.inc()

    def answered(self, account: Account, *, num_prompt: int, num_output: int) -> None:
        """What an answer cost, however it ended."""
        self._prompt_tokens.inc(num_prompt)
        self._output_tokens.inc(num_output)
        self._retries.inc(account.num_retries)
        num_below = account.num_from_host + account.num_from_disk
        self._cached.labels("device").inc(max(0, account.num_cached - num_below))
        self._cached.labels("host").inc(account.num_from_host)
        self._cached.labels("disk").inc(account.num_from_disk)
        self._computed.labels("decode").inc(account.num_decode_computed)
        self._computed.labels("prefill").inc(account.num_prefill_computed)
        self._moved.labels("pulled").inc(account.num_pulled)
        self._moved.labels("pushed").inc(account.num_pushed)
        self._moved.labels("migrated").inc(account.num_migrated)
        if account.miss_cause not in (events_pb2.MISS_CAUSE_UNSPECIFIED, events_pb2.MISS_CAUSE_NONE):
            cause = events_pb2.MissCause.Name(account.miss_cause)
            self._misses.labels(cause.removeprefix("MISS_CAUSE_").lower()).inc()

    def leased(self, outcome: common_pb2.LeaseOutcome) -> None:
        name = common_pb2.LeaseOutcome.Name(outcome)
        self._leases.labels(name.removeprefix("LEASE_OUTCOME_").lower()).inc()

    def redis_attempt(self, operation: str, took_s: float, answered: bool) -> None:
        """One attempt of the store's; operation: name of a Function, or ``plain``."""
        if answered:
            self._redis.labels(operation).observe(took_s)
        else:
            self._redis_failures.labels(operation).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"seamount_router_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"seamount_router_{name}", text, labels, buckets=buckets, registry=self._registry)


@dataclass(slots=True, kw_only=True)
class TokenTimes:
    """Of one answer: tells how long its first token took, and each next frame of them.

    arrived: by ``time.monotonic()``; None for an answer that another router began: its first token is not told.
    """

    metrics: RouterMetrics
    account: Account
    arrived: float | None
    _last: float | None = field(default=None)

    def tokens(self, num_tokens: int) -> None:
        """A frame of so many tokens came."""
        now = time.monotonic()
        if self._last is not None:
            self.metrics.inter_token((now - self._last) / max(1, num_tokens))
        elif self.arrived is not None:
            self.metrics.first_token("remote" if self.account.prefill_rank else "local", now - self.arrived)
        self._last = now


def _families(view: RouterView) -> Iterable[Metric]:
    turns = GaugeMetricFamily("seamount_router_running_turns", "Turns that this router works on")
    turns.add_metric([], view.num_running_turns)
    yield turns
    ranks = GaugeMetricFamily(
        "seamount_router_ranks", "Ranks that this router sees alive, healthy and not leaving", labels=["pool"]
    )
    for pool, count in view.num_ranks.items():
        ranks.add_metric([pool], count)
    yield ranks
    deaths = CounterMetricFamily("seamount_router_rank_deaths", "Ranks whose process this router saw end")
    deaths.add_metric([], view.num_rank_deaths)
    yield deaths
