"""What runs before a rank serves: batches of every kind, in step with the gang, without a trace in what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from seamount.kernels.layout import CacheLayout
from seamount.wire.errors import Unavailable
from seamount.workers.experts.dispatch import ExpertParallel, GangExperts, LocalExperts
from seamount.workers.gang import Gang, StepHeader
from seamount.workers.model.batch import AttentionPlan, ForwardBatch
from seamount.workers.model.transformer import Transformer
from seamount.workers.scheduler import EngineLimits
from seamount.workers.warmup import batches, steps, warm_up

TIMEOUT_S = 0.5
NUM_EXPERTS = 4
TOPK = 24
LIMITS = EngineLimits(max_batch_tokens=64, max_running=8, prefill_chunk_tokens=32, max_context_tokens=512)


@pytest.fixture
def gang(form_gang: Callable[..., list[Gang]]) -> Iterator[list[Gang]]:
    """Two ranks whose collectives have ``TIMEOUT_S``."""
    members = form_gang(2, TIMEOUT_S)
    yield members
    for member in members:
        member.close()


def experts(gang: Gang) -> ExpertParallel:
    assert gang.group is not None
    return GangExperts(gang.group, NUM_EXPERTS)


def test_every_kind_of_step_is_among_the_batches() -> None:
    made = list(batches(LIMITS, topk=TOPK, num_pages=100))
    plans = [AttentionPlan.create(batch, TOPK) for batch in made]
    decoding = {(len(plan.decode.rows), len(plan.decode.scored) > 0) for plan in plans if plan.decode is not None}
    assert decoding == {(rows, scored) for rows in (1, 2, 3, 4, 6, 8) for scored in (False, True)}
    chunks = {(len(chunk.lengths), chunk.scored is not None) for plan in plans for chunk in plan.chunks}
    assert {(32, True), (17, False), (17, True), (2, False), (2, True)} <= chunks
    assert {1, 3, 16, 23, 37, 512} <= {max(batch.context_lens) for batch in made}
    assert {2, 3, 16, 17, 32, 33, 48, 64} <= {len(batch.token_ids) for batch in made}
    assert all(len(batch.token_ids) <= LIMITS.max_batch_tokens for batch in made)
    assert all(len(set(batch.slots.tolist())) == len(batch.slots) for batch in made)


def test_steps_are_half_a_power_of_two_apart_and_end_at_the_limit() -> None:
    assert steps(1) == [1]
    assert steps(3) == [1, 2, 3]
    assert steps(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]


def test_long_contexts_come_with_every_number_of_rows() -> None:
    limits = EngineLimits(max_batch_tokens=512, max_running=64, prefill_chunk_tokens=256, max_context_tokens=16384)
    made = list(batches(limits, topk=256, num_pages=512))
    rows_of: dict[int, set[int]] = {}
    for batch in made:
        rows_of.setdefault(max(batch.context_lens), set()).add(len(batch.token_ids))
    assert rows_of[12288] == rows_of[16384] == {*steps(64), 128, 129, 192, 256}
    assert rows_of[8192] == {*steps(64), 129, 256}
    assert len(made) < 200


@pytest.mark.parametrize(("num_pages", "max_context_tokens"), [(1, 512), (100, 1), (1, 1), (100, TOPK), (2, 128)])
def test_batches_stay_within_few_pages_and_short_contexts(num_pages: int, max_context_tokens: int) -> None:
    limits = EngineLimits(
        max_batch_tokens=1, max_running=1, prefill_chunk_tokens=64, max_context_tokens=max_context_tokens
    )
    made: list[ForwardBatch] = list(batches(limits, topk=TOPK, num_pages=num_pages))
    assert made
    for batch in made:
        assert max(batch.context_lens) <= max_context_tokens
        assert max(page for table in batch.page_tables for page in table) < num_pages


def test_a_peer_that_comes_late_is_waited_for_and_the_deadline_is_the_old_one_afterwards(
    gang: list[Gang], sharded_model: Callable[..., Transformer]
) -> None:
    def warm(member: Gang) -> None:
        time.sleep(member.rank * 3 * TIMEOUT_S)
        model = sharded_model(experts(member))
        planes = model.layout.allocate(model.config.num_hidden_layers, 20)
        warm_up(model, planes, member, LIMITS, topk=model.config.index_topk, num_pages=20)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(warm, gang))
        first, _ = pool.map(_agree, gang)
        assert [header.num_decode_tokens for header in first] == [0, 1]
    began = time.monotonic()
    with pytest.raises(Unavailable, match="lost a rank"):
        gang[0].agree(StepHeader())
    assert time.monotonic() - began < 60  # DEADLINE_S would be ten minutes


def _agree(member: Gang) -> list[StepHeader]:
    return member.agree(StepHeader(num_decode_tokens=member.rank))


def test_a_warm_rank_says_what_a_cold_one_says(sharded_model: Callable[..., Any]) -> None:
    model: Transformer = sharded_model(LocalExperts(NUM_EXPERTS))
    tokens = torch.randint(0, model.config.vocab_size, (100,)).tolist()
    logits = []
    for is_warm in (False, True):
        planes = model.layout.allocate(model.config.num_hidden_layers, 20)
        if is_warm:
            warm_up(model, planes, Gang.alone(), LIMITS, topk=model.config.index_topk, num_pages=20)
        with torch.inference_mode():
            logits.append(model.forward(ForwardBatch.create([(tokens, 0, [3, 1])]), planes))
    assert isinstance(model.layout, CacheLayout)
    assert torch.equal(*logits)
