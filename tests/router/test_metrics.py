"""What a router counts and times: answers, failures, attempts at a Redis that is there, stalls or is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from seamount.cluster.redis_server import RedisServer
from seamount.router import metrics as module
from seamount.router.account import Account
from seamount.router.metrics import Outcome, RouterMetrics, TokenTimes
from seamount.router.quarantine import quarantined
from seamount.router.store import Store, called
from seamount.v1 import common_pb2, events_pb2
from seamount.wire.errors import Unavailable

Value = Callable[..., float | None]


@pytest.fixture
def metrics() -> RouterMetrics:
    return RouterMetrics(CollectorRegistry())


@pytest.fixture
def value(metrics: RouterMetrics) -> Value:
    return lambda name, **labels: metrics._registry.get_sample_value(f"seamount_router_{name}", labels)


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """What each next look at the clock tells."""
    left = list(times)
    monkeypatch.setattr(module.time, "monotonic", lambda: left.pop(0))


def test_the_first_frame_is_a_first_token_and_each_next_one_a_gap_a_token(
    metrics: RouterMetrics, value: Value, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, 12.0, 12.03, 12.23)
    times = TokenTimes(metrics=metrics, account=Account(started=10.0, prefill_rank="p"), arrived=10.0)
    for num_tokens in (1, 1, 4):
        times.tokens(num_tokens)
    assert value("first_token_seconds_sum", path="remote") == pytest.approx(2.0)
    assert value("first_token_seconds_count", path="local") == 0
    assert value("inter_token_seconds_count") == 2
    assert value("inter_token_seconds_sum") == pytest.approx(0.03 + 0.05)


def test_an_answer_that_another_router_began_has_no_first_token_here(
    metrics: RouterMetrics, value: Value, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, 12.0, 12.5)
    times = TokenTimes(metrics=metrics, account=Account(started=10.0), arrived=None)
    times.tokens(1)
    times.tokens(1)
    assert value("first_token_seconds_count", path="local") == 0
    assert value("inter_token_seconds_sum") == pytest.approx(0.5)


def test_what_an_answer_cost_is_told_apart(metrics: RouterMetrics, value: Value) -> None:
    account = Account(
        started=0.0,
        num_cached=700,
        num_from_host=128,
        num_from_disk=64,
        num_decode_computed=10,
        num_prefill_computed=290,
        num_pulled=600,
        num_pushed=289,
        num_migrated=64,
        num_retries=2,
        miss_cause=events_pb2.MISS_CAUSE_REASONING_CUT,
    )
    metrics.answered(account, num_prompt=1000, num_output=50)
    metrics.answered(Account(started=0.0, miss_cause=events_pb2.MISS_CAUSE_NONE), num_prompt=5, num_output=1)
    assert value("prompt_tokens_total") == 1005
    assert value("output_tokens_total") == 51
    assert [value("cached_tokens_total", tier=tier) for tier in ("device", "host", "disk")] == [508, 128, 64]
    assert [value("computed_tokens_total", pool=pool) for pool in ("decode", "prefill")] == [10, 290]
    assert [value("moved_tokens_total", kind=kind) for kind in ("pulled", "pushed", "migrated")] == [600, 289, 64]
    assert value("retries_total") == 2
    assert value("cache_misses_total", cause="reasoning_cut") == 1
    assert value("cache_misses_total", cause="none") is None


def test_ends_failures_and_leases_are_counted(metrics: RouterMetrics, value: Value) -> None:
    metrics.turn_ended(Outcome.FINISHED, 3.0)
    metrics.turn_ended(Outcome.HANDED_OVER, None)
    metrics.failed(Unavailable("no rank", reason="NO_DECODE_RANK"))
    metrics.failed(quarantined())
    metrics.leased(common_pb2.LEASE_OUTCOME_CLIPPED)
    assert {one.value: value("turns_total", outcome=one.value) for one in Outcome} == {
        "finished": 1,
        "recorded": 0,
        "failed": 0,
        "cancelled": 0,
        "handed_over": 1,
    }
    assert value("turn_seconds_count") == 1
    assert value("failures_total", code="UNAVAILABLE") == value("failures_total", code="INTERNAL") == 1
    assert value("quarantined_turns_total") == 1
    assert value("leases_total", outcome="clipped") == 1


async def test_attempts_at_redis_are_timed_by_function_and_those_without_an_answer_counted(
    metrics: RouterMetrics, value: Value, tmp_path: Path
) -> None:
    with RedisServer() as server:
        store = await Store.open(
            server.start(tmp_path),
            command_timeout_s=0.1,
            retry_budget_s=5.0,
            on_attempt=metrics.redis_attempt,
        )
        answered = value("redis_seconds_count", operation="plain")
        assert answered is not None
        await store.command("SET", store.key("a"), "b")
        arguments = ("peer", b"record", b"beat")
        await store.pipeline([("PING",), called("register_peer", (store.key("p"), store.key("b")), arguments)])
        assert value("redis_seconds_count", operation="plain") == answered + 1
        assert value("redis_seconds_count", operation="register_peer") == 1
        assert value("redis_failures_total", operation="plain") is None
        os.kill(server.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.5, os.kill, server.pid, signal.SIGCONT)
        await store.command("GET", store.key("a"))
        assert value("redis_seconds_count", operation="plain") == answered + 2
        failures = value("redis_failures_total", operation="plain")
        assert failures is not None
        assert failures >= 1
        waiting = asyncio.create_task(store.command("GET", store.key("a")))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert value("redis_failures_total", operation="plain") == failures  # nobody waited for its answer
        await store.close()
