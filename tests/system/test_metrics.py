"""What real routers and ranks tell Prometheus after real turns, beside what the turns' receipts say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from urllib.request import urlopen

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from seamount.cluster.local import LocalCluster
from seamount.router.client import AsyncClient, Sampling, ThinkingMode, user
from seamount.v1 import events_pb2

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
SAMPLING = Sampling(temperature=0.0, max_output_tokens=40)
NUM_PAGES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    text: str
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """Of one series; a histogram's with ``le``."""
        return self.values[f"seamount_{name}", frozenset(labels.items())]

    def total(self, name: str) -> float:
        """Of all series of the name."""
        return sum(value for (sample, _), value in self.values.items() if sample == f"seamount_{name}")


async def scrape(cluster: LocalCluster, process: str) -> Scrape:
    address = cluster.processes[process].metrics_address

    def read() -> str:
        with urlopen(f"http://{address}/metrics", timeout=10) as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            return str(response.read().decode())

    text = await asyncio.to_thread(read)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return Scrape(text=text, values={(s.name, frozenset(s.labels.items())): s.value for s in samples})


async def settled(cluster: LocalCluster) -> Scrape:
    """The router's, once no turn runs: one is counted a moment after its last event was told."""
    for _ in range(100):
        seen = await scrape(cluster, "router-0")
        if seen.value("router_running_turns") == seen.value("router_streams") == 0:
            return seen
        await asyncio.sleep(0.05)
    raise AssertionError("a turn or a stream never ends")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster) -> AsyncIterator[LocalCluster]:
    overrides = {
        "cache": {"num_pages": NUM_PAGES, "host_cache_bytes": 1 << 20},
        "pools": {"decode": {"expert_parallel": 1}},
        "placement": {"path": "auto", "local_append_max_tokens": 128},
    }
    async with start_cluster(overrides) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address) as opened:
        yield opened


async def receipts_of_two_turns(client: AsyncClient, name: str) -> list[events_pb2.Receipt]:
    session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
    return [
        (await client.run_turn(session.id, [user(f"{name} {text}")], sampling=SAMPLING).result()).receipt
        for text in ("word " * 100, "again")
    ]


async def test_a_router_tells_what_its_receipts_say(cluster: LocalCluster, client: AsyncClient) -> None:
    before = await scrape(cluster, "router-0")
    receipts = await receipts_of_two_turns(client, "alpha")
    after = await settled(cluster)

    def grown(name: str, **labels: str) -> float:
        was = before.values.get((f"seamount_router_{name}", frozenset(labels.items())), 0.0)
        return after.value(f"router_{name}", **labels) - was

    assert receipts[1].num_cached_tokens > 400
    assert grown("turns_total", outcome="finished") == 2
    assert grown("prompt_tokens_total") == sum(r.num_prompt_tokens for r in receipts)
    assert grown("cached_tokens_total", tier="device") == sum(r.num_cached_tokens for r in receipts)
    assert grown("output_tokens_total") == sum(r.num_output_tokens for r in receipts)
    assert grown("computed_tokens_total", pool="prefill") == sum(r.num_prefill_computed_tokens for r in receipts)
    assert grown("computed_tokens_total", pool="decode") == sum(r.num_decode_computed_tokens for r in receipts)
    assert grown("cache_misses_total", cause="first_turn") == 1
    firsts = [
        after.values.get(("seamount_router_first_token_seconds_count", frozenset({("path", path)})))
        for path in ("local", "remote")
    ]
    assert sum(filter(None, firsts)) == 2
    assert grown("turn_seconds_count") == 2
    num_gaps = sum(r.num_output_tokens - 1 for r in receipts)
    assert 0.5 * num_gaps <= grown("inter_token_seconds_count") <= num_gaps  # one a frame; a frame may hold several
    for operation in ("begin_turn", "append_tokens", "commit_turn"):
        assert grown("redis_seconds_count", operation=operation) >= 2
    assert after.value("router_ranks", pool="decode") == after.value("router_ranks", pool="prefill") == 1
    assert after.value("router_rank_deaths_total") == after.value("router_take_overs_total") == 0


async def test_a_running_turn_is_seen_and_a_cancelled_one_is_counted_as_such(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    session = await client.create_session()
    stream = client.run_turn(session.id, [user("on and on")], sampling=Sampling(max_output_tokens=3000, seed=1))
    await anext(stream)
    seen = await scrape(cluster, "router-0")
    assert seen.value("router_running_turns") == seen.value("router_streams") == 1
    assert await client.cancel_turn(session.id)
    after = await settled(cluster)
    assert after.value("router_turns_total", outcome="cancelled") == 1
    assert after.value("router_turns_total", outcome="failed") == 0


async def test_a_rank_tells_its_steps_its_pages_and_its_evictions(cluster: LocalCluster, client: AsyncClient) -> None:
    of = {"pool": "decode", "rank": "0"}
    before = await scrape(cluster, "decode-0.0")
    assert before.value("rank_evictions_total", tier="device", **of) == 0
    sampled = 0
    for number in range(4):  # more than the device holds
        session = await client.create_session(thinking_mode=ThinkingMode.CHAT)
        turn = await client.run_turn(session.id, [user(f"{number} " + "word " * 250)], sampling=SAMPLING).result()
        sampled += turn.receipt.num_output_tokens
    after = await scrape(cluster, "decode-0.0")
    assert after.value("rank_sampled_tokens_total", **of) - before.value("rank_sampled_tokens_total", **of) >= sampled
    pages = {
        state: after.value("rank_pages", tier="device", state=state, **of)
        for state in ("free", "cached", "leased", "superseded", "used")
    }
    assert sum(pages.values()) == NUM_PAGES
    assert pages["used"] == 0
    assert after.value("rank_evictions_total", tier="device", **of) > 0
    assert after.value("rank_pages", tier="host", state="cached", **of) > 0
    assert after.value("rank_damaged_pages_total", tier="host", **of) == 0
    num_steps = sum(
        after.value("rank_step_seconds_count", kind=kind, **of) for kind in ("idle", "decode", "prefill", "mixed")
    )
    assert num_steps == after.value("rank_steps_total", **of) > 0
    assert after.value("rank_step_seconds_count", kind="decode", **of) > 0
    assert after.value("rank_healthy", **of) == 1
    assert after.value("rank_draining", **of) == after.value("rank_queued_prefill_tokens", **of) == 0


async def test_no_label_holds_what_a_client_sent_or_a_session_is_called(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    session = await client.create_session(model="test-model")
    await client.run_turn(session.id, [user("unmistakable")], sampling=SAMPLING).result()
    for process in cluster.processes:
        text = (await scrape(cluster, process)).text
        assert session.id not in text
        assert "unmistakable" not in text
        assert text.count("\n") < 600


async def test_a_rank_that_dies_and_the_retry_that_it_costs_are_counted(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    session = await client.create_session()
    sampling = Sampling(max_output_tokens=300, temperature=0.8, seed=9)  # seconds: the death surely falls into them
    stream = client.run_turn(session.id, [user("tell me a story")], sampling=sampling)
    for _ in range(10):
        await anext(stream)
    await cluster.kill("decode-0.0")
    await cluster.start_gang("decode", "decode-0")
    turn = await stream.result()
    after = await settled(cluster)
    assert after.value("router_rank_deaths_total") == 1
    assert after.value("router_retries_total") == turn.receipt.num_retries >= 1
    assert after.value("router_turns_total", outcome="failed") == 0
    assert after.value("router_ranks", pool="decode") == 1
