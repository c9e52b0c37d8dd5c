from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from examples.tiny_agent import feeding, objectives, training
from examples.tiny_agent.config import model_config
from examples.tiny_agent.data import Batch
from examples.tiny_agent.documents import SHORT
from examples.tiny_agent.export import load_checkpoint, save_checkpoint
from examples.tiny_agent.feeding import feed
from examples.tiny_agent.model import Model, MoE
from examples.tiny_agent.optimizer import Optimizer, orthogonalized
from examples.tiny_agent.stages import BALANCE_SPEED, STAGES, Kind, Stage
from examples.tiny_agent.training import Training, balance

torch.set_num_threads(1)

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 8,
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "HEAD_ROWS", 32)
    monkeypatch.setattr(objectives, "HEAD_ROWS", 32)


def _stage(name: str, **changes: Any) -> Stage:
    small = Stage(
        name=name,
        kind=Kind(name),
        mixture=SHORT,
        sequence_length=64,
        batch_size=2,
        steps=100,
        matrix_lr=3e-3,
        other_lr=3e-3,
        warm_up=1,
        decay_share=0.5,
        mtp_weight=0.3,
    )
    return dataclasses.replace(small, **changes)


def _model() -> Model:
    torch.manual_seed(7)
    return Model(model_config(**SMALL), torch.float32)


def _batches() -> Iterator[Batch]:
    """The same documents again and again; their second half repeats the first, and rows end in padding."""
    while True:
        generator = np.random.default_rng(11)
        half = generator.integers(2, 64, (2, 2, 13), dtype=np.int32)
        tokens = np.zeros((2, 64), np.int32)
        tokens[:, :52] = np.concatenate((half, half), axis=2).reshape(2, 52)
        ids = np.full((2, 64), -1, np.int32)
        ids[:, :26], ids[:, 26:52] = 0, 1
        positions = np.zeros((2, 64), np.int32)
        positions[:, :52] = np.tile(np.arange(26), 2)
        yield Batch(tokens=tokens, loss_mask=positions >= 13, document_ids=ids, positions=positions)


def _run(trained: Training, steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    deadline = time.monotonic() + 300
    trained.run(_batches(), deadline=deadline, max_steps=steps, on_metrics=lines.append)
    return lines


def test_targets_stay_inside_their_document() -> None:
    batch = next(_batches())
    mask = batch.loss_mask.copy()
    mask[:, [1, 27]] = True  # the second token of each document: nothing two before it
    fed = feed(dataclasses.replace(batch, loss_mask=mask), CPU)
    for targets, ahead in ((fed.next_tokens, 1), (fed.after_next, 2)):
        assert targets.count == int(targets.weights.sum()) == 2 * 2 * 13 + (4 if ahead == 1 else 0)
        assert (targets.weights[targets.count :] == 0).all()
        rows, tokens = targets.rows[: targets.count].numpy(), targets.tokens[: targets.count].numpy()
        assert (batch.tokens.reshape(-1)[rows + ahead] == tokens).all()
        flat_ids, at = batch.document_ids.reshape(-1), mask.reshape(-1)
        assert (flat_ids[rows + ahead] == flat_ids[rows]).all()
        assert at[rows + ahead].all()
    assert fed.num_tokens == 2 * 52
    assert fed.mean_context == 13.5


def test_the_dense_stage_learns_and_leaves_the_indexers_alone() -> None:
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lines = _run(Training(model, _stage("dense"), seed=1), 40)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"]
    assert lines[-1]["step"] == 40
    assert lines[-1]["tokens_per_s"] > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".indexer." in name), name


def test_without_its_weight_the_multi_token_layer_stays_as_it_is() -> None:
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    line = _run(Training(model, _stage("dense", mtp_weight=0.0), seed=1), 3)[-1]
    assert "mtp_loss" not in line
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".indexer." in name or name.startswith("mtp.")), name


def test_the_indexer_stage_moves_the_indexers_alone() -> None:
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lines = _run(Training(model, _stage("indexer"), seed=1), 40)
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".indexer." not in name), name


def test_the_sparse_stage_moves_everything() -> None:
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lines = _run(Training(model, _stage("sparse"), seed=1), 20)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["divergence"] > 0
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert not same


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_a_resumed_run_takes_the_same_next_step(stage: str, tmp_path: Path) -> None:
    """Weights, place in the stage and drawn rows come back; the moments do not, and bfloat16 rounds once."""
    model = _model()
    _run(Training(model, _stage(stage), seed=1), 5)
    save_checkpoint(model, tmp_path)
    load_checkpoint(model, tmp_path)
    going_on = Training(model, _stage(stage), seed=1, step=5)
    fresh = _model()
    load_checkpoint(fresh, tmp_path)
    resumed = Training(fresh, _stage(stage), seed=1, step=5)
    assert _run(going_on, 1)[0]["loss"] == _run(resumed, 1)[0]["loss"]
    for own, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(own, other)


def test_learning_rates() -> None:
    stage = _stage("dense", steps=1000, warm_up=10, decay_share=0.4)
    assert stage.lr_factor(0.0, 0) == 0.1
    assert stage.lr_factor(0.3, 9) == stage.lr_factor(0.6, 400) == 1.0
    assert stage.lr_factor(0.8, 400) == pytest.approx(0.5)
    assert stage.lr_factor(0.8, 4) == pytest.approx(0.25)
    assert stage.lr_factor(0.999, 400) == 0.1
    assert _stage("dense", decay_share=0.0).lr_factor(0.98, 400) == 1.0
    assert sum(plan.batch_tokens * plan.steps for plan in STAGES.values()) < 2.2e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the time is a second after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


@pytest.mark.usefixtures("clock")
def test_a_stage_that_is_too_slow_is_done_in_time() -> None:
    """It makes fewer steps, and its learning rates fall over those."""
    slow = Training(_model(), _stage("dense", steps=1000, decay_share=1.0), seed=1)
    lines: list[dict[str, Any]] = []
    slow.run(_batches(), deadline=1000, end=24, on_metrics=lines.append)
    assert slow.done
    assert 15 < slow.step < 25
    assert [line["step"] for line in lines] == [10, slow.step]
    assert 0.9 * slow.stage.matrix_lr > lines[0]["lr"] > 2 * lines[1]["lr"]


@pytest.mark.usefixtures("clock")
def test_a_deadline_leaves_a_stage_undone() -> None:
    cut = Training(_model(), _stage("dense", steps=1000), seed=1)
    cut.run(_batches(), deadline=10, end=100, on_metrics=lambda line: None)
    assert not cut.done
    assert 5 < cut.step < 10


def test_balance_pulls_towards_equal_loads() -> None:
    model = _model()
    gates = [layer.mlp for layer in model.all_layers() if isinstance(layer.mlp, MoE)]
    load = torch.tensor([9.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    assert balance(model, [load] * len(gates)).item() == pytest.approx(9 / 5)
    for gate in gates:
        assert gate.gate_bias.tolist() == pytest.approx([-BALANCE_SPEED, BALANCE_SPEED, *[0.0] * 6])


def test_an_unbalanced_gate_becomes_balanced() -> None:
    model = _model()
    moe = model.layers[1].mlp
    x = torch.randn(1, 512, 64) + 0.4
    worst = []
    for _ in range(400):
        _, chosen = moe.route(x)
        load = chosen.flatten(0, 1).float().sum(0)
        worst.append((load.max() / load.mean()).item())
        balance(model, [load] * 4)
    print(f"largest load over mean: {worst[0]:.2f}, then {worst[-1]:.2f}")
    assert worst[0] > 1.3
    assert worst[-1] < 1.1


@pytest.mark.parametrize("shape", [(3, 40, 16), (2, 16, 40)])
def test_updates_of_matrices_are_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(3)
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    orthogonal = orthogonalized(matrices)
    values = torch.linalg.svdvals(orthogonal)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The same singular vectors: U^T X V is diagonal.
    inner = u.mT @ orthogonal @ v.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_optimizer_updates_stacked_matrices_as_single_ones() -> None:
    torch.manual_seed(5)
    stacked = torch.nn.Parameter(torch.randn(3, 8, 12))
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    other = torch.nn.Parameter(torch.zeros(4))
    idle = torch.nn.Parameter(torch.ones(8, 12))
    one = Optimizer([stacked, idle], [other])
    three = Optimizer(single, [torch.nn.Parameter(torch.zeros(4))])
    for _ in range(3):
        gradient = torch.randn(3, 8, 12)
        stacked.grad, other.grad = gradient.clone(), torch.ones(4)
        for parameter, part in zip(single, gradient, strict=True):
            parameter.grad = part.clone()
        three._others[0].grad = torch.ones(4)
        one.step(0.1, 0.01)
        three.step(0.1, 0.01)
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), rtol=1e-5, atol=1e-5)
    assert other.detach().tolist() == pytest.approx([-0.03] * 4, rel=1e-3)
    assert torch.equal(idle.detach(), torch.ones(8, 12))
