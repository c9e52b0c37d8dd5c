"""The evaluation's two ways to ask a model say the same: in one process, and through every process of the system."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path

import pytest
import torch

from examples.tiny_agent.inference import LocalInference, ServedInference, load_transformer
from examples.tiny_agent.parity import compare, held_out
from examples.tiny_agent.suite import Suite
from examples.tiny_agent.turns import TaskKind
from seamount.cluster.local import LocalCluster
from seamount.router.tokenizer import Tokenizer

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

MAX_OUTPUT_TOKENS = 12


async def test_served_and_local_inference_take_the_same_tokens(
    start_cluster: Callable[..., AbstractAsyncContextManager[LocalCluster]], checkpoint: Path
) -> None:
    rng = random.Random(7)
    prompts = {i: [rng.randrange(3, 250) for _ in range(length)] for i, length in enumerate((3, 70, 150))}
    model = load_transformer(checkpoint, layout_name="exact", dtype=torch.float64, device="cpu")
    local = LocalInference(model, num_conversations=3, max_tokens=256)
    expected = await asyncio.to_thread(local.generate, prompts, max_output_tokens=MAX_OUTPUT_TOKENS)

    def ask(address: str) -> dict[int, list[int]]:
        with closing(ServedInference(address, num_streams=3)) as served:
            return served.generate(prompts, max_output_tokens=MAX_OUTPUT_TOKENS)

    async with start_cluster() as cluster:
        assert await asyncio.to_thread(ask, cluster.address) == expected
    assert all(outputs for outputs in expected.values())


TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny-agent"


async def test_the_trained_model_says_the_same_served_and_in_one_process(
    start_cluster: Callable[..., AbstractAsyncContextManager[LocalCluster]],
) -> None:
    """A dozen held-out tasks, played to their end; ``make eval-served`` plays 200 and finds needles."""
    suite = Suite(seed=4, num_tasks=40, num_needles=0, kinds=(TaskKind.SINGLE, TaskKind.NO_TOOL), group_size=1)
    episodes = held_out(suite.groups(), Tokenizer.load(TRAINED), 420)[:12]
    async with start_cluster({"model": {"path": str(TRAINED)}}) as cluster:
        played = await asyncio.to_thread(lambda: list(compare(TRAINED, cluster.address, episodes, torch.float64)))
    assert [difference for both, _ in played for difference in both.differences] == []
    assert sum(both.num_outputs for both, _ in played) > len(episodes) == 12
    assert sum(one.succeeded for _, outcomes in played for one in outcomes) >= 9
