"""Distribution changes nothing: the same tokens as one process, whatever the path."""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from seamount.cluster.local import LocalCluster
from seamount.router.client import AsyncClient, Sampling
from seamount.workers.cache.reservations import Reservations
from seamount.workers.engine import Engine
from seamount.workers.events import EngineEvent, Failed, Finished, Tokens
from seamount.workers.gang import Gang
from seamount.workers.model.config import ModelConfig
from seamount.workers.model.weights import load_model
from seamount.workers.requests import EngineRequest, SamplingParams
from seamount.workers.scheduler import EngineLimits
from seamount.workers.vocabulary import vocabulary_size

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

NUM_PROMPTS = 100
MAX_OUTPUT = 12
StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]


@dataclass(frozen=True, slots=True)
class Case:
    prompt: tuple[int, ...]
    temperature: float
    seed: int


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 300]
    lengths += [rng.randint(1, 260) for _ in range(NUM_PROMPTS - len(lengths))]
    shared = [rng.randrange(256) for _ in range(200)]  # some prompts share a prefix, so that pages are shared too
    return [
        Case(
            prompt=tuple(shared[:length] if i % 5 == 0 else (rng.randrange(256) for _ in range(length))),
            temperature=0.0 if i % 2 else 0.9,
            seed=rng.getrandbits(63),
        )
        for i, length in enumerate(lengths)
    ]


def single_process(path: Path, cases: list[Case], dtype: torch.dtype) -> list[list[int]]:
    """The tokens of one engine in this process: no gang, no link, no router."""
    config = ModelConfig.from_json(path)
    model = load_model(path, dtype=dtype, layout_name="exact")
    reservations = Reservations(num_pages=1024, fingerprint="one", layout=model.layout.signature)
    engine = Engine(
        model=model,
        planes=model.layout.allocate(config.num_hidden_layers, 1024),
        reservations=reservations,
        gang=Gang.alone(),
        eos_token_id=config.eos_token_id,
        vocab_limit=vocabulary_size(path),
        limits=EngineLimits(max_batch_tokens=256, max_running=32, prefill_chunk_tokens=96),
    )
    outputs: list[list[int]] = [[] for _ in cases]
    done = [threading.Event() for _ in cases]

    def sink(index: int) -> Callable[[EngineEvent], None]:
        def take(event: EngineEvent) -> None:
            if isinstance(event, Tokens):
                outputs[index].extend(event.token_ids)
            elif isinstance(event, Finished | Failed):
                done[index].set()

        return take

    engine.start()
    for index, case in enumerate(cases):
        reservation = reservations.reserve(
            session_id="",
            turn_id=str(index),
            epoch=1,
            attempt=1,
            salt=bytes(32),
            token_ids=case.prompt,
            time_to_live_s=60,
        )
        sampling = SamplingParams(
            temperature=case.temperature, top_p=0.95, seed=case.seed, max_output_tokens=MAX_OUTPUT
        )
        engine.submit(EngineRequest(id=reservation.id, reservation=reservation, sampling=sampling, sink=sink(index)))
    for event in done:
        assert event.wait(120)
    engine.stop()
    return outputs


async def served(client: AsyncClient, cases: list[Case]) -> list[list[int]]:
    """The tokens of the cluster, all prompts in flight together."""

    async def one(case: Case) -> list[int]:
        sampling = Sampling(temperature=case.temperature, top_p=0.95, seed=case.seed, max_output_tokens=MAX_OUTPUT)
        turn = await client.generate(case.prompt, sampling=sampling).result()
        path_counts[turn.receipt.path] = path_counts.get(turn.receipt.path, 0) + 1
        return list(turn.token_ids)

    path_counts: dict[int, int] = {}
    outputs = await asyncio.gather(*(one(case) for case in cases))
    print(f"turns by prefill path: {path_counts}")
    return list(outputs)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exact_cluster(start_cluster: StartCluster) -> AsyncIterator[LocalCluster]:
    async with start_cluster({"cache": {"num_pages": 1024}}) as cluster:
        yield cluster


@pytest.mark.figures
async def test_the_same_tokens_as_one_process(
    exact_cluster: LocalCluster,
    checkpoint: Path,
    cases: list[Case],
    pages_are_back: Callable[[AsyncClient], Awaitable[None]],
) -> None:
    expected = await asyncio.to_thread(single_process, checkpoint, cases, torch.float64)
    async with AsyncClient(exact_cluster.address) as client:
        got = await served(client, cases)
        assert got == expected
        assert len({tuple(tokens) for tokens in got}) > NUM_PROMPTS // 2, "the outputs must not be all alike"
        await pages_are_back(client)


@pytest.mark.figures
async def test_the_default_dtype_reports_its_first_divergence(
    start_cluster: StartCluster, checkpoint: Path, cases: list[Case]
) -> None:
    few = cases[:20]
    expected = await asyncio.to_thread(single_process, checkpoint, few, torch.float32)
    async with (
        start_cluster({"cache": {"dtype": "float32", "num_pages": 1024}}) as cluster,
        AsyncClient(cluster.address) as client,
    ):
        got = await served(client, few)
    same = [left == right for left, right in zip(got, expected, strict=True)]
    first = next(
        (
            (number, position)
            for number, (left, right) in enumerate(zip(got, expected, strict=True))
            for position, pair in enumerate(zip(left, right, strict=False))
            if pair[0] != pair[1]
        ),
        None,
    )
    print(f"float32: {sum(same)} of {len(same)} outputs are equal; first divergence (prompt, token): {first}")
    assert all(len(tokens) > 0 for tokens in got)


async def test_each_rank_holds_half_of_the_experts(exact_cluster: LocalCluster, checkpoint: Path) -> None:
    whole = load_model(checkpoint, dtype=torch.float64, layout_name="exact").expert_bytes
    async with AsyncClient(exact_cluster.address) as client:
        by_gang_size = {(r.state.gang_size, r.state.gang_rank): r.state.expert_bytes for r in await client.list_ranks()}
    assert by_gang_size == {(2, 0): whole // 2, (2, 1): whole // 2, (1, 0): whole}
